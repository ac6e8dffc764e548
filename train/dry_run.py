"""`--dry-run`: what a stage would do, from its configuration, its index and the model's shape."""

from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from train.config import Config
from train.data import describe, measure, open_data
from train.modeling.names import module_group
from train.ranks import find_ranks
from train.shards import Shards
from train.stages import estimate_steps, freeze

MASTER_AND_MOMENTS_BYTES = 12  # fp32 weight and AdamW's two moments, per trained parameter


def dry_run(config: Config, shards: Shards) -> None:
    """Print the plan: data, packs, steps, what trains and the memory of its state."""
    measure(config, shards)
    data = open_data(config, shards)
    print(f"stage {config.stage.number} -> {config.folder}")
    for line in describe(data):
        print(line)
    steps = estimate_steps(config, data.num_tokens, data.num_patches)
    print(f"steps: {steps} ({config.stage.epochs} epochs at most, see stage.max_steps)")
    for line in _describe_model(config, find_ranks().world_size):
        print(line)


def _describe_model(config: Config, world_size: int) -> list[str]:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(config.model.path))
    freeze(model, config.stage)
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
    if config.model.adapter is not None:
        lines.append(f"  (a LoRA adapter of rank {config.model.adapter.rank} trains instead)")
    width = 2 if config.parallel.precision == "bf16" else 4
    state = total * width + trained * MASTER_AND_MOMENTS_BYTES
    lines.append(
        f"state under ZeRO-3: {state / 1e9:.2f} GB in all, {state / world_size / 1e9:.2f} GB a "
        f"rank at world size {world_size}; activations come on top"
    )
    return [f"model {Path(config.model.path)}: {_millions(total)} parameters", *lines]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
