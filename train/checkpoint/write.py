"""Write a checkpoint behind the back of training: shards, then the manifest, then its name.

Each rank's thread writes the rank's shard into a folder that no reader looks at and leaves a note
beside it; rank 0's thread waits for all notes, writes the manifest and gives the folder its name.
Threads meet in the file system alone: a collective in a thread could wait for one of training.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data_tools.errors import CheckpointError, LaunchError
from train.checkpoint.files import BLOCK_BYTES, Crc32, Layout, write_safetensors
from train.checkpoint.manifest import (
    Manifest,
    Shard,
    fsync_folder,
    write_manifest,
    write_text,
)
from train.checkpoint.mirror import Mirror
from train.checkpoint.retention import Retention, delete_surplus
from train.checkpoint.snapshot import Snapshot, Table

logger = logging.getLogger(__name__)

POLL_S = 0.02


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes.

    Attributes:
        temporary: folder on the shared file system while it is incomplete.
        final: its name when it is whole.
        local: folder of this node that the shard is written to first; None: straight to the
            shared one.
        mirror: a second copy behind a URL; None: there is none.
        retention: what is deleted afterwards.
        timeout_s: how long rank 0 waits for the notes of the others.
        check_owner: raises where another start has taken the run over.
    """

    temporary: Path
    final: Path
    local: Path | None
    mirror: Mirror | None
    retention: Retention
    timeout_s: float
    check_owner: Callable[[], None] = lambda: None


def write_rank(
    snapshot: Snapshot,
    manifest: Manifest,
    rank: int,
    destination: Destination,
    is_copied: threading.Event,
    before: "Future[str | None] | None" = None,
) -> str | None:
    """Write this rank's part of a checkpoint, and on rank 0 finish the whole.

    Args:
        snapshot: of this rank.
        manifest: without its shards.
        rank: of this process.
        destination: where to.
        is_copied: is set as soon as the snapshot's memory may be used again.
        before: an earlier save, which becomes visible first.

    Returns:
        Why a checkpoint that is whole has no second copy; None if it has, or none is wanted.

    Raises:
        CheckpointError: if this rank could not write, or on rank 0 any of them.
    """
    folder = destination.temporary
    try:
        shard = _write_shard(snapshot, manifest.world_size, rank, destination, is_copied)
        _leave_note(folder, rank, asdict(shard))
    except Exception as error:  # whatever it is: rank 0 waits for this rank's note
        _leave_note(folder, rank, {"error": str(error)})
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(str(error)) from error
    finally:
        is_copied.set()
    if rank == 0:
        if before is not None:
            wait([before])
        _finish(manifest, destination)
    problem = None
    if destination.mirror is not None:
        problem = _mirror(destination.mirror, destination, shard, rank, manifest)
    if rank == 0:
        for note in destination.final.glob("*.note"):
            note.unlink()
    return problem


def nearby_prefix(checkpoints: Path) -> str:
    """Return how the folders begin that a run makes on a node's own disk, which runs may share."""
    mark = hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()[:12]
    return f"lectern-{mark}-"


def _write_shard(
    snapshot: Snapshot,
    world_size: int,
    rank: int,
    destination: Destination,
    is_copied: threading.Event,
) -> Shard:
    layout, table, tensors = snapshot.layout, snapshot.table, snapshot.tensors
    temporary = destination.temporary
    if destination.local is None:
        return write_shard(temporary, rank, world_size, layout, table, tensors)
    # A folder of this rank alone: the ranks of a node share its disk.
    nearby = destination.local / f"{nearby_prefix(temporary.parent)}{temporary.name}-{rank}"
    try:
        nearby.mkdir(parents=True, exist_ok=True)
        shard = write_shard(nearby, rank, world_size, layout, table, tensors)
        is_copied.set()
        _copy(nearby / shard.file, temporary / shard.file, shard.crc32)
    finally:
        shutil.rmtree(nearby, ignore_errors=True)
    return shard


def write_shard(
    folder: Path,
    rank: int,
    world_size: int,
    layout: Layout,
    table: Table,
    tensors: Iterable[torch.Tensor],
) -> Shard:
    """Write the shard of one rank and return its entry of the manifest.

    Raises:
        CheckpointError: if the file cannot be written (disk full, quota, permissions).
    """
    path = folder / f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
    crc = Crc32()
    try:
        size = write_safetensors(path, layout, tensors, crc)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}); free space on that file "
            "system or lower checkpoint.keep_last."
        ) from error
    return Shard(path.name, size, crc.value, table)


def _copy(source: Path, target: Path, crc32: int) -> None:
    """Copy and fsync a file, its checksum compared on the way."""
    crc = Crc32()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while block := reader.read(BLOCK_BYTES):
            crc.update(block)
            view = memoryview(block)
            while len(view):
                view = view[writer.write(view) :]
        os.fsync(writer.fileno())
    if crc.value != crc32:
        raise CheckpointError(f"{source}: the local disk gives back other bytes than were written")


def _finish(manifest: Manifest, destination: Destination) -> None:
    """Wait for every rank's shard, then make the checkpoint visible and delete old ones."""
    folder = destination.temporary
    try:
        notes = _wait_for_notes(folder, manifest.world_size, destination.timeout_s)
        shards = [Shard(**note) for note in notes]
        destination.check_owner()
        commit(folder, destination.final, replace(manifest, shards=shards))
    except (CheckpointError, LaunchError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(str(error)) from error
    delete_surplus(destination.final.parent, destination.retention, manifest.step)


def _mirror(
    mirror: Mirror, destination: Destination, shard: Shard, rank: int, manifest: Manifest
) -> str | None:
    """Copy this rank's shard behind the URL, on rank 0 finish the copy; return what went wrong."""
    folder, final = destination.temporary, destination.final
    try:
        mirror.put_shard([folder / shard.file, final / shard.file], final.name)
        _leave_note(folder, rank, {}, kind="mirrored")
        if rank == 0:
            _wait_for_notes(final, manifest.world_size, destination.timeout_s, kind="mirrored")
            mirror.finish(final, destination.retention, manifest.step)
    except Exception as error:  # each storage client has errors of its own
        _leave_note(folder, rank, {"error": str(error)}, kind="mirrored")
        return f"{final} has no copy at {mirror.url}: {error}"
    return None


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and give a folder with all its shards the name that readers look for."""
    write_manifest(temporary, manifest)
    fsync_folder(temporary)
    temporary.rename(final)
    fsync_folder(final.parent)
    hint = final.parent / ".latest.tmp"
    write_text(hint, final.name + "\n")
    os.replace(hint, final.parent / "latest")
    fsync_folder(final.parent)


def _leave_note(folder: Path, rank: int, content: dict, kind: str = "written") -> None:
    """Leave a file that appears in one piece; the folder may have its final name by now."""
    for place in (folder, _final_of(folder)):
        hidden = place / f".{kind}-{rank}.tmp"
        try:
            write_text(hidden, json.dumps(content))
            os.replace(hidden, place / f"{kind}-{rank}.note")
            return
        except OSError as error:
            problem = error
    logger.warning("rank %d cannot leave a note in %s (%s)", rank, folder, problem)


def _final_of(temporary: Path) -> Path:
    """Return the final name of `.tmp-step-XXXXXXXX-nonce`."""
    return temporary.with_name(temporary.name.removeprefix(".tmp-").rsplit("-", 1)[0])


def _wait_for_notes(
    folder: Path, world_size: int, timeout_s: float, kind: str = "written"
) -> list[dict]:
    """Return the notes of all ranks.

    Raises:
        CheckpointError: if a rank failed, or does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    notes: dict[int, dict] = {}
    while True:
        for rank in set(range(world_size)) - notes.keys():
            path = folder / f"{kind}-{rank}.note"
            if path.exists():
                notes[rank] = json.loads(path.read_text(encoding="utf-8"))
                if "error" in notes[rank]:
                    raise CheckpointError(f"rank {rank}: {notes[rank]['error']}")
        if len(notes) == world_size:
            return [notes[rank] for rank in range(world_size)]
        if time.monotonic() > deadline:
            missing = sorted(set(range(world_size)) - notes.keys())
            raise CheckpointError(
                f"{folder}: nothing heard from the ranks {missing} for {timeout_s:.0f} s "
                "(checkpoint.timeout_s); is the file system shared and alive?"
            )
        time.sleep(POLL_S)
