"""All ranks go on, or all ranks stop with the same message."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from data_tools.errors import CheckpointError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank; a collective."""
    _, world_size = rank_and_world()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T], doing: str) -> T:
    """Run `action`, which holds no collective, on every rank; return this rank's result.

    Raises:
        CheckpointError: on every rank, naming the ranks on which `action` failed and why.
    """
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # handed on to every rank: one that stops alone leaves a hang
        logger.exception("%s failed", doing)
        problem = f"{type(error).__name__}: {error}"
    failed = [f"rank {r}: {text}" for r, text in enumerate(gather(problem)) if text is not None]
    if failed:
        more = f" (and {len(failed) - 3} more ranks)" if len(failed) > 3 else ""
        raise CheckpointError(f"{doing} failed. {'; '.join(failed[:3])}{more}")
    return result  # type: ignore[return-value]
