"""Load a checkpoint into a ZeRO engine of any world size; each rank reads its own ranges."""

import logging
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import CheckpointError
from train.checkpoint import zero_state
from train.checkpoint.agree import together
from train.checkpoint.manifest import (
    Manifest,
    check_shards,
    list_checkpoints,
    read_manifest,
)
from train.checkpoint.shards import KINDS, SliceReader
from train.checkpoint.weights import other_base
from train.collectives import gather_json, rank_and_world

logger = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None; a collective of all ranks.

    Every file is read and its checksum compared, each by one rank. Those that are not whole are
    told, and an older one is taken.
    """
    rank, world_size = rank_and_world()
    names = gather_json([path.name for _, path in list_checkpoints(folder)])[0]
    for name in reversed(names):
        problems = _problems(folder / name, rank, world_size)
        found = [text for part in gather_json(problems) for text in part]
        if not found:
            return folder / name
        if rank == 0:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            logger.warning(
                "%s is not usable, trying an older one: %s%s",
                folder / name,
                "; ".join(dict.fromkeys(found[:3])),
                more,
            )
    return None


def _problems(checkpoint: Path, rank: int, world_size: int) -> list[str]:
    try:
        return check_shards(checkpoint, read_manifest(checkpoint).shards[rank::world_size])
    except CheckpointError as error:
        return [str(error)]


def load_checkpoint(
    engine: Any, checkpoint: Path, *, base: dict[str, Any] | None = None, is_checked: bool = False
) -> dict[str, Any]:
    """Restore weights, optimizer and counters of a fresh engine; a collective of all ranks.

    Every file's checksum is verified first, each by one rank. Frozen parameters are left as the
    engine has them (the model loads them from its base). The random state of torch is restored
    when the world size is the same.

    Args:
        engine: fresh, of any ZeRO stage and world size.
        checkpoint: its folder.
        base: where the engine's frozen weights come from; must be what the checkpoint says.
        is_checked: the files have been verified (`newest_checkpoint`).

    Returns:
        The `state` that was given to `save_checkpoint`.

    Raises:
        CheckpointError: on every rank, if a file is damaged or the model is another one.
    """
    rank, world_size = rank_and_world()
    doing = f"Loading {checkpoint}"

    def check() -> Manifest:
        manifest = read_manifest(checkpoint)
        problems = differences(manifest.parameters, zero_state.describe_parameters(engine))
        saved, wanted = group_names(manifest.groups), group_names(engine.optimizer.param_groups)
        if saved != wanted:
            problems.append(f"its parameter groups are {saved}, those of this run {wanted}")
        problems += other_base(manifest, base)
        if not is_checked:
            problems += check_shards(checkpoint, manifest.shards[rank::world_size])
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError("; ".join(problems[:5]) + more)
        return manifest

    manifest = together(check, doing)
    with zero_state.restoring(engine):
        together(lambda: _restore(engine, SliceReader(checkpoint, manifest), manifest), doing)
    return manifest.state


def group_names(groups: list[dict[str, Any]]) -> list[str]:
    """Return the names of the optimizer's parameter groups; their numbers where unnamed."""
    return [str(group.get("name", number)) for number, group in enumerate(groups)]


def differences(saved: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> list[str]:
    """Return in words how the parameters of a checkpoint differ from those of the model."""
    found = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    found += [f"{name} is unknown to this model" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        have, want = saved[name], wanted[name]
        if have["shape"] != want["shape"]:
            found.append(f"{name} has shape {have['shape']}, this model {want['shape']}")
        if have["trainable"] != want["trainable"]:
            words = {True: "trained", False: "frozen"}
            found.append(
                f"{name} was {words[have['trainable']]}, here it is {words[want['trainable']]} "
                "(another stage or adapter?)"
            )
    return found


def _restore(engine: Any, reader: SliceReader, manifest: Manifest) -> None:
    rank, world_size = rank_and_world()
    zero_state.ensure_optimizer_state(engine)
    for part in zero_state.local_parts(engine):
        for kind in KINDS:
            key, target = f"{kind}|{part.name}", part.values(kind)
            if part.is_live and target.device.type == "cpu":
                reader.read_into(key, part.start, target)
            else:
                part.assign(kind, reader.read(key, part.start, part.end))
        part.refresh()
    zero_state.set_optimizer_steps(engine, manifest.optimizer_steps)
    zero_state.set_group_settings(engine, manifest.groups)
    for counter, value in manifest.counters.items():
        setattr(engine, counter, value)
    if world_size == manifest.world_size:
        _restore_random_state(reader, manifest.shards[rank].file)


def _restore_random_state(reader: SliceReader, file: str) -> None:
    torch.set_rng_state(reader.read_whole(file, "rng|cpu"))
    if torch.cuda.is_available() and "rng|cuda" in reader:
        torch.cuda.set_rng_state(reader.read_whole(file, "rng|cuda"))
