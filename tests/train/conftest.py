"""A tiny model folder and two shards, one of them empty between two full ones."""

from pathlib import Path

import pytest

from tests.builders import write_shards
from tests.train.tiny import tiny_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return write_shards(tmp_path / "shards", [7, 0, 5])
