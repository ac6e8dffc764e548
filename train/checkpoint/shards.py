"""Shards: safetensors files of flat slices, written with a checksum and read by range.

ZeRO-3 gives each rank one flat slice of each parameter: ceil(n / world) elements, the last ranks
less or none. A shard holds the slices of one rank under keys "kind|parameter name", without the
padding. Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON, data).
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from data_tools.errors import CheckpointError

if TYPE_CHECKING:
    from train.checkpoint.manifest import Manifest

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}

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


def partition(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the half-open range of a flat parameter that ZeRO-3 gives to `rank`."""
    share = -(-numel // world_size)
    return min(numel, rank * share), min(numel, (rank + 1) * share)


def write_safetensors(
    path: Path,
    layout: Layout,
    tensors: Iterable[torch.Tensor],
    digest: Digest,
    metadata: dict[str, str] | None = None,
) -> int:
    """Write and fsync a safetensors file, one tensor at a time; return its size in bytes.

    Args:
        path: the new file; its mode follows the umask (safetensors' own writer forces 0600).
        layout: dtype and shape of each key, in the order of `tensors`.
        tensors: contiguous CPU tensors, produced while writing.
        digest: is given every byte of the file in order.
        metadata: the `__metadata__` entry of the header.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, (dtype, shape) in layout.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        for part in (struct.pack("<Q", len(text)), text):
            digest.update(part)
            file.write(part)
        data: Any
        for tensor, (dtype, _) in zip(tensors, layout.values(), strict=True):
            assert tensor.dtype == dtype, f"{path}: {tensor.dtype} given, {dtype} announced"
            data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = file.tell()
    assert written == 8 + len(text) + offset, f"{path}: {written} bytes written"
    return written


class SliceReader:
    """Reads any range of any flat tensor of a checkpoint, whatever its world size was."""

    def __init__(self, folder: Path, manifest: "Manifest") -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for shard in manifest.shards:
            for key, (_, start, end) in shard.table.items():
                self._pieces.setdefault(key, []).append((start, end, shard.file))

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def read(self, key: str, start: int, end: int) -> torch.Tensor:
        """Return elements [start, end) of a stored float tensor, (end - start,) float32.

        Raises:
            CheckpointError: if the shards do not cover the range.
        """
        out = torch.empty(end - start, dtype=torch.float32)
        filled = 0
        for first, last, file in self._pieces.get(key, ()):
            low, high = max(start, first), min(end, last)
            if low < high:
                piece = self._open(file).get_slice(key)[low - first : high - first]
                out[low - start : high - start] = piece
                filled += high - low
        if filled != end - start:
            raise CheckpointError(
                f"{self.folder}: the shards hold {filled} of {end - start} elements of {key} "
                f"[{start}, {end}); use another step (--step N)."
            )
        return out

    def read_whole(self, file: str, key: str) -> torch.Tensor:
        """Return the tensor `key` as one shard holds it."""
        tensor: torch.Tensor = self._open(file).get_tensor(key)
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}); was it deleted by a training that goes on?"
                ) from error
        return self._files[file]
