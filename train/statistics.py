"""What a step shows: loss, gradient norms by part of the model, speed, padding, waiting."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad

from data_tools.stream.collate import Batch
from train.config import Config
from train.modeling.loss import LossOutput
from train.modeling.names import module_group
from train.ranks import Ranks

FIELDS = ("weighted", "weights", "nll", "correct", "labels", "tokens", "padding", "documents")


class StepStatistics:
    """Sums over the micro-steps since the last log line; nothing is read from the device before."""

    def __init__(self, config: Config, ranks: Ranks, device: torch.device) -> None:
        self._config, self._ranks, self._device = config, ranks, device
        self.norms: dict[str, float] = {}
        self._reset()

    def add(self, batch: Batch, output: LossOutput) -> None:
        """Take in a micro-step."""
        labelled = len(batch.targets) if batch.weight_sum else 0
        host = (batch.weight_sum, labelled, batch.num_tokens, batch.num_pad_tokens, len(batch.keys))
        self._sums[0] += output.weighted_sum.detach().double()
        if labelled:
            self._sums[2] += output.token_nll.sum().double()
            self._sums[3] += output.is_correct.sum()
        for place, value in zip((1, 4, 5, 6, 7), host, strict=True):
            self._host[place] += value

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time that the loop waits for data."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def collect(self, engine: Any) -> dict[str, float]:
        """Return the values since the last call, over all ranks (a collective), and start anew."""
        sums = self._sums + torch.tensor(self._host, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        total = dict(zip(FIELDS, sums.tolist(), strict=True))
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        values = {
            "train/loss": total["weighted"] / max(total["weights"], 1),
            "train/nll": total["nll"] / max(total["labels"], 1),
            "train/token_accuracy": total["correct"] / max(total["labels"], 1),
            "speed/tokens_per_s": total["tokens"] / elapsed_s,
            "speed/documents_per_s": total["documents"] / elapsed_s,
            "speed/data_wait_share": self._waited_s / elapsed_s,
            "speed/padding_share": total["padding"] / max(total["tokens"] + total["padding"], 1),
            "gradient/skipped_steps": float(engine.skipped_steps),
        }
        norm = engine.get_global_grad_norm()
        values["gradient/norm"] = float(norm) if norm is not None else math.nan
        values |= {f"gradient/norm_{part}": norm for part, norm in self.norms.items()}
        for group in engine.optimizer.param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
        self._reset()
        return values

    def line(self, step: int, total_steps: int, values: dict[str, float]) -> str:
        """Return one log line."""
        lr = max(value for name, value in values.items() if name.startswith("lr/"))
        return (
            f"step {step}/{total_steps}: loss {values['train/loss']:.4f}, "
            f"gradient norm {values['gradient/norm']:.2f}, lr {lr:.2e}, "
            f"{values['speed/tokens_per_s']:.0f} tokens/s, "
            f"data wait {values['speed/data_wait_share']:.0%}, "
            f"epoch {values['train/epoch']:.2f}"
        )

    def _reset(self) -> None:
        self._sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=self._device)
        self._host = [0.0] * len(FIELDS)
        self._waited_s = 0.0
        self._start_s = time.perf_counter()


def gradient_norms(engine: Any) -> dict[str, float]:
    """Return the gradient norm of each part of the model, between backward and step.

    A collective: every rank adds up the squares of its slices.
    """
    squares: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = safe_get_local_grad(parameter)
        valid = max(0, min(len(gradient), parameter.ds_numel - dist.get_rank() * len(gradient)))
        part = module_group(name)
        square = gradient[:valid].double().square().sum()
        squares[part] = squares.get(part, torch.zeros_like(square)) + square
    parts = sorted(squares)
    sums = torch.stack([squares[part] for part in parts])
    dist.all_reduce(sums)
    return dict(zip(parts, sums.sqrt().tolist(), strict=True))
