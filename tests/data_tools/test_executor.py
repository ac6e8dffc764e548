"""Plan -> batches: the same at any number of workers; what is broken leaves a hole."""

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_tools.examples.augment import Augmentation
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.sample import PageImage, Sample
from data_tools.stream.collate import Batch, ModelLayout
from data_tools.stream.executor import ExampleMaker, Executor, StepBatches
from data_tools.stream.index import ShardChangedError
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.planner import DataState, Planner
from data_tools.stream.source import Budgets, Source, open_source
from data_tools.templates import load_template
from tests.builders import make_sample, write_shard, write_shards
from train.modeling.tiny import ENDOFTEXT, IMAGE_PAD

SETTINGS = ImageSettings(784, 60_000)
LAYOUT = ModelLayout(IMAGE_PAD, ENDOFTEXT, window_px=112)
RECIPE = Recipe((load_template("text-en"), load_template("lines-en")), (1.0, 1.0), seed=2)
BUDGETS = Budgets(480, 2000)
AUGMENTATION = Augmentation(rotate_deg=5, shear=0.1, noise_sigma=5, contrast=0.2, brightness=9)


@pytest.fixture(scope="module")
def encoder(byte_folder: Path) -> Encoder:
    return Encoder.from_folder(byte_folder, SETTINGS)


def open_sources(groups: list[list[str]], folder: Path) -> list[Source]:
    mark = fingerprint(Encoder.from_folder(folder, SETTINGS), RECIPE)
    sources = []
    for number, shards in enumerate(groups):
        make_lengths(shards, str(folder), SETTINGS, RECIPE, num_workers=0)
        sources.append(open_source(shards, mark, RECIPE, BUDGETS, weight=1.0 + number))
    return sources


def make_executor(
    sources: list[Source],
    encoder: Encoder,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    state: DataState | None = None,
    augmentation: Augmentation | None = AUGMENTATION,
    epochs: int = 1,
) -> Executor:
    zeros = (0,) * len(sources)
    state = state or DataState("mark", cursors=zeros, used=zeros)
    planner = Planner(sources, epochs, BUDGETS.tokens, BUDGETS.patches, 3, state)
    maker = ExampleMaker(sources, encoder, LAYOUT, BUDGETS.tokens, augmentation, seed=2)
    return Executor(planner, maker, rank, world_size, num_workers, prefetch=2)


def assert_same(one: Batch, other: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, field.name


def assert_same_steps(one: list[StepBatches], other: list[StepBatches]) -> None:
    assert [step.step for step in one] == [step.step for step in other]
    for a, b in zip(one, other, strict=True):
        assert len(a.batches) == len(b.batches)
        for first, second in zip(a.batches, b.batches, strict=True):
            assert_same(first, second)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Two sources: three shards, one of them empty; two shards, one of a broken page."""
    first = write_shards(tmp_path_factory.mktemp("first"), [9, 0, 7])
    folder = tmp_path_factory.mktemp("second")
    broken = dataclasses.replace(make_sample(104), image_bytes=(b"no image",))
    second = [make_sample(100 + i, num_images=1 + i % 2) for i in range(4)]
    return [
        first,
        [str(write_shard(folder / "a.tar", second)), str(write_shard(folder / "b.tar", [broken]))],
    ]


@pytest.fixture(scope="module")
def sources(groups: list[list[str]], byte_folder: Path) -> list[Source]:
    return open_sources(groups, byte_folder)


@pytest.fixture(scope="module")
def steps(sources: list[Source], encoder: Encoder) -> list[StepBatches]:
    return list(make_executor(sources, encoder))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_make_the_same_batches_in_the_same_order(
    sources: list[Source], encoder: Encoder, steps: list[StepBatches], num_workers: int
) -> None:
    """The sources have been read from before: open files must not hinder the workers' start."""
    assert len(steps) >= 2
    assert_same_steps(list(make_executor(sources, encoder, num_workers=num_workers)), steps)


def test_every_sample_is_in_a_batch_or_a_hole(
    sources: list[Source], steps: list[StepBatches]
) -> None:
    batches = [batch for step in steps for batch in step.batches]
    seen = Counter(key for batch in batches for key in batch.keys)
    holes = [hole for batch in batches for hole in batch.holes]
    assert [hole["key"] for hole in holes] == ["doc-0104"] and holes[0]["source"] == 1
    assert 'sample "doc-0104", image 0: cannot be decoded' in holes[0]["reason"]
    expected = {f"doc-{i:04d}" for i in [*range(16), *range(100, 104)]}
    assert set(seen) == expected and set(seen.values()) == {1}


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_share_the_packs_of_a_step(
    sources: list[Source], encoder: Encoder, steps: list[StepBatches], world_size: int
) -> None:
    ranks = [
        list(make_executor(sources, encoder, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for number, step in enumerate(steps):
        shares = [rank[number] for rank in ranks]
        assert all(share.step == step.step for share in shares)
        assert len({len(share.batches) for share in shares}) == 1
        dealt = [batch for share in shares for batch in share.batches if batch.keys or batch.holes]
        by_keys = {batch.keys: batch for batch in dealt}
        assert len(dealt) == len(step.batches)
        for batch in step.batches:
            assert_same(by_keys[batch.keys], batch)


def test_going_on_from_a_state_makes_the_following_batches(
    sources: list[Source], encoder: Encoder, steps: list[StepBatches]
) -> None:
    for number, step in enumerate(steps):
        state = DataState.from_json(json.loads(json.dumps(step.state.to_json())))
        assert_same_steps(list(make_executor(sources, encoder, state=state)), steps[number + 1 :])


def test_epochs_are_augmented_and_asked_anew(sources: list[Source], encoder: Encoder) -> None:
    maker = make_executor(sources, encoder).maker
    draws = [sources[0].draw(0, number) for number in range(3 * 16)]
    of_one = [draw for draw in draws if draw.sample_id == 4]
    pages = [maker.example(draw).images[0].tobytes() for draw in of_one]
    assert len(of_one) == 3 and len(set(pages)) > 1
    assert pages == [maker.example(draw).images[0].tobytes() for draw in of_one]


def test_planned_lengths_hold(sources: list[Source], encoder: Encoder) -> None:
    maker = make_executor(sources, encoder).maker
    for number in range(3 * 16):
        planned = sources[0].draw(0, number)
        example = maker.example(planned)
        assert len(example.input_ids) <= planned.tokens
        assert example.grid_thw.prod(axis=1).sum() == planned.patches
        if RECIPE.templates[planned.template].task == "text":
            assert len(example.input_ids) == planned.tokens


def test_a_longer_example_than_planned_is_a_hole(sources: list[Source], encoder: Encoder) -> None:
    maker = make_executor(sources, encoder).maker
    planned = next(p for n in range(16) if (p := sources[0].draw(0, n)).template == 0)
    batch = maker.batch((planned._replace(tokens=planned.tokens - 1),))
    assert batch.keys == () and "tokens, planned" in batch.holes[0]["reason"]
    assert batch.weight_sum == 0.0


def test_holes_have_a_reason_and_nothing_moves_up(
    tmp_path: Path, byte_folder: Path, encoder: Encoder
) -> None:
    def shard(folder: str, samples: list[Sample]) -> list[list[str]]:
        return [[str(write_shard(tmp_path / folder / "a.tar", samples))]]

    def run(groups: list[list[str]]) -> tuple[list[Source], list[StepBatches]]:
        opened = open_sources(groups, byte_folder)
        return opened, list(make_executor(opened, encoder, augmentation=None))

    samples = [make_sample(i) for i in range(24)]
    damaged = list(samples)
    cut = samples[3].image_bytes[0]
    damaged[3] = dataclasses.replace(samples[3], image_bytes=(cut[: len(cut) // 2],))
    page = samples[8].images[0]
    other = next(s for s in samples if s.images != samples[8].images)
    damaged[8] = dataclasses.replace(samples[8], image_bytes=other.image_bytes)
    _, whole = run(shard("whole", samples))
    opened, holed = run(shard("damaged", damaged))

    expected = {
        "doc-0003": 'sample "doc-0003", image 0: cannot be decoded',
        "doc-0008": f"its record says {page.width} x {page.height}",
    }
    assert [step.step.plan_hash for step in whole] == [step.step.plan_hash for step in holed]
    found: dict[str, Any] = {}
    for before, after in zip(whole, holed, strict=True):
        for one, two in zip(before.batches, after.batches, strict=True):
            found |= {hole["key"]: hole["reason"] for hole in two.holes}
            assert two.keys == tuple(key for key in one.keys if key not in expected)
            assert two.num_tokens + two.num_pad_tokens == BUDGETS.tokens
    assert set(found) == set(expected)
    assert all(expected[key] in found[key] for key in expected)


def test_invalid_json_is_a_hole(tmp_path: Path, byte_folder: Path, encoder: Encoder) -> None:
    shard = write_shards(tmp_path, [4])[0]
    sources = open_sources([[shard]], byte_folder)
    data = Path(shard).read_bytes()
    Path(shard).write_bytes(data.replace(b'{"version":1', b'["version":1', 1))
    (step,) = make_executor(sources, encoder)
    holes = [hole for batch in step.batches for hole in batch.holes]
    assert [hole["key"] for hole in holes] == ["doc-0000"]
    assert "doc-0000.json is no valid JSON" in holes[0]["reason"]
    assert sum(len(batch.keys) for batch in step.batches) == 3


def test_a_shard_replaced_during_a_run_stops_it(
    tmp_path: Path, byte_folder: Path, encoder: Encoder
) -> None:
    shard = write_shards(tmp_path, [4])[0]
    sources = open_sources([[shard]], byte_folder)
    Path(shard).write_bytes(Path(shard).read_bytes()[:3000])
    with pytest.raises(ShardChangedError, match="replaced or cut off"):
        list(make_executor(sources, encoder))


def test_the_size_of_turned_pages_is_that_of_the_record(
    byte_folder: Path, tmp_path: Path, encoder: Encoder
) -> None:
    """A page photographed sideways: stored 56 x 112, upright 112 x 56."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (56, 112), "white").save(buffer, "JPEG", exif=exif)
    turned = dataclasses.replace(
        make_sample(0),
        images=(PageImage("a.jpg", 112, 56),),
        annotations=tuple(dataclasses.replace(a, bbox=None) for a in make_sample(0).annotations),
        text="x",
        image_bytes=(buffer.getvalue(),),
    )
    recipe = Recipe((load_template("text-en"),))
    shard = str(write_shard(tmp_path / "a.tar", [turned]))
    make_lengths([shard], str(byte_folder), SETTINGS, recipe, num_workers=0)
    source = open_source([shard], fingerprint(encoder, recipe), recipe, BUDGETS)
    maker = ExampleMaker([source], encoder, LAYOUT, 900)
    assert maker.batch((source.draw(0, 0),)).grid_thw.tolist() == [[1, 4, 8]]
