"""A rank's part of a checkpoint, copied to host memory between two steps.

The copy is what training waits for; everything else happens behind its back. The memory is taken
once (pinned beside a GPU) and used again by the next save: 12 bytes per parameter that trains and
lies on this rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.checkpoint import zero_state
from train.checkpoint.files import Layout
from train.checkpoint.shards import KINDS

Table = dict[str, tuple[list[int], int, int]]


@dataclass(frozen=True)
class Snapshot:
    """What a shard will hold.

    Attributes:
        layout: dtype and shape of each tensor.
        table: key -> [shape of the whole tensor, start, end) of the slice.
        tensors: on the host, in the order of `layout`.
    """

    layout: Layout
    table: Table
    tensors: list[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class HostCopy:
    """Takes snapshots into memory of its own; one at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, engine: Any) -> Snapshot:
        """Copy master weights, moments and random state of this rank."""
        zero_state.ensure_optimizer_state(engine)
        parts = zero_state.local_parts(engine)
        numel = len(KINDS) * sum(part.end - part.start for part in parts)
        if len(self._memory) < numel:
            self._memory = torch.empty(numel, pin_memory=torch.cuda.is_available())
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        table: Table = {}
        tensors: list[torch.Tensor] = []
        place = 0
        for kind in KINDS:
            for part in parts:
                key, size = f"{kind}|{part.name}", part.end - part.start
                target = self._memory[place : place + size]
                target.copy_(part.values(kind), non_blocking=True)
                layout[key], table[key] = (
                    (torch.float32, (size,)),
                    (part.shape, part.start, part.end),
                )
                tensors.append(target)
                place += size
        for key, value in _random_states():
            layout[key] = (value.dtype, tuple(value.shape))
            table[key] = (list(value.shape), 0, value.numel())
            tensors.append(value)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Snapshot(layout, table, tensors)


def _random_states() -> Iterator[tuple[str, torch.Tensor]]:
    yield "rng|cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "rng|cuda", torch.cuda.get_rng_state()
