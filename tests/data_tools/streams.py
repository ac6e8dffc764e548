"""Executors over small shards for tests, and the comparison of what they make."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.examples.augment import Augmentation
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.stream.collate import Batch, ModelLayout
from data_tools.stream.executor import ExampleMaker, Executor, StepBatches
from data_tools.stream.fit import Budgets
from data_tools.stream.planner import DataState, Planner
from data_tools.stream.ranges import StorageSettings
from data_tools.stream.source import Source
from data_tools.templates import load_template
from tests.data_tools.catalogues import make_source
from train.modeling.tiny import ENDOFTEXT, IMAGE_PAD

SETTINGS = ImageSettings(784, 60_000)
LAYOUT = ModelLayout(IMAGE_PAD, ENDOFTEXT, window_px=112)
RECIPE = Recipe((load_template("text-en"), load_template("lines-en")), (1.0, 1.0), seed=2)
BUDGETS = Budgets(480, 2000)
AUGMENTATION = Augmentation(rotate_deg=5, shear=0.1, noise_sigma=5, contrast=0.2, brightness=9)
PACKS_PER_STEP = 3


def open_sources(
    folder: Path,
    groups: list[list[str]],
    model: Path,
    *,
    images: ImageSettings = SETTINGS,
    recipe: Recipe = RECIPE,
    budgets: Budgets = BUDGETS,
    **options: Any,
) -> list[Source]:
    """Return a source for each group of shards, of weights 1, 2, ...; catalogues lie in `folder`.

    Samples that cannot be used are no obstacle, so that tests can have holes.
    """
    options = {"max_damaged_share": 1.0} | options
    return [
        make_source(
            folder / f"{number}.catalogue",
            shards,
            model,
            images,
            recipe,
            budgets,
            weight=1.0 + number,
            **options,
        )
        for number, shards in enumerate(groups)
    ]


def make_executor(
    sources: Sequence[Source],
    encoder: Encoder,
    *,
    rank: int = 0,
    world_size: int = 1,
    state: DataState | None = None,
    augmentation: Augmentation | None = AUGMENTATION,
    epochs: int = 1,
    budgets: Budgets = BUDGETS,
    storage: StorageSettings | None = None,
    **options: Any,
) -> Executor:
    state = state or DataState.first({}, [source.digest for source in sources])
    planner = Planner(
        sources, [epochs] * len(sources), budgets.tokens, budgets.patches, PACKS_PER_STEP, state
    )
    maker = ExampleMaker(
        list(sources),
        encoder,
        LAYOUT,
        budgets.tokens,
        augmentation,
        seed=2,
        storage=storage or StorageSettings(),
    )
    return Executor(planner, maker, rank, world_size, **options)


def assert_same(one: Batch, other: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, field.name


def assert_same_steps(one: Sequence[StepBatches], other: Sequence[StepBatches]) -> None:
    assert [step.step for step in one] == [step.step for step in other]
    for a, b in zip(one, other, strict=True):
        assert len(a.batches) == len(b.batches)
        for first, second in zip(a.batches, b.batches, strict=True):
            assert_same(first, second)


def holes_of(steps: Sequence[StepBatches]) -> list[dict[str, Any]]:
    return [hole for step in steps for batch in step.batches for hole in batch.holes]


def keys_of(steps: Sequence[StepBatches]) -> list[str]:
    return [key for step in steps for batch in step.batches for key in batch.keys]
