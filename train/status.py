"""The files of a run that other programs read: status.json of a stage, and how any is replaced."""

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status of RUN/stageN; empty without one, or where a power cut emptied it."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write_json(path: Path, record: Mapping[str, Any], *, is_durable: bool = False) -> None:
    """Replace a JSON file atomically, under a temporary name that no other process uses.

    Args:
        path: of the file.
        record: its content.
        is_durable: the file is whole also after a power cut, at the price of waiting for the disk.

    Raises:
        OSError: if it cannot be written; the old file is still there then, and no other.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=2) + "\n")
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # on a full disk a file would stay for every sign of life
            temporary.unlink()
        raise
