"""Tokens per second, MFU and peak memory of both stages on the fixed documents.

The stages are timed in turn, repetition by repetition, so that a clock that drops with heat touches
both alike; the median counts. Where memory runs out the documents are halved, and the report says
how many were left.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.results import StepResult
from benchmarks.gpu.workload import make_batch, make_model, set_stage, work_of
from data_tools.stream.collate import Batch
from train.modeling.flops import ModelShape, mfu, model_flops, peak_flops
from train.modeling.packed import PackedModel

STAGES = (1, 2)
WARM_UP = 3
REPETITIONS = 10


def measure_speed(
    device: torch.device, *, tiny: bool, repetitions: int = REPETITIONS
) -> list[StepResult]:
    """Time training steps of both stages with AdamW."""
    model = make_model(device, tiny=tiny)
    numbers = list(range(len(make_batch(model, tiny=tiny).keys)))
    while numbers:
        _free_memory(model, device)
        batch = make_batch(model, tiny=tiny, numbers=numbers)
        results = _try_measure(model, batch, device, repetitions)
        if results is not None:
            return results
        numbers = numbers[: len(numbers) // 2]
    return [StepResult("speed", "skipped", "one document does not fit into memory")]


def _try_measure(
    model: PackedModel, batch: Batch, device: torch.device, repetitions: int
) -> list[StepResult] | None:
    """Return the results, or None if memory ran out (the caller then holds none of the tensors)."""
    try:
        return _measure(model, batch, device, repetitions)
    except torch.OutOfMemoryError:
        return None


def _free_memory(model: PackedModel, device: torch.device) -> None:
    model.model.zero_grad()
    gc.collect()  # an engine of an earlier step holds itself in a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(
    model: PackedModel, batch: Batch, device: torch.device, repetitions: int
) -> list[StepResult]:
    on_device = batch.to(device)
    peaks = {stage: _peak_memory(model, on_device, device, stage) for stage in STAGES}
    optimizers = {stage: _optimizer(model, stage, device) for stage in STAGES}
    seconds: dict[int, list[float]] = {stage: [] for stage in STAGES}
    for repetition in range(WARM_UP + repetitions):
        for stage in STAGES:
            set_stage(model, stage)
            elapsed = _timed(partial(_step, model, on_device, optimizers[stage]), device)
            if repetition >= WARM_UP:
                seconds[stage].append(elapsed)
    return [_result(model, batch, device, s, seconds[s], peaks[s]) for s in STAGES]


def _result(
    model: PackedModel,
    batch: Batch,
    device: torch.device,
    stage: int,
    seconds: list[float],
    peak_memory: int | None,
) -> StepResult:
    median = statistics.median(seconds)
    flops = model_flops(ModelShape.of(model.model.config), work_of(batch), stage=stage)
    values: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "documents": len(batch.keys),
        "tokens": batch.num_tokens,
        "step s": median,
        "fastest s": min(seconds),
        "slowest s": max(seconds),
        "tokens/s": batch.num_tokens / median,
        "model TFLOP": flops / 1e12,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name)
    values["MFU"] = "skipped, peak unknown" if peak is None else mfu(flops, median, peak)
    if peak_memory is not None:
        values["peak memory GiB"] = peak_memory / 2**30
    return StepResult(f"speed: stage {stage}", "measured", values=values)


def _peak_memory(model: PackedModel, batch: Batch, device: torch.device, stage: int) -> int | None:
    """Return the peak of a step's allocated bytes, weights and optimizer state included."""
    optimizer = _optimizer(model, stage, device)
    set_stage(model, stage)
    _step(model, batch, optimizer)  # creates the optimizer's state
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    _step(model, batch, optimizer)
    return torch.cuda.max_memory_allocated(device)


def _optimizer(model: PackedModel, stage: int, device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(set_stage(model, stage), lr=1e-5, fused=device.type == "cuda")


def _step(model: PackedModel, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    (model(batch).weighted_sum / batch.weight_sum).backward()
    optimizer.step()
    optimizer.zero_grad()


def _timed(function: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a function takes, work queued on the GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
