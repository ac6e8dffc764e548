"""Weight files of a Hugging Face folder: written by several processes, each file once, and checked.

A file that is finished has a record beside it (tensor -> sha256 of its bytes), so that a command
that was interrupted goes on with the next one. The records go when the folder is complete.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from data_tools.errors import CheckpointError
from data_tools.jobs import run_jobs
from train.checkpoint.files import (
    BLOCK_BYTES,
    DTYPE_NAMES,
    TensorFile,
    bytes_of,
    write_safetensors,
)
from train.checkpoint.manifest import write_text
from train.checkpoint.weights import INDEX_FILE, file_names, plan_files

RECORD = ".digests.json"


class Weights(Protocol):
    """Every weight of a model under its hub name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return hub name -> shape, in the order in which they are written."""

    def blocks(self, hub: str) -> Iterator[torch.Tensor]:
        """Yield a weight in flat blocks in order."""


class WeightOrigin(Protocol):
    """Plain values from which any process can open the weights."""

    def __hash__(self) -> int:
        """Return a hash: a process opens each origin once."""

    def open(self) -> Weights:
        """Open the files."""


@dataclass(frozen=True)
class _Job:
    """One weight file to be written."""

    path: Path
    names: tuple[str, ...]
    origin: WeightOrigin
    dtype: torch.dtype


def write_weights(
    folder: Path, origin: WeightOrigin, dtype: torch.dtype, max_bytes: int, workers: int = 1
) -> dict[str, dict[str, str]]:
    """Write the weight files (and their index, if there are several) of a Hugging Face folder.

    Args:
        folder: to write to; files that an earlier try has finished are kept.
        origin: of the weights.
        dtype: of all of them.
        max_bytes: of a file.
        workers: processes.

    Returns:
        File name -> hub name -> sha256 of the tensor's bytes.
    """
    shapes = origin.open().shapes()
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files = plan_files(sizes, max_bytes)
    names = file_names(files)
    jobs = [
        _Job(folder / name, tuple(tensors), origin, dtype)
        for name, tensors in zip(names, files, strict=True)
        if not (folder / f"{name}{RECORD}").is_file()
    ]
    for _ in run_jobs(_write_file, jobs, workers, "writing weights"):
        pass
    if len(files) > 1:
        weight_map = {
            tensor: name for name, part in zip(names, files, strict=True) for tensor in part
        }
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return {
        name: json.loads((folder / f"{name}{RECORD}").read_text(encoding="utf-8")) for name in names
    }


def check_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    digests: dict[str, dict[str, str]],
    workers: int = 1,
) -> None:
    """Read the weight files back: names, shapes, dtype and every byte of every tensor.

    Raises:
        CheckpointError: naming the file, the tensor and what differs.
    """
    found: dict[str, tuple[int, ...]] = {}
    jobs = [(folder / file, dtype, expected) for file, expected in digests.items()]
    for part in run_jobs(_check_file, jobs, workers, "checking weights"):
        found |= part
    if found != shapes:
        differing = sorted(n for n in found.keys() | shapes if found.get(n) != shapes.get(n))
        raise CheckpointError(f"{folder}: names or shapes differ, for example {differing[:3]}.")
    for file in digests:
        (folder / f"{file}{RECORD}").unlink()


@functools.lru_cache(maxsize=1)
def _opened(origin: WeightOrigin) -> Weights:
    """Return the weights of an origin; a process opens them once for all its files."""
    return origin.open()


def _write_file(job: _Job) -> str:
    weights = _opened(job.origin)
    shapes = weights.shapes()
    digests: dict[str, str] = {}

    def blocks() -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(1) as beside:  # hashes a block while it is written
            for name in job.names:
                digest = hashlib.sha256()
                for block in weights.blocks(name):
                    converted = block.to(job.dtype)
                    hashing = beside.submit(digest.update, bytes_of(converted))
                    yield converted
                    hashing.result()  # before the block's memory is used again
                digests[name] = digest.hexdigest()

    layout = {name: (job.dtype, shapes[name]) for name in job.names}
    temporary = job.path.with_name(f"{job.path.name}.tmp")
    write_safetensors(temporary, layout, blocks(), metadata={"format": "pt"})
    temporary.rename(job.path)
    write_text(job.path.with_name(f"{job.path.name}{RECORD}"), json.dumps(digests))
    return job.path.name


def _check_file(job: tuple[Path, torch.dtype, dict[str, str]]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a file whose tensors have the expected digests."""
    path, dtype, expected = job
    file = TensorFile(path)
    beside = ThreadPoolExecutor(1)  # hashes a block while the next one is read
    for name, entry in file.entries.items():
        if entry.dtype != dtype:
            raise CheckpointError(f"{path}: {name} is {DTYPE_NAMES[entry.dtype]}.")
        digest = hashlib.sha256()
        numel, step = math.prod(entry.shape), BLOCK_BYTES // dtype.itemsize
        hashing = None
        for start in range(0, numel, step):
            part = file.read(name, start, min(numel, start + step))
            if hashing is not None:
                hashing.result()
            hashing = beside.submit(digest.update, bytes_of(part))
        if hashing is not None:
            hashing.result()
        if digest.hexdigest() != expected.get(name):
            raise CheckpointError(f"{path}: what was read back of {name} is not what was written.")
    beside.shutdown()
    return {name: entry.shape for name, entry in file.entries.items()}
