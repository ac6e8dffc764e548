"""Load a checkpoint into a ZeRO engine of any world size; each rank reads its own ranges."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import CheckpointError
from train.checkpoint import zero_state
from train.checkpoint.agree import together
from train.checkpoint.files import BLOCK_BYTES, Crc32, TensorFile, bytes_of
from train.checkpoint.manifest import (
    Manifest,
    Shard,
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
        zero_state.ensure_optimizer_state(engine, will_be_filled=True)
        if not is_checked and not _is_own_shard(engine, manifest):
            problems += check_shards(checkpoint, manifest.shards[rank::world_size])
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError("; ".join(problems[:5]) + more)
        return manifest

    manifest = together(check, doing)
    with zero_state.restoring(engine):
        together(lambda: _restore(engine, checkpoint, manifest, is_checked), doing)
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


def _is_own_shard(engine: Any, manifest: Manifest) -> bool:
    """Tell whether one shard holds what this rank needs and nothing else."""
    rank, world_size = rank_and_world()
    if manifest.world_size != world_size:
        return False
    needed = {
        f"{kind}|{part.name}": (part.start, part.end)
        for part in zero_state.local_parts(engine)
        for kind in KINDS
    }
    table = manifest.shards[rank].table
    stored = {key: ends for key, (_, *ends) in table.items() if key.split("|")[0] in KINDS}
    return {key: tuple(ends) for key, ends in stored.items()} == needed


def _restore(engine: Any, checkpoint: Path, manifest: Manifest, is_checked: bool) -> None:
    rank, world_size = rank_and_world()
    parts = zero_state.local_parts(engine)
    reader = SliceReader(checkpoint, manifest)
    if not is_checked and _is_own_shard(engine, manifest):
        _read_shard(parts, checkpoint, manifest.shards[rank])
    else:
        for part in parts:
            for kind in KINDS:
                key, target = f"{kind}|{part.name}", _memory(part, kind)
                reader.read_into(key, part.start, target)
                _put(part, kind, target)
    for part in parts:
        part.refresh()
    zero_state.set_optimizer_steps(engine, manifest.optimizer_steps)
    zero_state.set_group_settings(engine, manifest.groups)
    for counter, value in manifest.counters.items():
        setattr(engine, counter, value)
    if world_size == manifest.world_size:
        _restore_random_state(reader, manifest.shards[rank].file)


def _read_shard(parts: list[zero_state.LocalPart], checkpoint: Path, shard: Shard) -> None:
    """Read a shard from its first byte to its last, its checksum taken on the way.

    Raises:
        CheckpointError: if it is damaged; the engine is then of no use.
    """
    wanted = {f"{kind}|{part.name}": (part, kind) for part in parts for kind in KINDS}
    crc = Crc32()
    file = TensorFile(checkpoint / shard.file, crc)
    for key, entry in file.entries.items():
        if key in wanted:
            part, kind = wanted[key]
            target = _memory(part, kind)
            for at in range(0, len(target), BLOCK_BYTES // 4):
                block = target[at : at + BLOCK_BYTES // 4]
                file.read_into(key, at, block)
                crc.update(bytes_of(block))
            _put(part, kind, target)
        elif math.prod(entry.shape):
            crc.update(bytes_of(file.read(key)))
    if crc.value != shard.crc32:
        raise CheckpointError(
            f"{checkpoint / shard.file}: its CRC-32 differs from the manifest's (damaged)"
        )


def _memory(part: zero_state.LocalPart, kind: str) -> torch.Tensor:
    """Return the engine's own memory of a slice where it lies on the host, else new memory."""
    values = part.values(kind)
    if part.is_live and values.device.type == "cpu":
        return values
    return torch.empty(part.end - part.start)


def _put(part: zero_state.LocalPart, kind: str, values: torch.Tensor) -> None:
    """Put a slice in its place, if it does not lie there."""
    if not (part.is_live and part.values(kind).data_ptr() == values.data_ptr()):
        part.assign(kind, values)


def _restore_random_state(reader: SliceReader, file: str) -> None:
    torch.set_rng_state(reader.read_whole(file, "rng|cpu"))
    if torch.cuda.is_available() and "rng|cuda" in reader:
        torch.cuda.set_rng_state(reader.read_whole(file, "rng|cuda"))
