"""A source: usable samples of its shards, in the order of its epochs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.examples.encode import FULL_SCALE, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.stream import source as source_module
from data_tools.stream.fit import Budgets
from data_tools.stream.index import open_index
from data_tools.stream.planner import DataState, PlannedSample, Planner
from data_tools.stream.ranges import RangeReader
from data_tools.stream.source import Source
from data_tools.templates import load_template
from tests.builders import make_sample, write_shard, write_shards
from tests.data_tools.catalogues import make_source

RECIPE = Recipe((load_template("text-en"), load_template("lines-en")), (1.0, 1.0), seed=5)
SETTINGS = ImageSettings(784, 200_000)
WIDE = Budgets(10_000, 10_000)


def opened(
    shards: list[str],
    model: Path,
    budgets: Budgets = WIDE,
    recipe: Recipe = RECIPE,
    **options: Any,
) -> Source:
    path = Path(shards[0]).parent / "catalogues" / f"{len(shards)}"
    return make_source(path, shards, model, SETTINGS, recipe, budgets, **options)


def draw(source: Source, number: int, place: int = 0) -> PlannedSample:
    """Return the only part of a draw."""
    (planned,) = source.draws(place, number)
    return planned


def tokens(source: Source) -> np.ndarray:
    """Return (templates, all) text and visual tokens."""
    return np.stack([np.add(*source.lengths(t)) for t in range(len(source.recipe.templates))])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"), [3, 0, 5, 0, 0, 4, 0], num_lines=3)


@pytest.fixture(scope="module")
def source(shards: list[str], byte_folder: Path) -> Source:
    return opened(shards, byte_folder)


def test_every_sample_once_an_epoch_empty_shards_included(source: Source) -> None:
    assert len(source) == 12
    for epoch in range(3):
        drawn = [draw(source, epoch * 12 + i) for i in range(12)]
        assert sorted(sample.sample_id for sample in drawn) == list(range(12))
        assert {sample.epoch for sample in drawn} == {epoch}
        keys = {source.key(sample.sample_id) for sample in drawn}
        assert keys == {f"doc-{i:04d}" for i in range(12)}


def test_draws_do_not_depend_on_what_was_drawn_before(
    source: Source, shards: list[str], byte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [draw(source, number) for number in range(60)]
    monkeypatch.setattr(source_module, "BLOCK", 4)
    fresh = opened(shards, byte_folder)
    order = np.random.default_rng(0).permutation(60)
    for number in [*order, *order[::-1]]:
        assert draw(fresh, int(number)) == expected[number]
    assert len(fresh._blocks) <= 10


def test_epochs_seeds_and_places_in_the_mix_have_their_own_orders(
    source: Source, shards: list[str], byte_folder: Path
) -> None:
    other = opened(shards, byte_folder, recipe=dataclasses.replace(RECIPE, seed=6))
    orders = [
        tuple(draw(which, epoch * 12 + i, place).sample_id for i in range(12))
        for which, place, epoch in [(source, 0, 0), (source, 0, 1), (source, 1, 0), (other, 0, 0)]
    ]
    assert len(set(orders)) == 4


def test_a_draw_says_what_the_sample_costs(source: Source) -> None:
    reader = RangeReader()
    for number in range(24):
        sample = draw(source, number)
        assert sample.template == RECIPE.choose(source.key(sample.sample_id), sample.epoch)
        assert sample.tokens == tokens(source)[sample.template, sample.sample_id] > 0
        assert sample.patches == 4 * source.lengths(0)[1][sample.sample_id]
        assert sample[-3:] == (FULL_SCALE, 0, 1)
        assert source.read(sample.sample_id, reader).key == source.key(sample.sample_id)
    assert {draw(source, number).template for number in range(24)} == {0, 1}


def test_longer_than_a_pack_is_left_out_and_counted_never_cut(
    shards: list[str], source: Source, byte_folder: Path
) -> None:
    limit = int(np.median(tokens(source).min(axis=0)))
    small = opened(shards, byte_folder, Budgets(limit, 10_000), too_long=())
    too_long = tokens(source).min(axis=0) > limit
    assert 0 < too_long.sum() < 12
    first = source.key(int(np.flatnonzero(too_long)[0]))
    assert small.left_out == {"longer than a pack": (int(too_long.sum()), first)}
    drawn = {draw(small, i).sample_id for i in range(len(small))}
    assert drawn == set(np.flatnonzero(~too_long).tolist())

    visual = source.lengths(0)[1]
    limit_visual = int(np.median(visual))
    flat = opened(shards, byte_folder, Budgets(10_000, 4 * limit_visual), too_long=())
    assert len(flat) == (visual <= limit_visual).sum() < 12
    steps = Planner([small], [1], limit, 10_000, 3, DataState.first({}, ["f"])).next_step
    sums = [sum(s.tokens for s in pack) for step in iter(steps, None) for pack in step.packs]
    assert max(sums) <= limit


def test_a_question_whose_answer_is_too_long_is_not_asked(
    shards: list[str], source: Source, byte_folder: Path
) -> None:
    """An answer with boxes is longer than the text alone; the page can still be read as text."""
    limit = int(tokens(source)[0].max())
    assert (tokens(source)[1] > limit).any()
    small = opened(shards, byte_folder, Budgets(limit, 10_000), too_long=())
    assert len(small) == 12 and small.left_out == {}
    assert np.array_equal(small.answerable, tokens(source) <= limit)
    for number in range(10 * 12):
        sample = draw(small, number)
        assert 0 < sample.tokens <= limit
        fits_both = bool(small.answerable[:, sample.sample_id].all())
        assert sample.template == (draw(source, number).template if fits_both else 0)


def test_a_page_without_fields_is_read_as_text_in_a_mix_of_both(
    tmp_path: Path, byte_folder: Path
) -> None:
    recipe = Recipe((load_template("receipt-fields-en"), load_template("text-en")), (3.0, 1.0))
    samples = [make_sample(i) for i in range(6)]
    for row in (1, 4):
        samples[row] = dataclasses.replace(samples[row], fields={})
    samples[5] = dataclasses.replace(samples[5], fields={}, annotations=())
    mixed = opened([str(write_shard(tmp_path / "a.tar", samples))], byte_folder, recipe=recipe)
    assert mixed.used.tolist() == [0, 1, 2, 3, 4]
    count, first = mixed.left_out.pop("unusable")
    assert count == 1 and "nothing to answer" in first and mixed.left_out == {}
    shares = [mixed.shares(row).tolist() for row in range(3)]
    assert shares == [[0.75, 0.25], [0, 1], [0.75, 0.25]]
    asked: dict[int, set[int]] = {}
    for number in range(40 * 5):
        sample = draw(mixed, number)
        asked.setdefault(sample.sample_id, set()).add(sample.template)
        assert sample.tokens == tokens(mixed)[sample.template, sample.sample_id]
    assert asked == {0: {0, 1}, 1: {1}, 2: {0, 1}, 3: {0, 1}, 4: {1}}


def test_a_template_of_weight_0_makes_nothing_usable(tmp_path: Path, byte_folder: Path) -> None:
    recipe = Recipe((load_template("receipt-fields-en"), load_template("text-en")), (1.0, 0.0))
    samples = [make_sample(0), dataclasses.replace(make_sample(1), fields={})]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    source = opened([shard], byte_folder, recipe=recipe)
    assert source.used.tolist() == [0]
    assert source.left_out["unusable"] == (
        1,
        "doc-0001: has an answer only for templates of weight 0",
    )


def test_lengths_can_be_selected_by_characters(
    shards: list[str], byte_folder: Path, source: Source
) -> None:
    chars = np.concatenate([open_index(shard).num_chars for shard in shards])
    low, high = int(np.sort(chars)[3]), int(np.sort(chars)[8])
    chosen = opened(shards, byte_folder, min_chars=low, max_chars=high)
    assert chosen.used.tolist() == np.flatnonzero((chars >= low) & (chars <= high)).tolist()
    assert chosen.left_out["not in the selected lengths"][0] == 12 - len(chosen)


def test_unusable_samples_are_counted_with_the_first_reason(
    tmp_path: Path, byte_folder: Path
) -> None:
    good = [make_sample(i) for i in range(3)]
    bare = [dataclasses.replace(make_sample(i), annotations=()) for i in range(3, 5)]
    shards = [
        str(write_shard(tmp_path / "a.tar", [good[0], bare[0], good[1]])),
        str(write_shard(tmp_path / "b.tar", [bare[1], good[2]])),
    ]
    source = opened(shards, byte_folder)
    assert source.used.tolist() == [0, 2, 4]
    count, first = source.left_out["unusable"]
    assert count == 2 and first.startswith("doc-0003: ") and "nothing to answer" in first
    with pytest.raises(DataError, match=r"none of the 1 samples of .*c.tar ... is usable"):
        opened([str(write_shard(tmp_path / "c.tar", bare[:1]))], byte_folder)
