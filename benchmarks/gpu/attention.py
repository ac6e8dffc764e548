"""Is packed attention the same as attention document by document? Forward and backward.

Every kernel that training could use on this machine runs on packed inputs and is compared with SDPA
called once per document in float32. A bf16 kernel may differ from that as bf16 SDPA itself does:
its largest error must stay below `ERROR_FACTOR` times SDPA's own, the criterion of flash-attn's
own tests.
"""

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.results import StepResult
from train.kernel_checks import (
    Case,
    Kernel,
    flash_attention,
    sdpa_attention,
    varlen_attention,
)

ERROR_FACTOR = 2.0
ATOL_BF16 = 2e-3  # a quarter of a bf16 step at 1.0: where SDPA happens to be exact
ATOL_FP32 = 1e-4  # order of summation only

CASES = (
    Case("language model", 28, 4, 128, (343, 255, 233, 121, 217, 111, 14, 9), True),
    Case("vision windows", 16, 16, 80, (64,) * 20 + (32,) * 5 + (16, 8), False),
    Case("vision full", 16, 16, 80, (806, 386, 34, 24), False),
)
TINY_CASES = (
    Case("language model", 4, 2, 16, (7, 5, 1), True),
    Case("vision windows", 2, 2, 8, (16, 16, 8), False),
)


def check_attention(device: torch.device, *, tiny: bool) -> list[StepResult]:
    """Compare every packed kernel of this machine with SDPA, case by case."""
    cases = TINY_CASES if tiny else CASES
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    results = []
    for name, kernel in _kernels(device):
        if isinstance(kernel, str):
            results.append(StepResult(f"attention: {name}", "skipped", kernel))
            continue
        for case in cases:
            results.append(_compare(f"attention: {name}, {case.name}", kernel, case, device, dtype))
    return results


def _kernels(device: torch.device) -> Iterator[tuple[str, Kernel | str]]:
    """Yield (name, kernel), or (name, reason) for one that cannot run here."""
    if device.type == "cpu":
        has_transformers = importlib.util.find_spec("transformers") is not None
        reason = "transformers is not installed"
        yield "documents on a CPU", _documents if has_transformers else reason
        return
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    yield "torch varlen", varlen_attention if has_varlen else f"torch {torch.__version__} has none"
    has_flash = importlib.util.find_spec("flash_attn") is not None
    yield "flash-attn", flash_attention if has_flash else "flash-attn is not installed"


def _compare(
    name: str, kernel: Kernel, case: Case, device: torch.device, dtype: torch.dtype
) -> StepResult:
    """Compare output and gradients of one kernel with float32 SDPA per document."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    total = sum(case.lengths)
    shapes = [(total, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    inputs = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
    borders = torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32)

    def run(kernel: Kernel, dtype: torch.dtype) -> list[Tensor]:
        """Return the output and the gradients of query, key and value."""
        q, k, v = (tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs)
        output = kernel(q, k, v, borders, max(case.lengths), case.is_causal)
        return [output.detach(), *torch.autograd.grad(output, (q, k, v), upstream.to(dtype))]

    exact = run(sdpa_attention, torch.float32)
    plain = run(sdpa_attention, dtype)
    try:
        packed = run(kernel, dtype)
    except RuntimeError as error:  # a kernel that is there but not for this card or shape
        return StepResult(name, "failed", f"{type(error).__name__}: {error}".splitlines()[0])
    atol = ATOL_FP32 if dtype == torch.float32 else ATOL_BF16
    values, faults = {}, []
    for part, e, s, p in zip(("output", "dq", "dk", "dv"), exact, plain, packed, strict=True):
        worst, own = float((p.float() - e).abs().max()), float((s.float() - e).abs().max())
        values[f"{part} error"] = worst
        if not worst <= ERROR_FACTOR * own + atol:  # NaN fails too
            faults.append(f"{part}: {worst:.3g}, SDPA itself {own:.3g}")
    return StepResult(name, "failed" if faults else "passed", "; ".join(faults), values)


def _documents(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, causal: bool
) -> Tensor:
    """The project's own CPU path; its causal form is the only one (vision uses plain SDPA)."""
    from train.modeling.attention import document_attention

    if not causal:
        return sdpa_attention(query, key, value, borders, longest, causal)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))  # (1, heads, T, head_dim)
    return document_attention(torch.nn.Identity(), q, k, v, None, cu_seq_lens_q=borders)[0][0]
