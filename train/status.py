"""status.json of a stage: what a run says of itself to other programs."""

import json
from pathlib import Path
from typing import Any


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of RUN/stageN; empty if there is none yet."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
