"""A source: the usable samples of a set of shards, in the order of its epochs."""

from dataclasses import dataclass, field

import numpy as np

from data_tools.errors import DataError
from data_tools.examples.tasks import Recipe
from data_tools.sample import Sample
from data_tools.stream.hashing import hash_key
from data_tools.stream.index import ShardIndex, open_index
from data_tools.stream.lengths import Lengths, read_lengths
from data_tools.stream.order import EpochOrder
from data_tools.stream.planner import PlannedSample

BLOCK = 4096
PATCHES_PER_VISUAL_TOKEN = 4
NEVER_ASKED = "has an answer only for templates of weight 0"


@dataclass(frozen=True)
class Budgets:
    """Limits of one pack: tokens (text and visual) and vision patches."""

    tokens: int
    patches: int


@dataclass
class Source:
    """Samples of a set of shards with their lengths.

    Attributes:
        shards: their indexes, in order; a sample id is a row number over all of them.
        recipe: which question is asked in which epoch.
        usable: (n,) int64 ids of the samples that are used, ascending.
        tokens: (templates, all) int64 text and visual tokens.
        patches: (all,) int64 vision patches.
        answerable: (templates, all) bool, whether a sample has an answer for a template and fits a
            pack with it; a usable sample has at least one.
        left_out: why samples are not used -> (how many, the first one's key).
        weight: how densely its samples lie among those of other sources, as long as both last.
            Every source is seen exactly as often as the plan has epochs, whatever its weight.
    """

    shards: list[ShardIndex]
    recipe: Recipe
    usable: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    answerable: np.ndarray
    left_out: dict[str, tuple[int, str]]
    weight: float = 1.0
    _orders: dict[tuple[int, int], EpochOrder] = field(default_factory=dict, init=False)
    _blocks: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._first_id = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self._usable_sizes = np.diff(np.searchsorted(self.usable, self._first_id))

    def __len__(self) -> int:
        return len(self.usable)

    def draw(self, source: int, number: int) -> PlannedSample:
        """Return the sample of a draw; divided by the size it gives epoch and position."""
        epoch, position = divmod(number, len(self))
        sample_id = int(self.usable[self._position(source, epoch, position)])
        key, answerable = self.key(sample_id), self.answerable[:, sample_id]
        template = self.recipe.choose(key, epoch, answerable.tolist())
        return PlannedSample(
            source,
            number,
            sample_id,
            epoch,
            template,
            int(self.tokens[template, sample_id]),
            int(self.patches[sample_id]),
        )

    @property
    def shares(self) -> np.ndarray:
        """(templates, n) float64: how often each question is asked of each usable sample."""
        return self.recipe.shares(self.answerable[:, self.usable])

    def key(self, sample_id: int) -> str:
        """Return the name of a sample."""
        shard, row = self._locate(sample_id)
        return self.shards[shard].keys[row]

    def read(self, sample_id: int) -> Sample:
        """Read a sample, images included."""
        shard, row = self._locate(sample_id)
        return self.shards[shard].read(row)

    def _locate(self, sample_id: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_id, sample_id, side="right")) - 1
        return shard, sample_id - int(self._first_id[shard])

    def _position(self, source: int, epoch: int, position: int) -> int:
        block = position // BLOCK
        if (source, epoch, block) not in self._blocks:
            if (source, epoch) not in self._orders:
                self._orders = {(source, epoch): self._order(source, epoch)}
            start = block * BLOCK
            # Candidates wait in the window across the border of two blocks: keep a few of them.
            if len(self._blocks) > 8:
                self._blocks.clear()
            ids = self._orders[source, epoch].sample_ids(start, start + BLOCK)
            self._blocks[source, epoch, block] = ids
        return int(self._blocks[source, epoch, block][position % BLOCK])

    def _order(self, source: int, epoch: int) -> EpochOrder:
        key = hash_key(self.recipe.seed, "order", source, epoch)
        return EpochOrder(self._usable_sizes, key)


def open_source(
    shards: list[str],
    mark: str,
    recipe: Recipe,
    budgets: Budgets,
    *,
    max_chars: int | None = None,
    min_chars: int = 0,
    weight: float = 1.0,
) -> Source:
    """Open shards whose lengths have been made, and leave out what cannot be used.

    Args:
        shards: paths or URLs.
        mark: fingerprint of the lengths.
        recipe: the run's templates.
        budgets: a sample that exceeds them alone with a template is never asked that, nor cut.
        max_chars: leave out samples with more annotated characters.
        min_chars: leave out samples with fewer.
        weight: how the samples of several sources are interleaved (`Source`).

    Raises:
        DataError: if nothing usable remains.
    """
    indexes = [open_index(shard) for shard in shards]
    lengths = [read_lengths(index, mark) for index in indexes]
    visual = np.concatenate([part.visual for part in lengths]).astype(np.int64)
    text = np.concatenate([part.text for part in lengths], axis=1).astype(np.int64)
    chars = np.concatenate([index.num_chars for index in indexes]).astype(np.int64)
    tokens = text + visual
    patches = visual * PATCHES_PER_VISUAL_TOKEN
    keys = [key for index in indexes for key in index.keys]

    answered = (text > 0) & (np.asarray(recipe.weights)[:, None] > 0)
    answerable = answered & (tokens <= budgets.tokens) & (patches <= budgets.patches)
    broken = answered.sum(axis=0) == 0
    too_long = ~broken & (answerable.sum(axis=0) == 0)
    outside = (chars < min_chars) | (chars > (max_chars or np.iinfo(np.int64).max))
    left_out = {
        name: (int(mask.sum()), keys[int(np.argmax(mask))])
        for name, mask in (
            ("unusable", broken),
            ("longer than a pack", too_long),
            ("not in the selected lengths", outside & ~broken),
        )
        if mask.any()
    }
    if broken.any():
        count, first = left_out["unusable"]
        left_out["unusable"] = (count, f"{first}: {_first_reason(lengths, broken)}")
    usable = np.flatnonzero(~broken & ~too_long & ~outside)
    if not len(usable):
        raise DataError(f"none of the {len(keys)} samples of {shards[0]} ... is usable: {left_out}")
    return Source(indexes, recipe, usable, tokens, patches, answerable, left_out, weight)


def _first_reason(lengths: list[Lengths], broken: np.ndarray) -> str:
    """Return why the first of the samples, marked over all shards, cannot be used."""
    row = int(np.argmax(broken))
    for part in lengths:
        if row < len(part.visual):
            return part.reasons.get(row, NEVER_ASKED)
        row -= len(part.visual)
    return NEVER_ASKED
