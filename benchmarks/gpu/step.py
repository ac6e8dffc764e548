"""Does a packed training step ever ask the device for a number? And is its loss the right one?

Forward and backward run with every synchronising CUDA call turned into an error; what the engine or
optimizer adds is counted apart. On a CPU the same steps run and nothing is counted.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.results import StepResult
from benchmarks.gpu.workload import make_batch, make_model, set_stage
from data_tools.stream.collate import Batch
from train.modeling.packed import PackedModel

SMALL_DOCUMENTS = (3, 5, 6, 7)  # receipt, form, two line crops: fit into any card
RTOL_LOSS = {"cpu": 1e-4, "cuda": 1e-2}  # float32; bf16: 8 bits of mantissa


def check_step(device: torch.device, *, tiny: bool) -> list[StepResult]:
    """Check the loss of a pack, the host syncs of forward and backward, and the engine's."""
    model = make_model(device, tiny=tiny)
    numbers = range(4) if tiny else SMALL_DOCUMENTS
    batch = make_batch(model, tiny=tiny, numbers=numbers)
    singles = [make_batch(model, tiny=tiny, numbers=[number]) for number in numbers]
    results = [_check_loss(model, batch, singles, device)]
    for stage in (1, 2):
        results.append(_check_syncs(model, batch.to(device), device, stage))
    results.append(_count_adamw(model, batch.to(device), device))
    if device.type == "cpu":
        results.append(StepResult("step: DeepSpeed", "skipped", "counts CUDA syncs only"))
    elif importlib.util.find_spec("deepspeed") is None:
        results.append(StepResult("step: DeepSpeed", "skipped", "deepspeed is not installed"))
    else:
        results.append(_count_deepspeed(model, batch.to(device)))
    return results


def _check_loss(
    model: PackedModel, whole: Batch, singles: list[Batch], device: torch.device
) -> StepResult:
    """Compare the loss of a pack with the sum of the losses of its documents, each by itself."""
    with torch.no_grad():
        packed = float(model(whole.to(device)).weighted_sum)
        alone = sum(float(model(single.to(device)).weighted_sum) for single in singles)
    difference = abs(packed - alone) / alone
    values = {"relative difference": difference}
    is_equal = difference <= RTOL_LOSS[device.type]  # NaN is not
    reason = "" if is_equal else f"packed {packed:.6g}, alone {alone:.6g}"
    name = "step: loss of a pack is that of its documents"
    return StepResult(name, "passed" if is_equal else "failed", reason, values)


def _check_syncs(model: PackedModel, batch: Batch, device: torch.device, stage: int) -> StepResult:
    name = f"step: no host sync in forward and backward, stage {stage}"
    set_stage(model, stage)
    _forward_backward(model, batch)  # warm-up: lazy set-up may ask
    set_stage(model, stage)
    try:
        with _syncs_are_errors(device):
            _forward_backward(model, batch)
    except RuntimeError as error:
        return StepResult(name, "failed", str(error).splitlines()[0])
    gradients = [p.grad for p in model.model.parameters() if p.requires_grad]
    missing = sum(gradient is None for gradient in gradients)
    if missing:
        return StepResult(name, "failed", f"{missing} parameters got no gradient")
    return StepResult(name, "passed", values={"trained tensors": len(gradients)})


def _count_adamw(model: PackedModel, batch: Batch, device: torch.device) -> StepResult:
    """Count the syncs of clipping and of the optimizer step, with torch's own AdamW."""
    parameters = set_stage(model, 2)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")

    def step() -> None:
        _forward_backward(model, batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return StepResult("step: AdamW", "measured", values={"host syncs": _count_syncs(device, step)})


def _count_deepspeed(model: PackedModel, batch: Batch) -> StepResult:
    """Count the syncs of a step of a ZeRO-3 engine on one GPU."""
    import deepspeed

    device = torch.device("cuda")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    deepspeed.init_distributed()
    parameters = set_stage(model, 2)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    held: dict[str, Any] = {}

    def forward() -> None:
        held["loss"] = engine(batch).weighted_sum / batch.weight_sum

    def backward() -> None:
        engine.backward(held.pop("loss"), scale_wrt_gas=False)

    for _ in range(2):  # the first step traces the order of modules
        forward()
        backward()
        engine.step()
    counts = {
        f"host syncs in {part.__name__}": _count_syncs(device, part)
        for part in (forward, backward, engine.step)
    }
    torch.distributed.destroy_process_group()
    return StepResult("step: DeepSpeed ZeRO-3", "measured", values=counts)


def _forward_backward(model: PackedModel, batch: Batch) -> None:
    (model(batch).weighted_sum / batch.weight_sum).backward()


@contextlib.contextmanager
def _syncs_are_errors(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _count_syncs(device: torch.device, function: Callable[[], Any]) -> int | str:
    """Run a function and return how often it made the host wait for the GPU."""
    if device.type != "cuda":
        function()
        return "not counted on a CPU"
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA" in str(warning.message) for warning in caught)
