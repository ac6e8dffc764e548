"""What a checkpoint takes out of a ZeRO-3 engine, and puts back.

This is the only place that touches names of DeepSpeed that are not public:
`optimizer.fp32_partitioned_groups_flat`, `optimizer.sub_group_to_group_id`,
`optimizer.optimizer.state` and `parameter.ds_tensor` (its own checkpoints rest on them too).
DeepSpeed is imported inside functions, so that reading a checkpoint does not need it.
"""

from typing import Any

import torch

from train.checkpoint.shards import partition

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def named_parameters(engine: Any) -> dict[str, Any]:
    """Return the model's parameters by name, with ZeRO's attributes; a tied one appears once."""
    return dict(engine.module.model.named_parameters())


def describe_parameters(engine: Any) -> dict[str, dict[str, Any]]:
    """Return name -> {"shape": of the whole tensor, "trainable"}, in the model's order."""
    return {
        name: {"shape": list(p.ds_shape), "trainable": bool(p.requires_grad)}
        for name, p in named_parameters(engine).items()
    }


def owned_range(p: Any, world_size: int, rank: int) -> tuple[int, int]:
    """Return the range of the flat parameter that this rank holds, without padding."""
    return partition(p.ds_numel, world_size, rank)


def local_tensor(p: Any, kind: str, length: int) -> torch.Tensor:
    """Return (length,) float32 on the CPU: this rank's slice of the master ("fp32") or a moment."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    if kind == "fp32":
        local = safe_get_local_fp32_param(p)
    else:
        local = safe_get_local_optimizer_state(p, kind)
    # the rest is padding, which is uninitialised memory
    return local.detach()[:length].float().cpu()


def restore_parameter(p: Any, kinds: dict[str, torch.Tensor]) -> None:
    """Set master, moments and low-precision slice of a trained parameter.

    `kinds` holds this rank's float32 slices without padding: "fp32", "exp_avg", "exp_avg_sq". Call
    between the optimizer's `checkpoint_event_prologue` and `checkpoint_event_epilogue`, else
    parameters that DeepSpeed keeps whole go on with their old values.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    for kind, values in kinds.items():
        padded = torch.zeros(p.ds_tensor.numel())
        padded[: len(values)] = values
        if kind == "fp32":
            safe_set_local_fp32_param(p, padded)
            p.ds_tensor.data.copy_(padded)
        else:
            safe_set_local_optimizer_state(p, padded, kind)


def flat_groups(engine: Any) -> list[tuple[int, torch.Tensor]]:
    """Return (index of the parameter group, flat master tensor) of each of ZeRO's sub-groups."""
    zero = engine.optimizer
    return [
        (zero.sub_group_to_group_id[index], flat)
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat)
    ]


def ensure_optimizer_state(engine: Any) -> None:
    """Create zero moments and step counts where the optimizer has not made a step yet."""
    optimizer = engine.optimizer.optimizer
    for group, flat in flat_groups(engine):
        state = optimizer.state[flat]
        if "step" not in state:
            # one tensor per sub-group: a shared one would be counted up once for each of them
            state["step"] = _step_count(optimizer, group, flat, 0)
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(flat, requires_grad=False)


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
