"""A tiny ZeRO-3 engine for tests, and its whole state as plain tensors."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from tests.harness import FOUR_ZERO_SETTINGS
from tests.train.tiny import tiny_inputs, tiny_model
from train.checkpoint import CheckpointSaver, SaveSettings
from train.checkpoint.manifest import step_folder_name

FROZEN = "model.language_model.norm.weight"


class Wrapper(nn.Module):
    """The least that a checkpoint needs of the trainer's module: the attribute `model`."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the next-token loss over all positions, plus the two small layers if any."""
        pixels = inputs["pixel_values"].to(self.dtype)
        logits = self.model(**{**inputs, "pixel_values": pixels}, use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1].float(), inputs["input_ids"][0, 1:])
        if hasattr(self.model, "extra"):
            loss = loss + self.model.extra(self.model.gate(pixels[:1, :1])).float().sum()
        return loss


def extended_model(seed: int = 0) -> nn.Module:
    """Return the tiny model with a 1-element and a 3-element tensor: less than a slice a rank."""
    model = tiny_model(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.gate = nn.Linear(1, 1, bias=False)
        model.extra = nn.Linear(1, 3, bias=False)
    return model


def build_engine(
    model: nn.Module,
    dtype: str = "fp32",
    zero: dict[str, Any] | None = None,
    lr: float = 1e-2,
    stage: int = 3,
) -> Any:
    """Return an engine with two parameter groups (vision with decay, the rest without)."""
    groups: list[dict[str, Any]] = [
        {"name": "vision", "params": [], "lr": lr, "weight_decay": 0.1},
        {"name": "rest", "params": [], "lr": lr / 5, "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["visual." not in name]["params"].append(parameter)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            **(FOUR_ZERO_SETTINGS if zero is None and stage == 3 else zero or {}),
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], foreach=False)
    wrapper = Wrapper(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    engine, *_ = deepspeed.initialize(model=wrapper, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, first_seed: int, steps: int) -> list[float]:
    """Make optimizer steps, each on inputs of its own seed (the same on all ranks)."""
    losses = []
    for seed in range(first_seed, first_seed + steps):
        loss = engine(tiny_inputs(seed))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save(
    engine: Any, folder: Path, step: int, state: dict[str, Any], keep_last: int = 2, **options: Any
) -> Path:
    """Save a checkpoint and wait until it is durable; a failure raises."""
    settings = SaveSettings(keep_last=keep_last, on_error="stop", **options)
    saver = CheckpointSaver(engine, folder, settings)
    try:
        saver.save(step, state)
    finally:
        saver.close()
    return folder / step_folder_name(step)


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """Return every weight as the forward sees it, every master and moment; a collective."""
    state = {}
    for name, p in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            state[f"weight|{name}"] = p.detach().clone()
        if p.requires_grad:
            state[f"fp32|{name}"] = safe_get_full_fp32_param(p).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}|{name}"] = safe_get_full_optimizer_state(p, moment).clone()
    return state
