"""Programs of a test's own that come first in PATH."""

import os
from pathlib import Path

import pytest


def stub_programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> Path:
    """Write shell programs by name and put their folder first into PATH; return the folder."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in scripts.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
    if not os.environ["PATH"].startswith(f"{programs}:"):
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs
