"""The weights that a stage starts from: every rank reads its own slices, and nothing else.

ZeRO-3 gives a rank a flat range of each parameter, which is one contiguous range of bytes of a
safetensors file. So no rank reads the whole model, none sends it to the others, and none holds more
than its share and the tensor that is being made.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import ConfigError
from train.checkpoint.shards import partition
from train.checkpoint.weights import HEAD, BaseWeights
from train.collectives import rank_and_world
from train.modeling.build import build_empty_model

M_MMAP_THRESHOLD = -3  # of malloc.h
LOADING_THRESHOLD_BYTES = 1 << 20
USUAL_THRESHOLD_BYTES = 32 << 20  # the most that glibc learns on 64-bit machines


def load_model(folder: str, *, precision: str, attention: dict[str, str]) -> Any:
    """Return the model of a Hugging Face folder, on the CPU or partitioned over the ranks.

    Args:
        folder: with config.json and safetensors.
        precision: "bf16" or "fp32".
        attention: implementation of `text_config` and `vision_config`.

    Raises:
        ConfigError: if the folder holds no weights, or weights of another model.
    """
    if not list(Path(folder).glob("*.safetensors")):
        raise ConfigError(
            f"model.path: {folder} holds no *.safetensors; download the model there, "
            "or set model.init=scratch"
        )
    with _freed_memory_returned():
        model = build_empty_model(
            folder, precision=precision, attention=attention, device=torch.device("cpu")
        )
        load_weights(model, Path(folder))
    return model


def load_weights(model: Any, folder: Path) -> None:
    """Fill a model with the weights of a Hugging Face folder, in place.

    Args:
        model: a Qwen2.5-VL, partitioned by ZeRO-3 or whole; its dtype decides.
        folder: with safetensors under the hub's names.

    Raises:
        ConfigError: if the folder holds other names or shapes than the model.
    """
    base = BaseWeights(folder)
    parameters = dict(model.named_parameters())
    _check(parameters, base, folder, is_tied=HEAD not in parameters)
    rank, world_size = rank_and_world()
    with torch.no_grad():
        for name, p in parameters.items():
            if hasattr(p, "ds_tensor"):
                start, end = partition(p.ds_numel, world_size, rank)
                p.ds_tensor[: end - start].copy_(base.read(name, start, end))
                p.ds_tensor[end - start :].zero_()  # padding, which is uninitialised memory
            else:
                p.view(-1).copy_(base.read(name))


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Let glibc give the memory of freed tensors back at once, as far as it is glibc.

    Parameters are made whole and cut to their slice one after the other. glibc learns from that to
    keep freed blocks of up to 32 MiB, in pieces that nothing fits into: two thirds of a rank's
    memory after loading. Afterwards the threshold is what it would have learned by itself.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LOADING_THRESHOLD_BYTES)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, USUAL_THRESHOLD_BYTES)
        libc.malloc_trim(0)


def _check(parameters: dict[str, Any], base: BaseWeights, folder: Path, is_tied: bool) -> None:
    missing = sorted(parameters.keys() - base.names)
    unknown = sorted(base.names - parameters.keys() - ({HEAD} if is_tied else set()))
    other_shape = [
        f"{name} {list(base.shape(name))} instead of {list(shape)}"
        for name, p in parameters.items()
        if name in base.names and base.shape(name) != (shape := _shape(p))
    ]
    problems = [
        f"{count} {what}, as {found[0]}"
        for what, found in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", other_shape),
        )
        if (count := len(found))
    ]
    if problems:
        raise ConfigError(
            f"model.path: the weights in {folder} do not fit its config.json: {'; '.join(problems)}"
        )


def _shape(p: Any) -> tuple[int, ...]:
    shape = tuple(getattr(p, "ds_shape", p.shape))
    assert math.prod(shape) == getattr(p, "ds_numel", p.numel())
    return shape
