"""Catalogues: shards joined once, mapped by all; growth, damage and long samples are told."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.errors import BadDataShareError, CheckpointError, DataError
from data_tools.examples.encode import CONTEXT, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.stream.catalogue import DAMAGED, TOO_LONG, USED
from data_tools.stream.fit import MIN_SCALE, Budgets
from data_tools.stream.plan import Plan
from data_tools.stream.planner import DataState
from data_tools.stream.ranges import RangeReader
from data_tools.stream.source import Source
from data_tools.templates import load_template
from tests.builders import make_sample, write_shard, write_shards
from tests.data_tools.catalogues import make_source

RECIPE = Recipe((load_template("text-en"), load_template("lines-en")), (1.0, 1.0), seed=5)
IMAGES = ImageSettings(784, 200_000)
WIDE = Budgets(10_000, 40_000)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return write_shards(tmp_path / "shards", [4, 0, 3])


def made(tmp_path: Path, shards: list[str], model: Path, **options: Any) -> Source:
    budgets = options.pop("budgets", WIDE)
    path = tmp_path / "train.catalogue"
    return make_source(path, shards, model, IMAGES, RECIPE, budgets, **options)


def plan(epochs: int = 4) -> Plan:
    return Plan({"run.seed": "5"}, ("train.catalogue",), (1.0,), (epochs,), 900, 3600, 2)


def seen(source: Source, epochs: int) -> list[list[int]]:
    """Return the sample ids of each epoch, in the order of the draws."""
    ids: list[list[int]] = [[] for _ in range(epochs)]
    for number in range(source.num_draws(epochs)):
        for planned in source.draws(0, number):
            ids[planned.epoch].append(planned.sample_id)
    return ids


def test_a_catalogue_gives_back_every_sample(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    source, reader = made(tmp_path, shards, byte_folder), RangeReader()
    assert source.num_samples == len(source) == 7 and source.status.tolist() == [USED] * 7
    for number in range(7):
        sample = make_sample(number)
        assert source.key(number) == sample.key
        assert source.read(number, reader) == sample
        record = source.read_record(number, reader)
        assert (record.annotations, record.fields) == (sample.annotations, sample.fields)
        assert source.image_sizes(number) == [(i.width, i.height) for i in sample.images]


def test_workers_get_the_path_alone(tmp_path: Path, shards: list[str], byte_folder: Path) -> None:
    source = made(tmp_path, shards, byte_folder, weight=2.0)
    message = pickle.dumps(source)
    assert len(message) < 500
    again = pickle.loads(message)
    assert again.weight == 2.0 and seen(again, 2) == seen(source, 2)


def test_made_twice_it_is_left_alone_and_other_settings_make_it_anew(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    path = tmp_path / "train.catalogue"
    made(tmp_path, shards, byte_folder)
    first = path.stat().st_ino
    made(tmp_path, shards, byte_folder)
    assert path.stat().st_ino == first
    made(tmp_path, shards, byte_folder, min_chars=3)
    assert path.stat().st_ino != first


def test_shards_that_are_added_join_at_the_next_epoch(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    """Added before, between and behind the old ones; the old epochs go on as they were."""
    before = made(tmp_path, shards[1:], byte_folder)
    old_digest = before.digest
    new = str(write_shard(tmp_path / "shards" / "train-000009.tar", [make_sample(90)]))
    grown = made(tmp_path, [shards[0], *shards[1:], new], byte_folder, next_epoch=2)
    assert [(g.first_epoch, g.num_shards) for g in grown.generations] == [(0, 2), (2, 4)]
    assert grown.generations[0].digest == old_digest != grown.digest
    assert seen(grown, 2) == seen(before, 2)
    later = seen(grown, 4)[2:]
    assert [sorted(ids) for ids in later] == [list(range(8))] * 2 and later[0] != later[1]
    assert {grown.key(i) for i in later[0]} == {*(f"doc-{i:04d}" for i in range(7)), "doc-0090"}
    assert [grown.epoch_size(epoch) for epoch in range(4)] == [3, 3, 8, 8]
    assert grown.num_draws(4) == 22 and grown.epoch_of(6) == (2, 0) and grown.epoch_of(21) == (3, 7)


def test_a_checkpoint_from_before_goes_on_with_the_grown_shards(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    epochs = 60
    before = made(tmp_path, shards[:1], byte_folder)
    planner = plan(epochs).planner([before], plan().first_state([before]))
    step = planner.next_step()
    assert step is not None
    following = planner.next_step()
    epoch, _ = before.epoch_of(step.state.cursors[0])
    assert 0 < epoch < epochs - 5
    for ahead, names in enumerate([shards[:1], shards[:2], shards], start=1):
        grown = made(tmp_path, names, byte_folder, next_epoch=epoch + ahead)
        state = plan().check(DataState.from_json(step.state.to_json()), [grown])
        assert state.shards == (grown.digest,)
    steps = list(iter(plan(epochs).planner([grown], state).next_step, None))
    assert following is not None and steps[0].packs[0] == following.packs[0]  # it waited already
    samples = [s for step in steps for pack in step.packs for s in pack]
    last_epochs = [[s.sample_id for s in samples if s.epoch == e] for e in (epoch + 1, epochs - 1)]
    assert sorted(last_epochs[0]) == list(range(4)) and sorted(last_epochs[1]) == list(range(7))


def test_twice_grown_within_an_epoch_every_checkpoint_is_known(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    digests = [made(tmp_path, shards[:1], byte_folder).digest]
    for count in (2, 3):
        digests.append(made(tmp_path, shards[:count], byte_folder, next_epoch=1).digest)
    source = made(tmp_path, shards, byte_folder, next_epoch=1)
    assert [g.digest for g in source.generations] == digests
    assert [source.epoch_size(epoch) for epoch in range(3)] == [4, 7, 7]
    assert source.num_draws(3) == 18 and source.epoch_of(4) == (1, 0)


def test_shards_that_have_been_moved_are_read_where_they_are(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    made(tmp_path, shards, byte_folder)
    (tmp_path / "shards").rename(tmp_path / "moved")
    source = made(tmp_path, [shard.replace("/shards/", "/moved/") for shard in shards], byte_folder)
    assert source.read(5, RangeReader()) == make_sample(5)


def test_a_checkpoint_past_the_epoch_in_which_shards_joined_is_refused(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    """It was left by an earlier life of the run, which went on without those shards."""
    before = made(tmp_path, shards[:1], byte_folder)
    grown = made(tmp_path, shards, byte_folder, next_epoch=2)
    settings, starts_at = plan().settings, 2 * len(before)
    state = DataState(settings, (before.digest,), (starts_at,))
    assert plan().check(state, [grown]).cursors == (starts_at,)
    with pytest.raises(CheckpointError, match=r"the shards of data.train.0"):
        plan().check(replace(state, cursors=(starts_at + 1,)), [grown])
    assert grown.begun_with.tolist() == list(range(4))


def test_when_shards_joined_is_not_forgotten_with_the_catalogue(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    before = made(tmp_path, shards[:1], byte_folder)
    grown = made(tmp_path, shards, byte_folder, next_epoch=2)
    states = [DataState(plan().settings, (one.digest,), (3,)) for one in (before, grown)]
    (tmp_path / "train.catalogue").unlink()
    again = made(tmp_path, shards, byte_folder, next_epoch=0)
    for state in states:
        with pytest.raises(CheckpointError, match=r"the shards of data.train.0"):
            plan().check(state, [again])
    (tmp_path / "train.catalogue").unlink()
    again = made(tmp_path, shards[:1], byte_folder, next_epoch=0)
    assert plan().check(states[0], [again]).cursors == (3,)


def test_a_shard_that_is_gone_or_changed_stops_a_run_that_has_begun(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    made(tmp_path, shards, byte_folder)
    with pytest.raises(DataError, match=r"train-000000.tar is gone since the run began"):
        made(tmp_path, shards[1:], byte_folder, next_epoch=1)
    made(tmp_path, shards[1:], byte_folder)  # a run that has not begun takes what is there


def test_other_settings_are_named(tmp_path: Path, shards: list[str], byte_folder: Path) -> None:
    source = made(tmp_path, shards, byte_folder)
    state = plan().first_state([source])
    assert plan().check(state, [source]) == state
    other = DataState({"run.seed": "6", "data.pixels": "x"}, state.shards, state.cursors)
    with pytest.raises(CheckpointError, match=r"other data settings: data.pixels, run.seed\. "):
        plan().check(other, [source])
    with pytest.raises(CheckpointError, match=r"the shards of data.train.0"):
        plan().check(DataState(state.settings, ("other",), (0,)), [source])
    with pytest.raises(CheckpointError, match=r"data.train \(2 sources, now 1\)"):
        plan().check(DataState.first(state.settings, ["a", "b"]), [source])


def test_long_samples_are_shrunk_split_or_left_out_and_counted(
    tmp_path: Path, byte_folder: Path
) -> None:
    long_text = "the quick brown fox " * 120
    samples = [make_sample(i) for i in range(4)]
    samples += [replace(make_sample(i), annotations=(), text=long_text) for i in range(4, 8)]
    shard = [str(write_shard(tmp_path / "shards" / "a.tar", samples))]
    wide = made(tmp_path, shard, byte_folder)
    text, visual = wide.lengths(0)
    limit = int((text + visual)[:4].max()) + 6 * CONTEXT
    assert (text + visual > limit).sum() == 4
    budgets = Budgets(limit, 4 * limit)
    out = made(tmp_path, shard, byte_folder, budgets=budgets, too_long=())
    assert out.status.tolist() == [USED] * 4 + [TOO_LONG] * 4
    assert out.left_out == {"longer than a pack": (4, "doc-0004")}
    split = made(tmp_path, shard, byte_folder, budgets=budgets, too_long=("shrink", "split"))
    assert len(split) == 8 and split.num_fitted == (0, 4) and split.left_out == {}
    parts = [part for number in range(8) for part in split.draws(0, number)]
    assert max(part.tokens for part in parts) <= limit
    windows = {p.sample_id: p.windows for p in parts}
    assert all(windows[row] == 1 for row in range(4)) and min(windows[r] for r in range(4, 8)) > 1
    for row in range(4, 8):
        assert [p.window for p in parts if p.sample_id == row] == list(range(windows[row]))

    tight = Budgets(10_000, 4 * int(visual.max() * 0.6))
    shrunk = made(tmp_path, shard, byte_folder, budgets=tight)
    for number in range(len(shrunk)):
        (planned,) = shrunk.draws(0, number)
        assert planned.patches <= tight.patches and planned.scale >= MIN_SCALE
    assert shrunk.num_fitted[0] > 0


def test_damage_is_told_and_stops_above_a_share(tmp_path: Path, byte_folder: Path) -> None:
    shard = write_shard(tmp_path / "shards" / "a.tar", [make_sample(i) for i in range(6)])
    data = shard.read_bytes().replace(b'{"version":1', b'["version":1', 1)
    shard.write_bytes(data[: len(data) * 4 // 5 // 512 * 512 - 700])
    source = made(tmp_path, [str(shard)], byte_folder)
    count, example = source.left_out["damaged"]
    assert count == 1 and example.startswith("doc-0000: ") and "invalid JSON" in example
    assert source.status[0] == DAMAGED and 3 <= source.num_samples < 6
    assert list(source.reasons) == [0] and "invalid JSON" in source.reasons[0]
    assert source.shards[0].damage
    with pytest.raises(BadDataShareError, match=r"1 of \d samples are damaged and 1 shards cut"):
        made(tmp_path, [str(shard)], byte_folder, max_damaged_share=0.001)


def test_keys_that_occur_twice_are_counted(tmp_path: Path, byte_folder: Path) -> None:
    shards = [
        str(write_shard(tmp_path / name, [make_sample(i) for i in rows]))
        for name, rows in [("a.tar", [0, 1]), ("b.tar", [2, 1]), ("c.tar", [0])]
    ]
    source = made(tmp_path, shards, byte_folder)
    assert source.duplicates == (2, "doc-0001") and len(source) == 5
    assert made(tmp_path, shards[:1], byte_folder).duplicates == (0, "")


def test_a_part_of_a_source_has_an_order_of_its_own(
    tmp_path: Path, shards: list[str], byte_folder: Path
) -> None:
    source = made(tmp_path, shards, byte_folder)
    part = source.restricted_to([5, 1, 3])
    assert len(part) == 3 and part.num_draws(2) == 6
    assert [sorted(ids) for ids in seen(part, 2)] == [[1, 3, 5]] * 2
    assert [sorted(ids) for ids in seen(source, 1)] == [list(range(7))]
    assert np.array_equal(source.used, np.arange(7))
