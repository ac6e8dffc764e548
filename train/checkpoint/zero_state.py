"""What a checkpoint takes out of a ZeRO engine, and puts back.

This is the only place that touches names of DeepSpeed that are not public. ZeRO-3:
`optimizer.fp32_partitioned_groups_flat`, `optimizer.sub_group_to_group_id`,
`optimizer.optimizer.state`, `parameter.ds_tensor`. ZeRO-1 and 2: `parameter._hp_mapping`,
`optimizer.optimizer.state`, `optimizer.update_lp_params`,
`optimizer._lazy_init_hp_params_optimizer_state`. DeepSpeed's own checkpoints rest on all
of them too. DeepSpeed is imported inside functions, so that reading a checkpoint does not need it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from train.checkpoint.shards import KINDS, partition
from train.collectives import rank_and_world

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


@dataclass(frozen=True)
class LocalPart:
    """The range of a trained parameter that lies on this rank.

    Attributes:
        name: of the parameter.
        shape: of the whole of it.
        start, end: the flat range.
        values: kind -> (end - start,) float32, the master ("fp32") or a moment, on its device.
        is_live: those are the engine's own memory, not a copy of it.
        assign: puts such values in their place.
        refresh: lets the forward compute with a changed master.
    """

    name: str
    shape: list[int]
    start: int
    end: int
    values: Callable[[str], torch.Tensor]
    is_live: bool
    assign: Callable[[str, torch.Tensor], None]
    refresh: Callable[[], None]


def named_parameters(engine: Any) -> dict[str, Any]:
    """Return the model's parameters by name, with ZeRO's attributes; a tied one appears once."""
    return dict(engine.module.model.named_parameters())


def describe_parameters(engine: Any) -> dict[str, dict[str, Any]]:
    """Return name -> {"shape": of the whole tensor, "trainable"}, in the model's order."""
    return {
        name: {"shape": list(getattr(p, "ds_shape", p.shape)), "trainable": bool(p.requires_grad)}
        for name, p in named_parameters(engine).items()
    }


def is_partitioned(engine: Any) -> bool:
    """Return whether the parameters themselves are partitioned (ZeRO-3)."""
    return bool(engine.zero_optimization_partition_weights())


def local_parts(engine: Any) -> list[LocalPart]:
    """Return what lies on this rank of every parameter that trains.

    Call `ensure_optimizer_state` before.
    """
    trained = [(name, p) for name, p in named_parameters(engine).items() if p.requires_grad]
    if is_partitioned(engine):
        is_live = not engine.zero_offload_optimizer()
        return [_partitioned_part(name, p, is_live) for name, p in trained]
    found = [_fragment_part(name, p) for name, p in trained]
    return [part for part in found if part is not None]


@contextmanager
def restoring(engine: Any) -> Iterator[None]:
    """Let `LocalPart.assign` be called inside; afterwards the model has the new values."""
    if not is_partitioned(engine):
        yield
        engine.optimizer.update_lp_params()
        return
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()  # gathers what DeepSpeed keeps whole


def flat_groups(engine: Any) -> list[tuple[int, torch.Tensor]]:
    """Return (index of the parameter group, flat master tensor) of each of ZeRO's groups."""
    zero = engine.optimizer
    if is_partitioned(engine):
        flat = zero.fp32_partitioned_groups_flat
        return [(zero.sub_group_to_group_id[index], part) for index, part in enumerate(flat)]
    return [
        (index, part)
        for index, group in enumerate(zero.optimizer.param_groups)
        for part in group["params"]
    ]


def ensure_optimizer_state(engine: Any, *, will_be_filled: bool = False) -> None:
    """Create zero moments and step counts where the optimizer has not made a step yet.

    Args:
        engine: fresh, or one that has trained.
        will_be_filled: every part is assigned and refreshed next, so ZeRO-3's moments need no
            zeros, which would touch all of their memory once more.
    """
    optimizer = engine.optimizer.optimizer
    is_left_empty = will_be_filled and is_partitioned(engine)
    make = torch.empty_like if is_left_empty else torch.zeros_like
    for group, flat in flat_groups(engine):
        state = optimizer.state[flat]
        if "step" not in state:
            # one tensor per sub-group: a shared one would be counted up once for each of them
            state["step"] = _step_count(optimizer, group, flat, 0)
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = make(flat, requires_grad=False)
    if not is_partitioned(engine):
        # DeepSpeed links moments to parameters after the first step of the first group, when those
        # of the other groups do not exist yet: once more, now that all of them do.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_steps(engine: Any) -> list[int]:
    """Return the optimizer's step count of each parameter group."""
    optimizer = engine.optimizer.optimizer
    steps = [0] * len(optimizer.param_groups)
    for group, flat in flat_groups(engine):
        steps[group] = int(optimizer.state[flat]["step"])
    return steps


def set_optimizer_steps(engine: Any, steps: list[int]) -> None:
    """Set the optimizer's step count of each parameter group."""
    optimizer = engine.optimizer.optimizer
    for group, flat in flat_groups(engine):
        optimizer.state[flat]["step"] = _step_count(optimizer, group, flat, steps[group])


def group_settings(engine: Any) -> list[dict[str, Any]]:
    """Return the hyper-parameters of each parameter group (JSON: tuples become lists)."""
    return [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]


def set_group_settings(engine: Any, groups: list[dict[str, Any]]) -> None:
    """Set the hyper-parameters of each parameter group."""
    for target, source in zip(engine.optimizer.param_groups, groups, strict=True):
        for key, value in source.items():
            target[key] = tuple(value) if isinstance(value, list) else value


def _partitioned_part(name: str, p: Any, is_live: bool) -> LocalPart:
    """Return the part of a ZeRO-3 parameter: an equal share, the last ranks less or none."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    rank, world_size = rank_and_world()
    start, end = partition(p.ds_numel, world_size, rank)

    def values(kind: str) -> torch.Tensor:
        master = kind == KINDS[0]
        local = safe_get_local_fp32_param(p) if master else safe_get_local_optimizer_state(p, kind)
        return local.detach()[: end - start]  # the rest is padding, which is uninitialised memory

    def assign(kind: str, new: torch.Tensor) -> None:
        padded = torch.zeros(p.ds_tensor.numel())
        padded[: len(new)] = new
        if kind == KINDS[0]:
            safe_set_local_fp32_param(p, padded)
        else:
            safe_set_local_optimizer_state(p, padded, kind)

    def refresh() -> None:
        p.ds_tensor.data[: end - start].copy_(values(KINDS[0]))
        if is_live:
            for moment in MOMENTS:  # padding of moments that were made for it
                safe_get_local_optimizer_state(p, moment).detach()[end - start :].zero_()

    return LocalPart(name, list(p.ds_shape), start, end, values, is_live, assign, refresh)


def _fragment_part(name: str, p: Any) -> LocalPart | None:
    """Return the part of a ZeRO-1 or 2 parameter: a fragment of any place, or nothing."""
    if p._hp_mapping is None:
        return None
    mapping = p._hp_mapping
    start = int(mapping.lp_fragment_address.start)

    def values(kind: str) -> torch.Tensor:
        if kind == KINDS[0]:
            fragment = mapping.get_hp_fragment()
        else:
            fragment = mapping.get_optim_state_fragment(kind)
        return fragment.detach().reshape(-1)

    def assign(kind: str, new: torch.Tensor) -> None:
        values(kind).copy_(new)

    end = start + int(mapping.lp_fragment_address.numel)
    # `restoring` refreshes all of them at once.
    return LocalPart(name, list(p.shape), start, end, values, True, assign, lambda: None)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _step_count(optimizer: Any, group: int, flat: torch.Tensor, step: int) -> Any:
    # torch counts in a float32 tensor (on the device if fused), DeepSpeed's Adams in an integer
    if not type(optimizer).__module__.startswith("torch."):
        return step
    settings = optimizer.param_groups[group]
    on_device = settings.get("fused") or settings.get("capturable")
    return torch.tensor(float(step), device=flat.device if on_device else "cpu")
