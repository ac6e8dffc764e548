"""`--dry-run`: what a stage would do, from its configuration, its index and the model's shape."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from train.config import Config
from train.data import describe, open_data, prepare
from train.engine import prepare_parameters
from train.modeling.names import module_group
from train.ranks import find_ranks
from train.shards import Shards
from train.stages import estimate_steps

OPTIMIZER_BYTES = 12  # float32 weight and AdamW's two moments, per trained parameter
GRADIENT_BYTES = 4  # accumulated in float32


def dry_run(config: Config, shards: Shards) -> None:
    """Print the plan: data, packs, steps, what trains and the memory of its state."""
    ranks = find_ranks()
    if not ranks.is_main:
        return
    print(f"stage {config.stage.number} -> {config.folder}")
    with tempfile.TemporaryDirectory(prefix="lectern-") as name:  # the run folder stays as it is
        trial = config.model_copy(update={"run": config.run.model_copy(update={"dir": name})})
        prepare(trial, shards)
        data = open_data(trial)
        for line in describe(data, ranks.world_size):
            print(line)
        steps = estimate_steps(config, data.num_samples, data.samples_per_pack())
    print(f"steps: {steps} ({config.stage.epochs} epochs at most, see stage.max_steps)")
    for line in _describe_model(config, ranks.world_size):
        print(line)


def _describe_model(config: Config, world_size: int) -> list[str]:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(config.model.path))
    prepare_parameters(model, config)
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        count = parts.setdefault(module_group(name), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    total, trained = (sum(counts) for counts in zip(*parts.values(), strict=True))
    lines = [
        f"  {part}: {_millions(size)} parameters, {_millions(active)} trained"
        for part, (size, active) in parts.items()
    ]
    a_rank = state_bytes(config, total, trained, world_size)
    lines.append(
        f"state under ZeRO-{config.parallel.zero_stage}: {a_rank / 1e9:.2f} GB a rank at world "
        f"size {world_size}; activations come on top"
    )
    return [f"model {Path(config.model.path)}: {_millions(total)} parameters", *lines]


def state_bytes(config: Config, total: int, trained: int, world_size: int) -> float:
    """Return the bytes of weights, gradients and optimizer state on one rank.

    Args:
        config: precision and ZeRO stage; ZeRO-1 partitions the optimizer, 2 gradients as well, 3
            weights as well (Rajbhandari et al. 2020).
        total: parameters.
        trained: of them.
        world_size: ranks.
    """
    stage = config.parallel.zero_stage
    weights = total * (2 if config.parallel.precision == "bf16" else 4)
    optimizer, gradients = trained * OPTIMIZER_BYTES, trained * GRADIENT_BYTES
    return (
        weights / (world_size if stage == 3 else 1)
        + gradients / (world_size if stage >= 2 else 1)
        + optimizer / world_size
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
