"""Plan -> batches: reads, decodes and collates the packs of one rank, in order, ahead of the loop.

The unit of work is a micro-step's pack. Workers never influence content: every draw is seeded by
(seed, key, epoch), and the order of batches is the order of the plan at any worker count.
"""

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from data_tools.errors import ChecksumError, DataError
from data_tools.examples.augment import Augmentation
from data_tools.examples.encode import Encoder, Example
from data_tools.examples.images import decode
from data_tools.examples.tasks import ask
from data_tools.sample import Sample
from data_tools.stream.collate import DUMMY_PX, Batch, ModelLayout, collate
from data_tools.stream.faults import HoleError, fault_of
from data_tools.stream.planner import DataState, Pack, PlannedSample, Planner, Step
from data_tools.stream.pool import WorkerPool
from data_tools.stream.ranges import RangeReader, StorageSettings
from data_tools.stream.remote import is_local
from data_tools.stream.source import Source

BYTES_PER_PATCH = 14 * 14 * 3
BYTES_PER_TOKEN = 100  # ids, positions, targets, weights


@dataclass(frozen=True)
class StepBatches:
    """What one rank does in one step, and where the data stands after it."""

    step: Step
    batches: list[Batch]

    @property
    def state(self) -> DataState:
        """The state that continues after this step."""
        return self.step.state


@dataclass(frozen=True)
class ExampleMaker:
    """Makes the batches of packs: read, decode, augment, prepare, encode, collate.

    Args:
        sources: that the plan draws from.
        encoder: of the model.
        layout: of the model.
        token_budget: of a pack.
        augmentation: of training pages.
        seed: of the run.
        storage: how shards are read.
    """

    sources: list[Source]
    encoder: Encoder
    layout: ModelLayout
    token_budget: int
    augmentation: Augmentation | None = None
    seed: int = 0
    storage: StorageSettings = StorageSettings()
    _reader: RangeReader = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_reader", RangeReader(self.storage))

    @property
    def num_retries(self) -> int:
        """Reads that this process has tried again."""
        return self._reader.num_retries

    def fetch(self, task: Pack | None) -> list[bytes]:
        """Return the bytes of each sample of a pack; all of them are read at once.

        Raises:
            ShardChangedError: if a shard is no longer the one that was indexed.
            StorageError: if the storage does not answer.
        """
        pack = task or ()
        return self._reader.read_many(
            [self.sources[p.source].byte_range(p.sample_id) for p in pack]
        )

    def build(self, task: Pack | None, fetched: list[bytes]) -> Batch:
        """Collate a pack; samples whose bytes cannot be used become holes, nothing moves up.

        Raises:
            ShardChangedError: if a shard is no longer the one that was indexed; no hole, since
                the plan itself is then worth nothing.
            StorageError: if a sample that is read again cannot be had.
        """
        examples, holes = [], []
        for planned, data in zip(task or (), fetched, strict=True):
            try:
                examples.append(self.example(planned, data))
            except HoleError as error:
                key = self.sources[planned.source].key(planned.sample_id)
                holes.append(
                    {
                        "key": key,
                        "source": planned.source,
                        "kind": error.kind,
                        "reason": str(error),
                    }
                )
        return collate(examples, self.layout, token_budget=self.token_budget, holes=tuple(holes))

    def example(self, planned: PlannedSample, data: bytes) -> Example:
        """Make the example of a planned sample from the bytes of its range.

        Raises:
            HoleError: if the sample's bytes cannot be used, or it came out longer than planned.
            ShardChangedError: if they are no longer those of the sample.
        """
        sample = self._parse(planned, data)
        pages = _decode(sample)
        with fault_of("image"):
            images = self.encoder.images
            prepared = tuple(images.prepare(page, planned.scale) for page in pages)
        with fault_of("record"):
            if self.augmentation is not None:
                sample, prepared = self.augmentation(sample, prepared, self.seed, planned.epoch)
            sizes = [(image.shape[1], image.shape[0]) for image in prepared]
            template = self.sources[planned.source].recipe.templates[planned.template]
            example = self.encoder.example(
                sample.key,
                ask(sample, template, sizes),
                prepared,
                planned.window,
                planned.windows,
            )
        if len(example.input_ids) > planned.tokens:
            raise HoleError(
                "longer",
                f'sample "{sample.key}": {len(example.input_ids)} tokens, planned '
                f"{planned.tokens}; delete the .lengths files to measure again",
            )
        return example

    def _parse(self, planned: PlannedSample, data: bytes) -> Sample:
        """Parse a sample; one from remote storage that is damaged is read once more.

        It may have been damaged on its way: what is damaged in the store comes a second time.
        """
        source = self.sources[planned.source]
        try:
            return source.parse(planned.sample_id, data)
        except DataError as error:
            place = source.byte_range(planned.sample_id)
            again = data if is_local(place.url) else self._reader.read(place)
            with fault_of("checksum" if isinstance(error, ChecksumError) else "record"):
                if again == data:
                    raise
                return source.parse(planned.sample_id, again)


def _decode(sample: Sample) -> list[np.ndarray]:
    """Return the (H, W, 3) uint8 pages of a sample; HoleError if one is not what it has to be."""
    pages = []
    if len(sample.image_bytes) != len(sample.images):
        raise HoleError(
            "image",
            f'sample "{sample.key}": {len(sample.image_bytes)} images, its record says '
            f"{len(sample.images)}",
        )
    for number, (image, data) in enumerate(zip(sample.images, sample.image_bytes, strict=True)):
        name = f'sample "{sample.key}", image {number}'
        with fault_of("image"):
            page = decode(data, name)
        if page.shape[:2] != (image.height, image.width):
            raise HoleError(
                "size",
                f"{name}: {page.shape[1]} x {page.shape[0]} px, "
                f"its record says {image.width} x {image.height}",
            )
        pages.append(page)
    return pages


@dataclass
class Executor:
    """Yields, step by step, the batches of one rank.

    Args:
        planner: the plan, at the state to go on from.
        maker: makes batches of packs.
        rank: of this process.
        world_size: data-parallel ranks.
        num_workers: processes that make batches; 0 makes them here.
        max_bytes: of batches that are ready or under way.
        pin: whether batches are put into pinned memory.
        timeout_s: a worker that takes longer for a pack is replaced.
    """

    planner: Planner
    maker: ExampleMaker
    rank: int
    world_size: int
    num_workers: int = 0
    max_bytes: int = 2 * 2**30
    pin: bool = False
    timeout_s: float = 300.0
    _steps: deque[Step] = field(default_factory=deque, init=False)
    _pool: WorkerPool[Pack | None, Batch] | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[StepBatches]:
        return self.steps()

    def steps(self) -> Generator[StepBatches, None, None]:
        """Yield the steps; closed early, it ends the workers."""
        self._pool = WorkerPool(
            self.maker,
            self._packs(),
            num_workers=self.num_workers,
            max_bytes=self.max_bytes,
            estimate=estimate_bytes,
            describe=self._describe,
            timeout_s=self.timeout_s,
            pin=self.pin,
        )
        with self._pool as pool:
            while (first := next(pool, None)) is not None:
                # A step is noted before its first pack is handed out, so it is here.
                step = self._steps.popleft()
                batches = [first]
                batches += [next(pool) for _ in range(len(step.assign(self.world_size)) - 1)]
                pin = self.pin and not self.num_workers  # workers' batches are received pinned
                yield StepBatches(step, [batch.pin() for batch in batches] if pin else batches)

    @property
    def counters(self) -> dict[str, int]:
        """Workers replaced, reads tried again, most bytes in the queue (`WorkerPool`)."""
        return {} if self._pool is None else self._pool.counters

    @property
    def worker_pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [] if self._pool is None else self._pool.worker_pids

    def _packs(self) -> Iterator[Pack | None]:
        while (step := self.planner.next_step()) is not None:
            self._steps.append(step)
            for micro_step in step.assign(self.world_size):
                yield micro_step[self.rank]

    def _describe(self, pack: Pack | None) -> str:
        keys = [self.maker.sources[p.source].key(p.sample_id) for p in pack or ()]
        return f"the samples {', '.join(keys)}" if keys else "no sample"


def estimate_bytes(pack: Pack | None) -> int:
    """Return about how many bytes the batch of a pack has."""
    patches = sum(planned.patches for planned in pack or ())
    tokens = sum(planned.tokens for planned in pack or ())
    return max(patches * BYTES_PER_PATCH, 3 * DUMMY_PX**2) + tokens * BYTES_PER_TOKEN
