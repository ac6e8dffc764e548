"""Small values from every rank to every rank, without pickle. All ranks call, in the same order."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data_tools import errors
from data_tools.errors import DataError, LecternError

PATIENCE = timedelta(days=2)  # measuring a large index takes longer than any collective may


def rank_and_world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's JSON value, by rank.

    Args:
        value: of this rank.
        group: of all ranks; None is the default group.
    """
    _, world_size = rank_and_world()
    if world_size == 1:
        return [json.loads(json.dumps(value))]
    device = "cpu" if dist.get_backend(group) == "gloo" else "cuda"
    content = json.dumps(value).encode("utf-8")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(bytes(part[: int(size)].cpu().numpy()))
        for part, size in zip(parts, sizes, strict=True)
    ]


def on_main(action: Callable[[], Any]) -> Any:
    """Run an action on rank 0 while the others wait; return its JSON result on every rank.

    Raises:
        LecternError: what the action raised, on every rank alike.
    """
    rank, world_size = rank_and_world()
    patient = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size > 1 else None
    result, failure = None, None
    if rank == 0:
        try:
            result = action()
        except LecternError as error:
            failure = [type(error).__name__, error.exit_code, str(error)]
    result, failure = gather_json([result, failure], patient)[0]
    if patient is not None:
        dist.destroy_process_group(patient)
    if failure:
        name, exit_code, message = failure
        stop: LecternError = getattr(errors, name, DataError)(message)
        stop.exit_code = exit_code
        raise stop
    return result
