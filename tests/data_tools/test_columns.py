"""Columns in a file: mapped, readable by safetensors, whole or not there."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from data_tools.errors import DataError
from data_tools.stream.columns import create_columns, open_columns

SPECS = {
    "letters": ("uint8", (5,)),
    "sizes": ("uint64", (3,)),
    "table": ("uint32", (2, 3)),
    "empty": ("int64", (0,)),
    "is_used": ("bool", (3,)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with create_columns(tmp_path / "a.columns", SPECS, {"version": "1"}) as columns:
        columns["letters"][:] = np.frombuffer(b"hello", np.uint8)
        columns["sizes"][:] = [1, 2**40, 3]
        columns["table"][:] = np.arange(6).reshape(2, 3)
        columns["is_used"][1] = True
    return tmp_path / "a.columns"


def test_columns_come_back_aligned_and_without_a_copy(path: Path) -> None:
    columns, metadata = open_columns(path)
    assert metadata == {"version": "1"}
    assert bytes(columns["letters"]) == b"hello" and columns["sizes"].tolist() == [1, 2**40, 3]
    assert columns["table"].tolist() == [[0, 1, 2], [3, 4, 5]] and columns["empty"].shape == (0,)
    assert columns["is_used"].tolist() == [False, True, False]
    for column in columns.values():
        assert column.flags.aligned and not column.flags.writeable and not column.flags.owndata


def test_safetensors_reads_the_file_and_its_files_are_read(path: Path, tmp_path: Path) -> None:
    columns, _ = open_columns(path)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"version": "1"}
        for name, column in columns.items():
            assert np.array_equal(file.get_tensor(name), column)
    save_file({"b": np.arange(7, dtype=np.float32)}, tmp_path / "b", {"who": "safetensors"})
    others, metadata = open_columns(tmp_path / "b")
    assert others["b"].tolist() == list(range(7)) and metadata == {"who": "safetensors"}


def test_an_interrupted_file_leaves_the_old_one_and_no_rest(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(RuntimeError), create_columns(path, SPECS, {}):
        raise RuntimeError("killed")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 5, 40, -3])
def test_a_file_that_is_cut_off_says_so(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match="no readable file of columns"):
        open_columns(path)
