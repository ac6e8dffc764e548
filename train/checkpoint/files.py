"""Safetensors files, written with a digest and read by range, a few MiB at a time.

Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON, data). The
library's own functions hold whole tensors, force mode 0600, and do not fsync; these hold one block.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from data_tools.errors import CheckpointError

BLOCK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000  # of the format
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Digest(Protocol):
    """What takes the bytes of a file as they are written: `Crc32` or a hash of hashlib."""

    def update(self, data: Any, /) -> None:
        """Take the next bytes."""


class Crc32:
    """Running CRC-32 with the interface of hashlib."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: Any, /) -> None:
        """Take the next bytes."""
        self.value = zlib.crc32(data, self.value)


class Entry(NamedTuple):
    """Where a tensor lies in a file; offsets count from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """Reads ranges of the tensors of a safetensors file, without mapping or holding it.

    Args:
        path: of the file.
        digest: is given the bytes of the header.

    Attributes:
        path: of the file.
        entries: key -> where it lies.

    Raises:
        CheckpointError: if the file is missing, cut off or none of this format.
    """

    def __init__(self, path: Path, digest: Digest | None = None) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self.entries = self._read_header(digest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); was it deleted, or cut off?"
            ) from error

    def _read_header(self, digest: Digest | None) -> dict[str, Entry]:
        length = self._file.read(8)
        (size,) = struct.unpack("<Q", length)
        total = os.fstat(self._file.fileno()).st_size
        if size > min(total, MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {size} bytes")
        base = 8 + size
        text = self._file.read(size)
        if digest is not None:
            digest.update(length)
            digest.update(text)
        entries = {}
        for key, about in json.loads(text).items():
            if key != "__metadata__":
                start, end = (base + offset for offset in about["data_offsets"])
                entry = Entry(DTYPES[about["dtype"]], tuple(about["shape"]), start, end)
                if end > total or end - start != math.prod(entry.shape) * entry.dtype.itemsize:
                    raise ValueError(f"{key} ends behind the file")
                entries[key] = entry
        return entries

    def read(self, key: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Return elements [start, end) of a tensor in C order, flat, in its own dtype.

        Raises:
            CheckpointError: if the file is shorter than it was.
        """
        entry = self.entries[key]
        end = math.prod(entry.shape) if end is None else end
        out = torch.empty(end - start, dtype=entry.dtype)
        self.read_into(key, start, out)
        return out

    def read_into(self, key: str, start: int, out: torch.Tensor) -> None:
        """Fill a flat contiguous CPU tensor with the elements from `start` on (`read`)."""
        entry = self.entries[key]
        assert out.dtype == entry.dtype, f"{self.path}: {key} is {entry.dtype}"
        place = entry.start + start * entry.dtype.itemsize
        view = bytes_of(out)
        while len(view):
            count = os.preadv(self._file.fileno(), [view], place)
            if count == 0:
                raise CheckpointError(f"{self.path}: {key} ends early; the file was cut off")
            view, place = view[count:], place + count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_safetensors(
    path: Path,
    layout: Layout,
    blocks: Iterable[torch.Tensor],
    digest: Digest | None = None,
    metadata: dict[str, str] | None = None,
) -> int:
    """Write and fsync a safetensors file, block by block; return its size in bytes.

    Args:
        path: the new file; its mode follows the umask (safetensors' own writer forces 0600).
        layout: dtype and shape of each key.
        blocks: contiguous CPU tensors, produced while writing, that are the keys' data in order;
            a key may come in several blocks.
        digest: is given every byte of the file in order.
        metadata: the `__metadata__` entry of the header.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, (dtype, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        for part in (struct.pack("<Q", len(text)), text):
            _write_all(file, memoryview(part), digest)
        for block in blocks:
            data = bytes_of(block.detach())
            for at in range(0, len(data), BLOCK_BYTES):  # a large one would leave the cache
                _write_all(file, data[at : at + BLOCK_BYTES], digest)
        os.fsync(file.fileno())
        written = file.tell()
    assert written == 8 + len(text) + offset, f"{path}: {written} bytes written"
    return written


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _write_all(file: Any, data: memoryview, digest: Digest | None) -> None:
    if digest is not None:
        digest.update(data)
    while len(data):
        data = data[file.write(data) :]
