"""status.json of a stage: what a run says of itself to other programs."""

import json
from pathlib import Path
from typing import Any


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of RUN/stageN; empty without one, or where a power cut emptied it."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
