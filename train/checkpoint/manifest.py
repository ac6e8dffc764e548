"""The manifest of a checkpoint: what it holds, whether it is whole, and which one is the newest.

checkpoints/
  latest                       a hint for people; programs scan
  step-00001200/               exists only when complete
    manifest.json
    shard-00000-of-00016.safetensors ...
  .tmp-*                       left behind by an interrupted save; ignored
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import CheckpointError
from train.checkpoint.files import BLOCK_BYTES

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST_FILE = "manifest.json"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Shard:
    """One file: its size, its CRC-32, and per key [shape of the whole tensor, start, end]."""

    file: str
    size: int
    crc32: int
    table: dict[str, tuple[list[int], int, int]]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done.
        world_size: ranks that wrote it, one shard each.
        shards: the files, by rank.
        groups: hyper-parameters of each parameter group of the optimizer.
        optimizer_steps: the optimizer's own step count, per parameter group.
        counters: the engine's counters.
        state: what the trainer handed in.
        parameters: name in memory -> {"shape", "trainable"}, in the model's order.
        base: where the frozen weights come from.
        extra: anything else the trainer wants on record.
        versions: of the libraries that wrote it.
    """

    step: int
    world_size: int
    shards: list[Shard]
    groups: list[dict[str, Any]]
    optimizer_steps: list[int]
    counters: dict[str, int]
    state: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    base: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def step_folder_name(step: int) -> str:
    """Return the folder name of a step, e.g. "step-00001200"."""
    return f"step-{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and fsync `folder/manifest.json`, with a digest of itself.

    Raises:
        TypeError: if `state`, `base` or `extra` is not JSON.
    """
    # through JSON once, so that the digest is of what a reader will see
    body = json.loads(json.dumps({"version": VERSION, **asdict(manifest)}))
    entries = {**body, "sha256": _digest(body)}.items()
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries)
    write_text(folder / MANIFEST_FILE, "{\n" + lines + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Write and fsync a small UTF-8 file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, damaged or of another version.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest, version = body.pop("sha256"), body.get("version")
        if version != VERSION:
            raise CheckpointError(f"{path}: version {version}, this program reads {VERSION}.")
        if digest != _digest(body):
            raise CheckpointError(f"{path}: its content does not match its own digest (damaged).")
        del body["version"]
        shards = [Shard(**shard) for shard in body.pop("shards")]
        return Manifest(shards=shards, **body)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: this is not a whole checkpoint.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}).") from error


def check_shards(checkpoint: Path, shards: Iterable[Shard]) -> list[str]:
    """Return the problems of these shards (missing, size, checksum), in words."""
    found = []
    for shard in shards:
        path = checkpoint / shard.file
        try:
            size = path.stat().st_size
            if size != shard.size:
                found.append(f"{path}: {size} bytes, expected {shard.size} (cut off?)")
            elif _crc32(path) != shard.crc32:
                found.append(f"{path}: its CRC-32 differs from the manifest's (damaged)")
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} cannot be read ({error})")
    return found


def verify(checkpoint: Path) -> list[str]:
    """Return every problem of a checkpoint in words; an empty list if it is whole.

    Reads every byte, several files at a time.
    """
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        parts = pool.map(lambda shard: check_shards(checkpoint, [shard]), manifest.shards)
        return [problem for part in parts for problem in part]


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint of a folder, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    matches = [(_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_valid(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None; warn about each that does not."""
    for _, path in reversed(list_checkpoints(folder)):
        problems = verify(path)
        if not problems:
            return path
        logger.warning("%s is not usable, trying an older one: %s", path, "; ".join(problems))
    return None


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """Return the checkpoint of a step (default: the newest valid one).

    Raises:
        CheckpointError: if there is none, or the one of that step is not whole.
    """
    steps = dict(list_checkpoints(folder))
    if step is None:
        newest = newest_valid(folder)
        if newest is not None:
            return newest
        how_many = f"none of {len(steps)} is whole" if steps else "there is none"
        raise CheckpointError(f"{folder}: expected a checkpoint (step-*), but {how_many}.")
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are: {known}.")
    problems = verify(steps[step])
    if problems:
        raise CheckpointError("; ".join(problems) + ". Choose another step (--step N).")
    return steps[step]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
