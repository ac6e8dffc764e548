"""A source: the samples of a catalogue, in the order of its epochs."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.examples.encode import FULL_SCALE
from data_tools.examples.tasks import Recipe
from data_tools.sample import Sample
from data_tools.stream.catalogue import Generation
from data_tools.stream.columns import open_columns
from data_tools.stream.fit import (
    PATCHES_PER_VISUAL_TOKEN,
    Fit,
    window_tokens,
)
from data_tools.stream.hashing import hash_key
from data_tools.stream.order import EpochOrder
from data_tools.stream.planner import PlannedSample
from data_tools.stream.ranges import ByteRange, RangeReader
from data_tools.stream.records import parse_record, parse_sample

BLOCK = 4096


@dataclass(frozen=True)
class ShardName:
    """A shard of a source: where it lies, which version of it was indexed, and what it lost."""

    url: str
    identity: str
    version: str
    damage: str


class Source:
    """Samples of a set of shards with their lengths, from a memory-mapped catalogue.

    Args:
        path: of the catalogue.
        weight: how densely its samples lie among those of other sources, as long as both last.

    Attributes:
        recipe: which question is asked in which epoch.
        shards: in the order of the catalogue.
        generations: how many of them belong to which epoch.
        used: (n,) uint32 ids of the samples that are used, ascending.
        status: (all,) uint8, index into `catalogue.WHY`.
        answerable: (templates, all) bool, whether a sample has an answer for a template and fits a
            pack with it; a used sample has at least one.
        left_out: why samples are not used -> (how many, the first one's key and reason).
        reasons: sample id -> why a damaged or unusable sample is left out (10,000 at most).
        duplicates: how many samples share their key with an earlier one, and the first such key.
    """

    def __init__(self, path: str, weight: float = 1.0) -> None:
        self.path, self.weight = path, weight
        self._columns, metadata = open_columns(path)
        self.recipe = Recipe.from_json(json.loads(metadata["recipe"]))
        self.shards = [ShardName(*record) for record in json.loads(metadata["shards"])]
        self.generations = [Generation(**g) for g in json.loads(metadata["generations"])]
        self.left_out = {
            why: (n, key) for why, (n, key) in json.loads(metadata["left_out"]).items()
        }
        self.reasons = {int(row): why for row, why in json.loads(metadata["reasons"]).items()}
        self.duplicates: tuple[int, str] = tuple(json.loads(metadata["duplicates"]))
        self.used, self.status = self._columns["used"], self._columns["status"]
        self.answerable = self._columns["answerable"]
        self._first_row, self._first_used = self._columns["first_row"], self._columns["first_used"]
        self._sizes = [int(self._first_used[g.num_shards]) for g in self.generations]
        self._starts = self._first_draws()
        self._orders: dict[tuple[int, int], EpochOrder] = {}
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        """Pickle as the path: every process maps the file by itself."""
        return Source, (self.path, self.weight)

    def __len__(self) -> int:
        """Return the samples of an epoch, once all shards have joined."""
        return len(self.used)

    @property
    def num_samples(self) -> int:
        """Samples of the shards, used or not."""
        return len(self.status)

    @property
    def num_fitted(self) -> tuple[int, int]:
        """Return how many samples are longer than a pack and shrunk, and split, to fit one."""
        fits = self._columns["fit"]
        is_split = (fits[:, :, Fit._fields.index("windows")] > 1).any(axis=1)
        return int((~is_split).sum()), int(is_split.sum())

    @property
    def digest(self) -> str:
        """What tells this set of shards from another one."""
        return self.generations[-1].digest

    @property
    def begun_with(self) -> np.ndarray:
        """(n,) uint32 ids of the used samples of the shards that the run began with."""
        return self.used[: self._sizes[0]]

    def continues(self, digest: str, num_draws: int) -> bool:
        """Return whether draws that were made of the shards with a digest are also this source's.

        They are not where further shards have joined in an epoch that these draws had begun.
        """
        for generation, end in zip(self.generations, [*self._starts[1:], num_draws], strict=True):
            if generation.digest == digest:
                return num_draws <= end
        return False

    def restricted_to(self, sample_ids: Sequence[int]) -> "Source":
        """Return a source of some of the used samples; it lives in this process alone."""
        part = copy.copy(self)
        part.used = np.asarray(sorted(sample_ids), np.uint32)
        part._first_used = np.searchsorted(part.used, self._first_row)
        part._sizes = [int(part._first_used[g.num_shards]) for g in self.generations]
        part._starts = part._first_draws()
        part._orders, part._blocks = {}, {}
        return part

    def num_draws(self, epochs: int) -> int:
        """Return how many draws the first epochs take."""
        number = self._generation(epochs)
        first = self.generations[number].first_epoch
        return self._starts[number] + (epochs - first) * self._sizes[number]

    def epoch_of(self, number: int) -> tuple[int, int]:
        """Return (epoch, position in it) of a draw."""
        generation = max(i for i, start in enumerate(self._starts) if start <= number)
        epochs, position = divmod(number - self._starts[generation], self._sizes[generation])
        return self.generations[generation].first_epoch + epochs, position

    def epoch_size(self, epoch: int) -> int:
        """Return the samples of an epoch."""
        return self._sizes[self._generation(epoch)]

    def draws(self, source: int, number: int) -> tuple[PlannedSample, ...]:
        """Return the sample of a draw; in several parts where its answer is split."""
        epoch, position = self.epoch_of(number)
        sample_id = int(self.used[self._position(source, epoch, position)])
        template = self._template(sample_id, epoch)
        text = int(self._columns["text"][template, sample_id])
        scale, windows, visual = self._fit(sample_id, template)
        patches = PATCHES_PER_VISUAL_TOKEN * visual
        if windows == 1:
            planned = (source, number, sample_id, epoch, template, text + visual, patches, scale)
            return (PlannedSample(*planned),)
        targets = int(self._columns["targets"][template, sample_id])
        return tuple(
            PlannedSample(
                source,
                number,
                sample_id,
                epoch,
                template,
                window_tokens(text, targets, visual, window, windows),
                patches,
                scale,
                window,
                windows,
            )
            for window in range(windows)
        )

    def shares(self, sample_id: int) -> np.ndarray:
        """Return the (templates,) shares in which a sample is asked each question."""
        return self.recipe.shares(self.answerable[:, sample_id : sample_id + 1])[:, 0]

    def key(self, sample_id: int) -> str:
        """Return the name of a sample."""
        start, end = self._columns["key_end"][sample_id : sample_id + 2].tolist()
        return bytes(self._columns["keys"][start:end]).decode("utf-8")

    def byte_range(self, sample_id: int) -> ByteRange:
        """Return where the bytes of a sample lie."""
        offset, size = (int(self._columns[name][sample_id]) for name in ("offset", "size"))
        return self._range(sample_id, offset, size)

    def parse(self, sample_id: int, data: bytes) -> Sample:
        """Build a sample from the bytes of its range.

        Raises:
            ShardChangedError: if the shard does not hold this sample there.
            DataError: if the bytes are not those that were indexed, or the sample is malformed.
        """
        crc32 = int(self._columns["crc32"][sample_id])
        return parse_sample(
            self.key(sample_id), *self._record(sample_id), self._images(sample_id), crc32, data
        )

    def read(self, sample_id: int, reader: RangeReader) -> Sample:
        """Read a sample, images included."""
        return self.parse(sample_id, reader.read(self.byte_range(sample_id)))

    def read_record(self, sample_id: int, reader: RangeReader) -> Sample:
        """Read a sample without the bytes of its images."""
        kind, start, size = self._record(sample_id)
        offset = int(self._columns["offset"][sample_id]) + start
        data = reader.read(self._range(sample_id, offset, size))
        return parse_record(self.key(sample_id), kind, data, self._images(sample_id))

    def image_sizes(self, sample_id: int) -> list[tuple[int, int]]:
        """Return (width, height) px of the oriented pages of a sample."""
        return [(width, height) for _, _, width, height in self._images(sample_id)]

    def lengths(self, template: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (all,) uint32 text tokens with a template, and visual tokens at full size."""
        return self._columns["text"][template], self._columns["visual"]

    def _first_draws(self) -> list[int]:
        """Return the number of the first draw of each generation."""
        starts = [0]
        for one, two, size in zip(
            self.generations, self.generations[1:], self._sizes, strict=False
        ):
            starts.append(starts[-1] + (two.first_epoch - one.first_epoch) * size)
        return starts

    def _generation(self, epoch: int) -> int:
        return max(i for i, g in enumerate(self.generations) if g.first_epoch <= epoch)

    def _template(self, sample_id: int, epoch: int) -> int:
        if len(self.recipe.weights) == 1:
            return 0
        answerable = self.answerable[:, sample_id].tolist()
        return self.recipe.choose(self.key(sample_id), epoch, answerable)

    def _fit(self, sample_id: int, template: int) -> Fit:
        rows = self._columns["fit_row"]
        place = int(np.searchsorted(rows, sample_id)) if len(rows) else 0
        if place < len(rows) and rows[place] == sample_id:
            found = Fit(*self._columns["fit"][place, template].tolist())
            if found.windows:  # zeros: with this template the sample fits as it is
                return found
        return Fit(FULL_SCALE, 1, int(self._columns["visual"][sample_id]))

    def _record(self, sample_id: int) -> tuple[int, int, int]:
        kind, start, size = (self._columns[n] for n in ("kind", "json_start", "json_size"))
        return int(kind[sample_id]), int(start[sample_id]), int(size[sample_id])

    def _images(self, sample_id: int) -> list[tuple[int, int, int, int]]:
        """Return (start, size, width, height) of each image."""
        first, end = self._columns["first_image"][sample_id : sample_id + 2].tolist()
        starts, sizes, wh = (
            self._columns[name][first:end].tolist()
            for name in ("image_start", "image_size", "image_wh")
        )
        return [(a, b, w, h) for a, b, (w, h) in zip(starts, sizes, wh, strict=True)]

    def _range(self, sample_id: int, offset: int, size: int) -> ByteRange:
        shard = self.shards[int(np.searchsorted(self._first_row, sample_id, side="right")) - 1]
        return ByteRange(shard.url, shard.version, offset, size)

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
        shards = self.generations[self._generation(epoch)].num_shards
        sizes = np.diff(self._first_used[: shards + 1])
        return EpochOrder(sizes, hash_key(self.recipe.seed, "order", source, epoch))
