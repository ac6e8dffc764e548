"""Shards: safetensors files of flat slices, read by range at any world size.

Each rank owns a flat range of each parameter; ZeRO-3 gives ceil(n / world) elements, the last ranks
less or none, ZeRO-1 and 2 a range that may begin anywhere. A shard holds the slices of one rank
under keys "kind|parameter name", without padding; the manifest says which range each slice is.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_tools.errors import CheckpointError
from train.checkpoint.files import TensorFile

if TYPE_CHECKING:
    from train.checkpoint.manifest import Manifest

KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def partition(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the half-open range of a flat parameter that ZeRO-3 gives to `rank`."""
    share = -(-numel // world_size)
    return min(numel, rank * share), min(numel, (rank + 1) * share)


class SliceReader:
    """Reads any range of any flat tensor of a checkpoint, whatever its world size was."""

    def __init__(self, folder: Path, manifest: "Manifest") -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for shard in manifest.shards:
            for key, (_, start, end) in shard.table.items():
                if start < end:
                    self._pieces.setdefault(key, []).append((start, end, shard.file))

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def read(self, key: str, start: int, end: int) -> torch.Tensor:
        """Return elements [start, end) of a stored tensor, (end - start,) float32.

        Raises:
            CheckpointError: if the shards do not cover the range.
        """
        out = torch.empty(end - start, dtype=torch.float32)
        self.read_into(key, start, out)
        return out

    def read_into(self, key: str, start: int, out: torch.Tensor) -> None:
        """Fill a flat contiguous float32 CPU tensor with the elements from `start` on (`read`)."""
        end, filled = start + len(out), 0
        for first, last, file in self._pieces.get(key, ()):
            low, high = max(start, first), min(end, last)
            if low < high:
                target = out[low - start : high - start]
                self._open(file).read_into(key, low - first, target)
                filled += high - low
        if filled != len(out):
            raise CheckpointError(
                f"{self.folder}: the shards hold {filled} of {len(out)} elements of {key} "
                f"[{start}, {end}); use another step (--step N)."
            )

    def read_whole(self, file: str, key: str) -> torch.Tensor:
        """Return the tensor `key` as one shard holds it."""
        opened = self._open(file)
        return opened.read(key).view(opened.entries[key].shape)

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.folder / file)
        return self._files[file]
