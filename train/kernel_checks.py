"""Does this device compute what a CPU computes: a matrix product, and attention both ways.

Attention runs packed through every kernel that training could use here, and is compared, output and
gradients, with plain softmax attention document by document in float64 on the CPU.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest error over the largest value: sums of rounded products; a wrong kernel is off by about 1.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MATMUL_SIZE = {"cuda": 2048, "cpu": 256}
SEED = 0

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes of a comparison, documents of so many tokens packed into one row."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    is_causal: bool


CASES = {
    "cuda": (  # those of Qwen2.5-VL-7B
        Case("language model", 28, 4, 128, (343, 255, 111, 9), True),
        Case("vision windows", 16, 16, 80, (64, 64, 32, 16), False),
    ),
    "cpu": (Case("language model", 4, 2, 32, (33, 21, 1), True),),
}


def find_device(local_rank: int) -> torch.device:
    """Return the device of a rank, which becomes the current one.

    Raises:
        RuntimeError: if there are fewer GPUs than ranks on this node.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise RuntimeError(f"local rank {local_rank} has no GPU: this process sees {count}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a device is, and the versions that drive it."""
    about: dict[str, Any] = {"type": device.type, "torch": torch.__version__}
    if device.type == "cpu":
        return about | {"name": "CPU", "threads": torch.get_num_threads()}
    free, total = torch.cuda.mem_get_info(device)
    return about | {
        "name": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory_gb": round(total / 1e9, 1),
        "free_gb": round(free / 1e9, 1),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def check_kernels(device: torch.device) -> dict[str, dict[str, float]]:
    """Return kernel -> part -> largest error over the largest exact value, and the tolerance."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {f"matmul {dtype_name(t)}": _matmul_error(device, t) for t in {torch.float32, dtype}}
    for name, kernel in attention_kernels(device):
        errors = {"tolerance": TOLERANCES[dtype]}
        for case in CASES[device.type]:
            errors |= _attention_errors(kernel, case, device, dtype)
        found[name] = errors
    return found


def judge(kernels: dict[str, dict[str, float]]) -> str:
    """Return what is wrong with the errors of `check_kernels`; "" if nothing is."""
    faults = [
        f"{kernel}, {part}: off by {error:.2g} of the largest value, tolerance "
        f"{errors['tolerance']:g}"
        for kernel, errors in kernels.items()
        for part, error in errors.items()
        if part != "tolerance" and not error <= errors["tolerance"]  # NaN is wrong, too
    ]
    return "; ".join(faults)


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def _matmul_error(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(SEED)
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    product = multiply(a.to(device), b.to(device))
    # A stripe is enough: in float64 the whole product would take the CPU a while.
    exact = a[:64].double() @ b.double()
    return {"tolerance": TOLERANCES[dtype], "product": _error(product[:64], exact)}


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product, on the device of the factors."""
    return a @ b


def _attention_errors(
    kernel: Kernel, case: Case, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(SEED)
    total = sum(case.lengths)
    shapes = [(total, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    borders = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)

    def run(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Return the output and the gradients of query, key and value."""
        q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in inputs)
        output = kernel(q, k, v, borders.to(device), max(case.lengths), case.is_causal)
        gradients = torch.autograd.grad(output, (q, k, v), upstream.to(device, dtype))
        return [output.detach(), *gradients]

    exact = run(plain_attention, torch.device("cpu"), torch.float64)
    packed = run(kernel, device, dtype)
    parts = ("output", "dq", "dk", "dv")
    return {
        f"{case.name} {part}": _error(got, wanted)
        for part, got, wanted in zip(parts, packed, exact, strict=True)
    }


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.cpu().double() - exact).abs().max() / exact.abs().max())


def attention_kernels(device: torch.device) -> Iterator[tuple[str, Kernel]]:
    """Yield (name as in `model.attention`, kernel) of what can be imported here."""
    yield "sdpa", sdpa_attention
    if device.type == "cuda":
        if importlib.util.find_spec("flash_attn") is not None:
            yield "flash_attention_2", flash_attention
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            yield "varlen", varlen_attention


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, is_causal: bool
) -> Tensor:
    """Slow reference: softmax(q k / sqrt(d)) v, document by document.

    Args:
        query: (T, heads, head_dim).
        key: (T, kv heads, head_dim).
        value: likewise.
        borders: (D + 1,) int32, of the documents.
        longest: tokens of the longest one.
        is_causal: whether a token sees the later ones of its document.

    Returns:
        (T, heads, head_dim).
    """
    repeat = query.shape[1] // key.shape[1]
    marks, outputs = borders.tolist(), []
    for start, end in zip(marks, marks[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(repeat, dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (heads, tokens, tokens)
        if is_causal:
            hidden = torch.ones(end - start, end - start, device=q.device).triu(1).bool()
            scores = scores.masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, is_causal: bool
) -> Tensor:
    """Call torch's SDPA once a document; arguments as of `plain_attention`."""
    marks, outputs = borders.tolist(), []
    for start, end in zip(marks, marks[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, is_causal: bool
) -> Tensor:
    """Call flash-attn once for all documents; arguments as of `plain_attention`."""
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query, key, value, borders, borders, longest, longest, causal=is_causal
    )
    return output


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, is_causal: bool
) -> Tensor:
    """Call torch's own kernel once for all documents; arguments as of `plain_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    output: Any = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output
