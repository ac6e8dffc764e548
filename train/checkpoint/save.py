"""Save a checkpoint of a ZeRO-3 engine: one shard per rank, complete or not there at all."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import CheckpointError
from train.checkpoint import zero_state
from train.checkpoint.agree import together
from train.checkpoint.manifest import (
    Manifest,
    Shard,
    fsync_folder,
    list_checkpoints,
    step_folder_name,
    verify,
    write_manifest,
    write_text,
)
from train.checkpoint.shards import KINDS, Crc32, Layout, write_safetensors
from train.collectives import gather_json, rank_and_world

logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: Any,
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    keep_last: int,
    keep_step: int | None = None,
    base: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX`, then delete old ones; a collective of all ranks.

    Args:
        engine: a DeepSpeed ZeRO-3 engine between two steps; `engine.module.model` is the model.
        folder: the checkpoints of the stage, on a file system that all ranks share.
        step: optimizer steps done.
        state: JSON of the trainer; `load_checkpoint` returns it.
        keep_last: how many checkpoints up to this step remain; 0 keeps all.
        keep_step: a step that remains besides (the best one).
        base: where the frozen weights, which are not stored, come from.
        extra: further JSON for the record.

    Returns:
        The checkpoint. One of this step that is there already and whole is kept as it is.

    Raises:
        CheckpointError: on every rank, if one of them could not write; nothing is left behind.
    """
    rank, world_size = rank_and_world()
    final = folder / step_folder_name(step)
    doing = f"Saving {final}"
    name = gather_json(together(lambda: _prepare(final) if rank == 0 else None, doing))[0]
    if name is None:
        return final
    temporary = folder / name
    try:
        shard = together(lambda: _write_shard(engine, temporary, rank, world_size), doing)
        manifest = Manifest(
            step=step,
            world_size=world_size,
            shards=[Shard(**record) for record in gather_json(asdict(shard))],
            groups=zero_state.group_settings(engine),
            optimizer_steps=zero_state.optimizer_steps(engine),
            counters={name: int(getattr(engine, name)) for name in zero_state.COUNTERS},
            state=state,
            parameters=zero_state.describe_parameters(engine),
            base=base,
            extra=extra or {},
            versions={name: version(name) for name in ("torch", "deepspeed", "transformers")},
        )
        together(lambda: _commit(temporary, final, manifest) if rank == 0 else None, doing)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    together(lambda: _delete_old(folder, step, keep_last, keep_step) if rank == 0 else None, doing)
    return final


def _prepare(final: Path) -> str | None:
    """Return the name of a new temporary folder, or None if the checkpoint is there and whole."""
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if final.exists():
        problems = verify(final)
        if not problems:
            logger.warning("%s exists already and is whole: kept as it is", final)
            return None
        logger.warning("%s is replaced: %s", final, "; ".join(problems))
        _delete(final)
    temporary = folder / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary.name


def _write_shard(engine: Any, folder: Path, rank: int, world_size: int) -> Shard:
    """Write this rank's slices and random state."""
    zero_state.ensure_optimizer_state(engine)
    owned = {
        name: (p, *zero_state.owned_range(p, world_size, rank))
        for name, p in zero_state.named_parameters(engine).items()
        if p.requires_grad
    }
    random_states = {"rng|cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["rng|cuda"] = torch.cuda.get_rng_state()
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    table: dict[str, tuple[list[int], int, int]] = {}
    for kind in KINDS:
        for name, (p, start, end) in owned.items():
            layout[f"{kind}|{name}"] = (torch.float32, (end - start,))
            table[f"{kind}|{name}"] = (list(p.ds_shape), start, end)
    for key, value in random_states.items():
        layout[key] = (value.dtype, tuple(value.shape))
        table[key] = (list(value.shape), 0, value.numel())

    def tensors() -> Iterator[torch.Tensor]:
        for kind in KINDS:
            for p, start, end in owned.values():
                yield zero_state.local_tensor(p, kind, end - start)
        yield from random_states.values()

    return write_shard(folder, rank, world_size, layout, table, tensors())


def write_shard(
    folder: Path,
    rank: int,
    world_size: int,
    layout: Layout,
    table: dict[str, tuple[list[int], int, int]],
    tensors: Iterator[torch.Tensor],
) -> Shard:
    """Write the shard of one rank and return its entry of the manifest.

    Raises:
        CheckpointError: if the file cannot be written (disk full, quota, permissions).
    """
    path = folder / f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
    crc = Crc32()
    try:
        folder.mkdir(exist_ok=True)  # made by rank 0; another node may see it late
        size = write_safetensors(path, layout, tensors, crc)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}); free space on that file "
            "system or lower checkpoint.keep_last."
        ) from error
    return Shard(path.name, size, crc.value, table)


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    write_manifest(temporary, manifest)
    fsync_folder(temporary)
    temporary.rename(final)
    fsync_folder(final.parent)
    hint = final.parent / ".latest.tmp"
    write_text(hint, final.name + "\n")
    os.replace(hint, final.parent / "latest")
    fsync_folder(final.parent)


def _delete_old(folder: Path, step: int, keep_last: int, keep_step: int | None) -> None:
    """Delete what is older than the last `keep_last` up to `step`, the newest valid one.

    Later steps, from before a resume at an earlier one, are left alone.
    """
    if keep_last:
        until_now = [found for found in list_checkpoints(folder) if found[0] <= step]
        for number, path in until_now[:-keep_last]:
            if number != keep_step:
                _delete(path)


def _delete(checkpoint: Path) -> None:
    # renamed first: half a checkpoint must never be seen under its name
    doomed = checkpoint.with_name(f".tmp-del-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
