"""Named numpy columns in one file, memory-mapped: opened in a moment, shared by a node's processes.

The layout is that of safetensors (8 bytes of header size, a JSON header, the data), so any
safetensors library reads the file. Columns are stored by falling item size, the data from a
multiple of 64 bytes on, so that every column is aligned and needs no copy.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataError

ALIGNMENT = 64
_NAMES = {
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float32": "F32", "float64": "F64",
}  # fmt: skip
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}

Spec = tuple[np.dtype | str, tuple[int, ...]]


@contextmanager
def create_columns(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> Iterator[dict[str, np.ndarray]]:
    """Write a file of columns; it appears under its name when the block ends without an error.

    Args:
        path: of the file; it replaces one that is there.
        specs: name -> (dtype, shape).
        metadata: texts to go with it.

    Yields:
        name -> writable memory-mapped array, zeros at first.
    """
    order = sorted(specs, key=lambda name: (-np.dtype(specs[name][0]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = np.dtype(specs[name][0]), specs[name][1]
        start, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {
            "dtype": _NAMES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        mapped = np.memmap(temporary, np.uint8, "r+")
        yield _views(np.asarray(mapped), header, 8 + len(text))
        mapped.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_columns(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Open a file of columns.

    Args:
        path: of a local file.

    Returns:
        name -> read-only memory-mapped array, and the metadata.

    Raises:
        DataError: if the file is none of columns, or cut off.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > os.fstat(file.fileno()).st_size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(size))
        views = _views(np.asarray(np.memmap(path, np.uint8, "r")), header, 8 + size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no readable file of columns ({error}); delete it") from error
    return views, header.get("__metadata__", {})


def _views(buffer: np.ndarray, header: Mapping[str, Any], base: int) -> dict[str, np.ndarray]:
    """Return the columns of a (bytes,) uint8 buffer; ValueError where it is too short for one."""
    views = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (base + offset for offset in entry["data_offsets"])
        views[name] = buffer[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return views
