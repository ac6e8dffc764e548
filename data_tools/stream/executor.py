"""Plan -> batches: reads, decodes and collates the packs of one rank, in order, ahead of the loop.

The unit of work is a micro-step's pack. Workers never influence content: every draw is seeded by
(seed, key, epoch), and the order of batches is the order of the plan at any worker count.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from data_tools.errors import DataError
from data_tools.examples.augment import Augmentation
from data_tools.examples.encode import Encoder, Example
from data_tools.examples.images import decode
from data_tools.examples.tasks import ask
from data_tools.stream.collate import Batch, ModelLayout, collate
from data_tools.stream.index import ShardChangedError
from data_tools.stream.planner import DataState, Pack, PlannedSample, Planner, Step
from data_tools.stream.source import Source


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
    """Makes the examples of packs: read, decode, augment, prepare, encode."""

    sources: list[Source]
    encoder: Encoder
    layout: ModelLayout
    token_budget: int
    augmentation: Augmentation | None = None
    seed: int = 0

    def batch(self, pack: Pack | None) -> Batch:
        """Collate a pack; samples whose bytes cannot be used become holes, nothing moves up.

        Raises:
            ShardChangedError: if a shard is no longer the one that was indexed; no hole, since
                the plan itself is then worth nothing.
        """
        examples, holes = [], []
        for planned in pack or ():
            try:
                examples.append(self.example(planned))
            except ShardChangedError:
                raise
            except DataError as error:
                key = self.sources[planned.source].key(planned.sample_id)
                holes.append({"key": key, "source": planned.source, "reason": str(error)})
        return collate(examples, self.layout, token_budget=self.token_budget, holes=tuple(holes))

    def example(self, planned: PlannedSample) -> Example:
        """Make the example of a planned sample.

        Raises:
            DataError: if the sample's bytes cannot be used, or it came out longer than planned.
        """
        source = self.sources[planned.source]
        sample = source.read(planned.sample_id)
        template = source.recipe.templates[planned.template]
        pages = []
        for number, data in enumerate(sample.image_bytes):
            page = decode(data, f'sample "{sample.key}", image {number}')
            expected = (sample.images[number].height, sample.images[number].width)
            if page.shape[:2] != expected:
                raise DataError(
                    f'sample "{sample.key}", image {number}: {page.shape[1]} x {page.shape[0]} px, '
                    f"its record says {expected[1]} x {expected[0]}"
                )
            pages.append(page)
        prepared = tuple(self.encoder.images.prepare(page) for page in pages)
        if self.augmentation is not None:
            sample, prepared = self.augmentation(sample, prepared, self.seed, planned.epoch)
        sizes = [(image.shape[1], image.shape[0]) for image in prepared]
        example = self.encoder.example(sample.key, ask(sample, template, sizes), prepared)
        if len(example.input_ids) > planned.tokens:
            raise DataError(
                f'sample "{sample.key}": {len(example.input_ids)} tokens, planned '
                f"{planned.tokens}; delete the .lengths files to measure again"
            )
        return example


class _PackDataset(Dataset):
    """Maps a pack to its batch (torch's DataLoader hands the packs to its workers)."""

    def __init__(self, maker: ExampleMaker) -> None:
        self.maker = maker

    def __getitem__(self, pack: Pack | None) -> Batch:
        return self.maker.batch(pack)


@dataclass
class Executor:
    """Yields, step by step, the batches of one rank.

    Args:
        planner: the plan, at the state to go on from.
        maker: makes batches of packs.
        rank: of this process.
        world_size: data-parallel ranks.
        num_workers: processes that make batches; 0 makes them here.
        prefetch: batches that each worker keeps ready.
        pin: whether to put batches into pinned memory.
    """

    planner: Planner
    maker: ExampleMaker
    rank: int
    world_size: int
    num_workers: int = 0
    prefetch: int = 4
    pin: bool = False
    _steps: deque[Step] = field(default_factory=deque, init=False)

    def __iter__(self) -> Iterator[StepBatches]:
        loader = iter(self._loader())
        while True:
            batches: list[Batch] = []
            batch = next(loader, None)
            if batch is None:
                return
            batches.append(batch)
            step = self._steps.popleft()
            for _ in range(len(step.assign(self.world_size)) - 1):
                batches.append(next(loader))
            yield StepBatches(step, [batch.pin() for batch in batches] if self.pin else batches)

    def _loader(self) -> DataLoader:
        return DataLoader(
            _PackDataset(self.maker),
            sampler=self._packs(),
            batch_size=None,
            generator=torch.Generator(),  # its own: the global one is part of the checkpoint
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            multiprocessing_context="spawn" if self.num_workers else None,
            worker_init_fn=_calm_worker if self.num_workers else None,
        )

    def _packs(self) -> Iterator[Pack | None]:
        while (step := self.planner.next_step()) is not None:
            self._steps.append(step)
            for micro_step in step.assign(self.world_size):
                yield micro_step[self.rank]


def _calm_worker(worker: int) -> None:
    """One thread each, and deaf to the signals that ask the trainer to save and stop."""
    import signal

    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
