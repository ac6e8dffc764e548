"""Which samples make which pack of which step: the same on every rank, blind to ranks and workers.

The plan is a pure function of (config, index, DataState). Packs are filled by exact subset sums
over a window of 64 waiting candidates, oldest first, within two budgets: tokens (text and visual)
and vision patches.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools.errors import DataError

WINDOW = 64
STATE_VERSION = 1


class PlannedSample(NamedTuple):
    """A sample with the question that it is asked in this epoch, and what that costs."""

    source: int
    draw: int
    sample_id: int
    epoch: int
    template: int
    tokens: int
    patches: int


Pack = tuple[PlannedSample, ...]


class DrawableSource(Protocol):
    """An endless stream of samples, addressed by draw number: draw = epoch * size + position."""

    weight: float  # of interleaving: how densely its samples lie in the plan while it lasts

    def __len__(self) -> int:
        """Return the samples of an epoch."""

    def draw(self, source: int, number: int) -> PlannedSample:
        """Return the sample of a draw."""


@dataclass(frozen=True)
class DataState:
    """What fully determines every later batch; JSON of under 4 KB.

    Attributes:
        fingerprint: of index, tokenizer, recipe and image settings.
        step: the next step.
        cursors: draws made from each source.
        used: samples taken from each source, which interleaving goes by.
        window: (source, draw) of the candidates that are not packed yet, oldest first.
    """

    fingerprint: str
    step: int = 0
    cursors: tuple[int, ...] = (0,)
    used: tuple[int, ...] = (0,)
    window: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "step": self.step,
            "cursors": list(self.cursors),
            "used": list(self.used),
            "window": [list(pair) for pair in self.window],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "DataState":
        """Read what `to_json` wrote; DataError for another version."""
        if record.get("version") != STATE_VERSION:
            raise DataError(
                f"data state of version {record.get('version')!r}, expected {STATE_VERSION}"
            )
        return cls(
            fingerprint=record["fingerprint"],
            step=int(record["step"]),
            cursors=tuple(record["cursors"]),
            used=tuple(record["used"]),
            window=tuple((int(k), int(c)) for k, c in record["window"]),
        )


@dataclass(frozen=True)
class Step:
    """One optimizer step of the plan.

    Attributes:
        number: counted from 0.
        packs: exactly M packs, or fewer when the data runs out.
        state: continues after this step.
    """

    number: int
    packs: tuple[Pack, ...]
    state: DataState

    @property
    def plan_hash(self) -> int:
        """63-bit hash of the step's content, to be compared over the ranks."""
        digest = hashlib.blake2b(digest_size=8)
        for pack in self.packs:
            digest.update(repr([tuple(sample)[:5] for sample in pack]).encode())
        return int.from_bytes(digest.digest(), "little") >> 1

    def assign(self, world_size: int) -> list[list[Pack | None]]:
        """Return micro-steps of `world_size` packs each, balanced by cost; None pads the last one.

        Micro-steps take neighbours of the packs sorted by cost, since a micro-step lasts as long as
        its slowest rank.
        """
        order = sorted(range(len(self.packs)), key=lambda i: (-pack_cost(self.packs[i]), i))
        padded: list[Pack | None] = [self.packs[i] for i in order]
        padded += [None] * (-len(padded) % world_size)
        return [padded[i : i + world_size] for i in range(0, len(padded), world_size)]


def pack_cost(pack: Pack) -> int:
    """Return an integer estimate of a pack's work (linear and attention terms)."""
    return sum(
        s.tokens + s.tokens**2 // 20000 + s.patches // 8 + s.patches**2 // 40000 for s in pack
    )


@dataclass
class Planner:
    """Makes steps of `packs_per_step` packs out of weighted sources, for a number of epochs.

    Each source is seen exactly `epochs` times. The weights decide nothing but how the sources are
    interleaved: of two that are both in progress, one of weight 2 gives two samples to each sample
    of one of weight 1. It therefore ends sooner, and what is left of the other comes last.

    Args:
        sources: the streams to draw from.
        epochs: how often each source is seen, whatever its weight; a source leaves at its end.
        token_budget: tokens of a pack at most.
        patch_budget: vision patches of a pack at most.
        packs_per_step: M, the global batch in packs.
        state: where to go on.
    """

    sources: Sequence[DrawableSource]
    epochs: int
    token_budget: int
    patch_budget: int
    packs_per_step: int
    state: DataState
    _window: list[PlannedSample] = field(default_factory=list, init=False)
    _cursors: list[int] = field(default_factory=list, init=False)
    _used: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        counts = {len(self.sources), len(self.state.cursors), len(self.state.used)}
        if len(counts) > 1 or any(k >= len(self.sources) for k, _ in self.state.window):
            raise DataError(
                f"the data state is of {len(self.state.cursors)} sources, the run has "
                f"{len(self.sources)}; go on with the data of the interrupted run"
            )
        self._cursors = list(self.state.cursors)
        self._used = list(self.state.used)
        self._window = [self.sources[k].draw(k, c) for k, c in self.state.window]
        self._step = self.state.step

    def next_step(self) -> Step | None:
        """Return the next step, or None when every source is exhausted."""
        packs: list[Pack] = []
        while len(packs) < self.packs_per_step and (pack := self._next_pack()) is not None:
            packs.append(pack)
        if not packs:
            return None
        self._step += 1
        window = tuple((sample.source, sample.draw) for sample in self._window)
        self.state = DataState(
            self.state.fingerprint, self._step, tuple(self._cursors), tuple(self._used), window
        )
        return Step(self._step - 1, tuple(packs), self.state)

    def _next_pack(self) -> Pack | None:
        while len(self._window) < WINDOW and (source := self._choose_source()) is not None:
            self._window.append(self.sources[source].draw(source, self._cursors[source]))
            self._cursors[source] += 1
            self._used[source] += 1
        if not self._window:
            return None
        chosen = choose_pack(
            [sample.tokens for sample in self._window],
            [sample.patches for sample in self._window],
            self.token_budget,
            self.patch_budget,
        )
        pack = tuple(self._window[i] for i in chosen)
        taken = set(chosen)
        self._window = [sample for i, sample in enumerate(self._window) if i not in taken]
        return pack

    def _choose_source(self) -> int | None:
        """Return the live source furthest behind its weight; ties go to the lower number."""
        live = [k for k, s in enumerate(self.sources) if self._cursors[k] < self.epochs * len(s)]
        if not live:
            return None
        return min(live, key=lambda k: ((self._used[k] + 1) / self.sources[k].weight, k))


def choose_pack(
    tokens: list[int], patches: list[int], token_budget: int, patch_budget: int
) -> list[int]:
    """Choose the candidates of a pack: the oldest, and those that fill the rest best.

    The result is the canonical (oldest first) solution of the subset-sum problem over tokens, and,
    where patches bind, of the two-budget problem; so it does not depend on language or library.

    Args:
        tokens: of each candidate, oldest first; the first must fit the budget.
        patches: likewise.
        token_budget: of the pack.
        patch_budget: of the pack.

    Returns:
        Ascending indices, 0 among them.
    """
    if tokens[0] > token_budget or patches[0] > patch_budget:
        raise ValueError(f"a sample of {tokens[0]} tokens, {patches[0]} patches fits no pack")
    room, patch_room = token_budget - tokens[0], patch_budget - patches[0]
    chosen = _subset_sum(tokens, room)
    if sum(patches[i] for i in chosen) > patch_room:
        chosen = _two_budgets(tokens, patches, room, patch_room)
    return [0, *chosen]


def _subset_sum(tokens: list[int], room: int) -> list[int]:
    """Return candidates 1.. whose tokens sum up to the largest value within `room`."""
    mask = (1 << (room + 1)) - 1
    reachable = [1] * (len(tokens) + 1)  # bit s of reachable[i]: sum s is possible with i, i+1, ...
    for i in range(len(tokens) - 1, 0, -1):
        reachable[i] = (reachable[i + 1] | reachable[i + 1] << tokens[i]) & mask
    left = reachable[1].bit_length() - 1 if len(tokens) > 1 else 0
    chosen = []
    for i in range(1, len(tokens)):
        if left >= tokens[i] and (reachable[i + 1] >> (left - tokens[i])) & 1:
            chosen.append(i)
            left -= tokens[i]
    return chosen


def _two_budgets(tokens: list[int], patches: list[int], room: int, patch_room: int) -> list[int]:
    """Like `_subset_sum`, with the patches of the choice within `patch_room` as well."""
    unreachable = np.int32(np.iinfo(np.int32).max // 2)
    fewest = np.full((len(tokens) + 1, room + 1), unreachable, np.int32)
    fewest[:, 0] = 0  # fewest[i, s]: fewest patches of a choice from i, i+1, ... with token sum s
    for i in range(len(tokens) - 1, 0, -1):
        size = tokens[i]
        fewest[i] = fewest[i + 1]
        if size <= room:
            with_i = fewest[i + 1, : room + 1 - size] + np.int32(patches[i])
            fewest[i, size:] = np.minimum(fewest[i, size:], with_i)
    left = int(np.flatnonzero(fewest[1] <= patch_room)[-1])
    chosen = []
    for i in range(1, len(tokens)):
        fits = left >= tokens[i]
        if fits and fewest[i + 1, left - tokens[i]] <= patch_room - patches[i]:
            chosen.append(i)
            left -= tokens[i]
            patch_room -= patches[i]
    return chosen
