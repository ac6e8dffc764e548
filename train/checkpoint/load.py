"""Load a checkpoint into a ZeRO-3 engine of any world size; each rank reads its own ranges."""

from pathlib import Path
from typing import Any

import torch

from data_tools.errors import CheckpointError
from train.checkpoint import zero_state
from train.checkpoint.agree import together
from train.checkpoint.manifest import Manifest, check_shards, read_manifest
from train.checkpoint.shards import KINDS, SliceReader
from train.collectives import rank_and_world


def load_checkpoint(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Restore weights, optimizer and counters of a fresh engine; a collective of all ranks.

    Every file's checksum is verified first, each by one rank. Frozen parameters are left as the
    engine has them (the model loads them from its base). The random state of torch is restored
    when the world size is the same.

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
        problems += check_shards(checkpoint, manifest.shards[rank::world_size])
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError("; ".join(problems[:5]) + more)
        return manifest

    manifest = together(check, doing)
    engine.optimizer.checkpoint_event_prologue()
    together(lambda: _restore(engine, SliceReader(checkpoint, manifest), manifest), doing)
    engine.optimizer.checkpoint_event_epilogue()  # gathers what DeepSpeed keeps whole
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
    for name, p in zero_state.named_parameters(engine).items():
        if p.requires_grad:
            start, end = zero_state.owned_range(p, world_size, rank)
            kinds = {kind: reader.read(f"{kind}|{name}", start, end) for kind in KINDS}
            zero_state.restore_parameter(p, kinds)
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
