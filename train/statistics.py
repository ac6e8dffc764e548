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
from train.checkpoint.zero_state import is_partitioned
from train.modeling.loss import LossOutput
from train.modeling.names import module_group
from train.ranks import Ranks

ON_DEVICE = ("weighted", "nll", "correct")
ON_HOST = ("weights", "labels", "tokens", "padding", "documents")


class StepStatistics:
    """Sums over the micro-steps since the last log line; nothing is read from the device before."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self.norms: dict[str, float] = {}
        self._reset()

    def add(self, batch: Batch, output: LossOutput) -> None:
        """Take in a micro-step."""
        self._host["weights"] += batch.weight_sum
        self._host["tokens"] += batch.num_tokens
        self._host["padding"] += batch.num_pad_tokens
        self._host["documents"] += len(batch.keys)
        if batch.weight_sum == 0:
            return
        self._host["labels"] += len(batch.targets)
        values = (output.weighted_sum.detach(), output.token_nll.sum(), output.is_correct.sum())
        self._sums += torch.stack([value.double() for value in values])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time that the loop waits for data."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of an evaluation or a save out of the speed."""
        start = time.perf_counter()
        yield
        self._start_s += time.perf_counter() - start

    def collect(self, engine: Any) -> dict[str, float]:
        """Return the values since the last call, over all ranks (a collective), and start anew."""
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        host = [self._host[name] for name in ON_HOST]
        sums = torch.cat([self._sums, torch.tensor(host, dtype=torch.float64, device=self._device)])
        wait = torch.tensor(self._waited_s / elapsed_s, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        dist.all_reduce(wait, op=dist.ReduceOp.MAX)  # the others wait for the slowest
        total = dict(zip(ON_DEVICE + ON_HOST, sums.tolist(), strict=True))
        values = {
            "train/loss": total["weighted"] / max(total["weights"], 1),
            "train/nll": total["nll"] / max(total["labels"], 1),
            "train/token_accuracy": total["correct"] / max(total["labels"], 1),
            "speed/tokens_per_s": total["tokens"] / elapsed_s,
            "speed/documents_per_s": total["documents"] / elapsed_s,
            "speed/data_wait_share": float(wait),
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
        self._sums = torch.zeros(len(ON_DEVICE), dtype=torch.float64, device=self._device)
        self._host = dict.fromkeys(ON_HOST, 0.0)
        self._waited_s = 0.0
        self._start_s = time.perf_counter()


def gradient_norms(engine: Any) -> dict[str, float]:
    """Return the gradient norm of each part of the model, between backward and step.

    A collective: every rank adds up the squares of its slices. Nothing under ZeRO-1 and 2, which
    reduce gradients inside the step.
    """
    if not is_partitioned(engine):
        return {}
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
