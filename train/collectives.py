"""Small values from every rank to every rank, without pickle. All ranks call, in the same order."""

import json
from typing import Any

import torch
import torch.distributed as dist


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
