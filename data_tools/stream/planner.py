"""Which samples make which pack of which step: the same on every rank, blind to ranks and workers.

The plan is a pure function of (config, index, DataState). Packs are filled by exact subset sums
over a window of 64 waiting candidates, oldest first, within two budgets: tokens (text and visual)
and vision patches.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools.errors import DataError

WINDOW = 64
STATE_VERSION = 2


class PlannedSample(NamedTuple):
    """A sample with the question that it is asked in this epoch, and what that costs.

    Attributes:
        source: number of the source.
        draw: number of the draw from it.
        sample_id: row of the source's catalogue.
        epoch: counted from 0.
        template: number of the question.
        tokens: text and visual tokens.
        patches: vision patches.
        scale: side length of its images in thousandths; below 1000 they were too large for a pack.
        window: which part of its answer this is, where the answer is too long for a pack.
        windows: into how many parts the answer is split.
    """

    source: int
    draw: int
    sample_id: int
    epoch: int
    template: int
    tokens: int
    patches: int
    scale: int = 1000
    window: int = 0
    windows: int = 1


Pack = tuple[PlannedSample, ...]


class DrawableSource(Protocol):
    """An endless stream of samples, epoch after epoch, addressed by the number of the draw."""

    weight: float  # of interleaving: how densely its samples lie in the plan while it lasts

    def num_draws(self, epochs: int) -> int:
        """Return how many draws the first epochs take."""

    def draws(self, source: int, number: int) -> tuple[PlannedSample, ...]:
        """Return the sample of a draw; in several parts where its answer is split."""


@dataclass(frozen=True)
class DataState:
    """What fully determines every later batch; JSON of under 4 KB.

    Attributes:
        settings: name of a setting that the plan depends on -> its digest.
        shards: digest of each source's shards.
        step: the next step.
        cursors: draws made from each source.
        window: (source, draw, part) of the candidates that are not packed yet, oldest first.
    """

    settings: dict[str, str]
    shards: tuple[str, ...]
    cursors: tuple[int, ...]
    step: int = 0
    window: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def first(cls, settings: dict[str, str], shards: Sequence[str]) -> "DataState":
        """Return the state of an untouched run."""
        return cls(settings, tuple(shards), (0,) * len(shards))

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "settings": self.settings,
            "shards": list(self.shards),
            "cursors": list(self.cursors),
            "step": self.step,
            "window": [list(entry) for entry in self.window],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "DataState":
        """Read what `to_json` wrote; DataError for another version."""
        if record.get("version") != STATE_VERSION:
            raise DataError(
                f"data state of version {record.get('version')!r}, expected {STATE_VERSION}; go on "
                "with the program that wrote it, or take a fresh run.dir"
            )
        return cls(
            settings=dict(record["settings"]),
            shards=tuple(record["shards"]),
            cursors=tuple(record["cursors"]),
            step=int(record["step"]),
            window=tuple((int(k), int(c), int(w)) for k, c, w in record["window"]),
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
            digest.update(repr([tuple(sample) for sample in pack]).encode())
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

    Each source is seen exactly as often as it has epochs. The weights decide nothing but how the
    sources are interleaved: of two that are both in progress, one of weight 2 gives two samples to
    each sample of one of weight 1. It therefore ends sooner, and what is left of the other comes
    last.

    Args:
        sources: the streams to draw from.
        epochs: how often each of them is seen, whatever its weight; a source leaves at its end.
        token_budget: tokens of a pack at most.
        patch_budget: vision patches of a pack at most.
        packs_per_step: M, the global batch in packs.
        state: where to go on.
    """

    sources: Sequence[DrawableSource]
    epochs: Sequence[int]
    token_budget: int
    patch_budget: int
    packs_per_step: int
    state: DataState
    num_packs: int = field(default=0, init=False)
    num_patch_bound: int = field(default=0, init=False)  # packs that the patch budget decided
    _window: list[PlannedSample] = field(default_factory=list, init=False)
    _cursors: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        counts = {len(self.sources), len(self.state.cursors), len(self.epochs)}
        if len(counts) > 1 or any(k >= len(self.sources) for k, _, _ in self.state.window):
            raise DataError(
                f"the data state is of {len(self.state.cursors)} sources, the run has "
                f"{len(self.sources)}; go on with the data of the interrupted run"
            )
        self._cursors = list(self.state.cursors)
        self._ends = [s.num_draws(n) for s, n in zip(self.sources, self.epochs, strict=True)]
        self._window = [self.sources[k].draws(k, c)[w] for k, c, w in self.state.window]
        self._step = self.state.step

    def next_step(self) -> Step | None:
        """Return the next step, or None when every source is exhausted."""
        packs: list[Pack] = []
        while len(packs) < self.packs_per_step and (pack := self._next_pack()) is not None:
            packs.append(pack)
        if not packs:
            return None
        self._step += 1
        self.state = replace(
            self.state,
            cursors=tuple(self._cursors),
            step=self._step,
            window=tuple((sample.source, sample.draw, sample.window) for sample in self._window),
        )
        return Step(self._step - 1, tuple(packs), self.state)

    def _next_pack(self) -> Pack | None:
        while len(self._window) < WINDOW and (source := self._choose_source()) is not None:
            self._window += self.sources[source].draws(source, self._cursors[source])
            self._cursors[source] += 1
        if not self._window:
            return None
        chosen, is_patch_bound = choose_pack(
            [sample.tokens for sample in self._window],
            [sample.patches for sample in self._window],
            self.token_budget,
            self.patch_budget,
        )
        self.num_packs += 1
        self.num_patch_bound += is_patch_bound
        pack = tuple(self._window[i] for i in chosen)
        taken = set(chosen)
        self._window = [sample for i, sample in enumerate(self._window) if i not in taken]
        return pack

    def _choose_source(self) -> int | None:
        """Return the live source furthest behind its weight; ties go to the lower number."""
        live = [k for k, cursor in enumerate(self._cursors) if cursor < self._ends[k]]
        if not live:
            return None
        return min(live, key=lambda k: ((self._cursors[k] + 1) / self.sources[k].weight, k))


def choose_pack(
    tokens: list[int], patches: list[int], token_budget: int, patch_budget: int
) -> tuple[list[int], bool]:
    """Choose the candidates of a pack: the oldest, and those that fill the rest best.

    The result is the canonical (oldest first) solution of the subset-sum problem over tokens, and,
    where patches bind, of the two-budget problem; so it does not depend on language or library.

    Args:
        tokens: of each candidate, oldest first; the first must fit the budget.
        patches: likewise.
        token_budget: of the pack.
        patch_budget: of the pack.

    Returns:
        Ascending indices, 0 among them; and whether the patches decided the choice.
    """
    if tokens[0] > token_budget or patches[0] > patch_budget:
        raise ValueError(f"a sample of {tokens[0]} tokens, {patches[0]} patches fits no pack")
    room, patch_room = token_budget - tokens[0], patch_budget - patches[0]
    chosen = _subset_sum(tokens, room)
    is_patch_bound = sum(patches[i] for i in chosen) > patch_room
    if is_patch_bound:
        chosen = _two_budgets(tokens, patches, room, patch_room)
    return [0, *chosen], is_patch_bound


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
