"""Plan -> batches: the same at any number of workers, ranks and restarts."""

import dataclasses
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import DataError
from data_tools.examples.encode import CONTEXT, Encoder, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.sample import PageImage
from data_tools.stream.catalogue import Selection, make_catalogue
from data_tools.stream.executor import ExampleMaker, StepBatches, estimate_bytes
from data_tools.stream.fit import Budgets
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.planner import DataState, PlannedSample
from data_tools.stream.ranges import StorageSettings
from data_tools.stream.source import Source
from data_tools.templates import load_template
from tests.builders import make_sample, write_shard, write_shards
from tests.data_tools.streams import (
    BUDGETS,
    LAYOUT,
    PACKS_PER_STEP,
    RECIPE,
    SETTINGS,
    assert_same,
    assert_same_steps,
    holes_of,
    keys_of,
    make_executor,
    open_sources,
)
from tests.servers import every, serve_folder, serve_s3


@pytest.fixture(scope="module")
def encoder(byte_folder: Path) -> Encoder:
    return Encoder.from_folder(byte_folder, SETTINGS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, byte_folder: Path) -> list[Source]:
    """Two sources: three shards, one of them empty; two shards, one of a broken page."""
    folder = tmp_path_factory.mktemp("streams")
    broken = dataclasses.replace(make_sample(104), image_bytes=(b"no image",))
    second = [make_sample(100 + i, num_images=1 + i % 2) for i in range(4)]
    groups = [
        write_shards(folder / "first", [9, 0, 7]),
        [str(write_shard(folder / "a.tar", second)), str(write_shard(folder / "b.tar", [broken]))],
    ]
    return open_sources(folder, groups, byte_folder)


@pytest.fixture(scope="module")
def steps(sources: list[Source], encoder: Encoder) -> list[StepBatches]:
    return list(make_executor(sources, encoder))


def draws_of(source: Source, count: int) -> list[PlannedSample]:
    return [planned for number in range(count) for planned in source.draws(0, number)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_workers_make_the_same_batches_in_the_same_order(
    sources: list[Source], encoder: Encoder, steps: list[StepBatches], num_workers: int
) -> None:
    """The sources have been read from before: open files must not hinder the workers' start."""
    assert len(steps) >= 2
    executor = make_executor(sources, encoder, num_workers=num_workers)
    assert_same_steps(list(executor), steps)
    assert executor.worker_pids == []
    assert executor.counters["workers_replaced"] == executor.counters["retries"] == 0
    assert executor.counters["queue_bytes"] > 0


def test_every_sample_is_in_a_batch_or_a_hole(
    sources: list[Source], steps: list[StepBatches]
) -> None:
    seen = Counter(keys_of(steps))
    expected = {f"doc-{i:04d}" for i in [*range(16), *range(100, 104)]}
    assert set(seen) == expected and set(seen.values()) == {1}
    in_batches = {hole["key"] for hole in holes_of(steps)}
    left_out = {key.split(":")[0] for _, key in sources[1].left_out.values()}
    assert in_batches | left_out == {"doc-0104"}


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


@pytest.mark.timeout(180)
def test_another_number_of_ranks_and_workers_goes_on_with_the_same_samples(
    sources: list[Source], encoder: Encoder
) -> None:
    """10 steps on 2 ranks x 2 workers, then 1 rank x 1 worker, or 4 ranks."""

    def samples(step: list[StepBatches]) -> list[str]:
        assert len({rank.step.number for rank in step}) == 1
        return sorted(keys_of(step))

    def run(world_size: int, num_workers: int, state: DataState | None = None) -> list[list]:
        ranks = [
            make_executor(
                [Source(source.path, source.weight) for source in sources],
                encoder,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                state=state,
                epochs=8,
            )
            for rank in range(world_size)
        ]
        iterators = [iter(executor) for executor in ranks]
        limit = 10 if state is None and num_workers else None
        found = [list(step) for step in islice(zip(*iterators, strict=True), limit)]
        for iterator in iterators:
            iterator.close()
        return found

    whole = run(1, 0)
    first = run(2, 2)
    assert len(whole) > 14 and len(first) == 10
    assert [samples(step) for step in first] == [samples(step) for step in whole[:10]]
    saved = DataState.from_json(json.loads(json.dumps(first[-1][0].state.to_json())))
    for world_size, num_workers in [(1, 1), (4, 0)]:
        rest = run(world_size, num_workers, saved)
        assert [samples(step) for step in rest] == [samples(step) for step in whole[10:]]


def test_epochs_are_augmented_and_asked_anew(sources: list[Source], encoder: Encoder) -> None:
    maker = make_executor(sources, encoder).maker
    of_one = [draw for draw in draws_of(sources[0], 3 * 16) if draw.sample_id == 4]

    def pages() -> list[bytes]:
        return [maker.example(p, maker.fetch((p,))[0]).images[0].tobytes() for p in of_one]

    assert len(of_one) == 3 and len(set(pages())) > 1
    assert pages() == pages()


def test_planned_lengths_hold(sources: list[Source], encoder: Encoder) -> None:
    maker = make_executor(sources, encoder).maker
    for planned in draws_of(sources[0], 3 * 16):
        example = maker.example(planned, maker.fetch((planned,))[0])
        assert len(example.input_ids) <= planned.tokens
        assert example.grid_thw.prod(axis=1).sum() == planned.patches
        if RECIPE.templates[planned.template].task == "text":
            assert len(example.input_ids) == planned.tokens


def test_the_estimate_of_a_batch_is_about_its_bytes(steps: list[StepBatches]) -> None:
    for step in steps:
        packs = [pack[0] for pack in step.step.assign(1)]
        for pack, batch in zip(packs, step.batches, strict=True):
            tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
            actual = sum(tensor.nbytes for tensor in tensors)
            assert 0.5 * actual < estimate_bytes(pack) < 2 * actual


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory, byte_folder: Path) -> Source:
    """Samples longer than a pack: a large page, and a long answer; and one that fits."""
    folder = tmp_path_factory.mktemp("long")
    page = Image.new("L", (600, 500), "white")
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    large = dataclasses.replace(
        make_sample(1),
        images=(PageImage("a.png", 600, 500),),
        annotations=(),
        text="large page",
        image_bytes=(buffer.getvalue(),),
    )
    long = dataclasses.replace(make_sample(2), annotations=(), text="a long answer, " * 90)
    shard = str(write_shard(folder / "a.tar", [make_sample(0), large, long]))
    (source,) = open_sources(
        folder,
        [[shard]],
        byte_folder,
        images=ImageSettings(784, 10**6),
        recipe=Recipe((load_template("text-en"),), seed=1),
        budgets=Budgets(480, 1000),
        too_long=("shrink", "split"),
    )
    return source


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_long_samples_are_shrunk_or_split_as_planned(
    long_source: Source, byte_folder: Path, num_workers: int
) -> None:
    encoder = Encoder.from_folder(byte_folder, ImageSettings(784, 10**6))
    executor = make_executor(
        [long_source],
        encoder,
        budgets=Budgets(480, 1000),
        augmentation=None,
        num_workers=num_workers,
    )
    steps = list(executor)
    assert holes_of(steps) == []
    packs = [pack for step in steps for pack in step.step.packs]
    parts = [planned for pack in packs for planned in pack if planned.windows > 1]
    shrunk = [planned for pack in packs for planned in pack if planned.scale < 1000]
    assert len(shrunk) == 1 and len(parts) == parts[0].windows > 2
    counts = Counter(keys_of(steps))
    assert counts == {"doc-0000": 1, "doc-0001": 1, "doc-0002": len(parts)}
    maker = executor.maker
    labels: list[int] = []
    for planned in sorted(parts, key=lambda planned: planned.window):
        example = maker.example(planned, maker.fetch((planned,))[0])
        assert len(example.input_ids) == planned.tokens <= 480
        labels += example.input_ids[example.target_positions].tolist()
    assert encoder.decode(np.asarray(labels[:-1])) == "a long answer, " * 90
    assert labels[-1] == encoder.end_id and CONTEXT == 64
    for batch in [batch for step in steps for batch in step.batches]:
        assert batch.num_tokens <= 480 and len(batch.pixels) // 588 <= 1000


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
    (source,) = open_sources(tmp_path, [[shard]], byte_folder, recipe=recipe)
    maker = ExampleMaker([source], encoder, LAYOUT, 900)
    pack = source.draws(0, 0)
    assert maker.build(pack, maker.fetch(pack)).grid_thw.tolist() == [[1, 4, 8]]


@pytest.mark.timeout(120)
def test_the_workers_end_when_the_loop_is_left(sources: list[Source], encoder: Encoder) -> None:
    executor = make_executor(sources, encoder, num_workers=2, epochs=50)
    for _ in executor:
        pids = executor.worker_pids
        break
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(thread.name == "loader" for thread in threading.enumerate())


@pytest.mark.timeout(120)
def test_an_error_of_the_plan_reaches_the_loop(sources: list[Source], encoder: Encoder) -> None:
    executor = make_executor(sources, encoder, num_workers=1)
    executor.planner.token_budget = 10
    with pytest.raises(ValueError, match="fits no pack"):
        list(executor)


@pytest.mark.timeout(120)
def test_what_a_worker_ignores_and_what_kills_it_change_no_batch(
    sources: list[Source], encoder: Encoder, steps: list[StepBatches]
) -> None:
    """TERM and USR1 ask the trainer to save, and reach its workers too; a kill is no accident."""
    executor = make_executor(sources, encoder, num_workers=2, max_bytes=200_000)
    found = []
    for step in executor:
        found.append(step)
        for pid in executor.worker_pids:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR1)
        if len(found) == 1:
            os.kill(executor.worker_pids[0], signal.SIGKILL)
            time.sleep(0.1)
    assert_same_steps(found, steps)
    assert executor.counters["workers_replaced"] == 1


@pytest.mark.timeout(180)
@pytest.mark.parametrize("serve", [serve_folder, serve_s3], ids=["http", "s3"])
def test_an_epoch_from_a_store_that_misbehaves_equals_one_from_local_files(
    serve: Any, tmp_path: Path, byte_folder: Path, encoder: Encoder
) -> None:
    pytest.importorskip("aiohttp", reason="the extras http and s3 are not installed")
    shards = write_shards(tmp_path / "shards", [9, 7])
    (local,) = open_sources(tmp_path, [shards], byte_folder)
    expected = list(make_executor([local], encoder))
    with serve(tmp_path / "shards") as server:
        urls = [f"{server.url}/{Path(shard).name}" for shard in shards]
        index_dir = str(tmp_path / "indexes")
        make_lengths(urls, str(byte_folder), SETTINGS, RECIPE, num_workers=0, index_dir=index_dir)
        mark = fingerprint(encoder, RECIPE)
        path = tmp_path / "remote.catalogue"
        chosen = Selection(BUDGETS)
        make_catalogue(path, urls, mark, RECIPE, SETTINGS, chosen, index_dir=index_dir)
        server.faults = every(3, "503", "500", "reset", "truncated", "stall")
        executor = make_executor(
            [Source(str(path))],
            encoder,
            num_workers=2,
            storage=StorageSettings(request_timeout_s=0.5),
        )
        found = list(executor)
        assert sum(server.faulted[kind] for kind in ("503", "500", "reset", "truncated")) > 1
    assert executor.counters["retries"] > 1 and executor.counters["workers_replaced"] == 0
    assert [s.step.plan_hash for s in found] == [s.step.plan_hash for s in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.batches, other.batches, strict=True):
            assert_same(a, b)


def test_a_pack_is_read_at_once_and_an_empty_one_not_at_all(
    sources: list[Source], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = make_executor(sources, encoder).maker
    asked: list[int] = []
    read_many = maker._reader.read_many
    monkeypatch.setattr(
        maker._reader, "read_many", lambda ranges: asked.append(len(ranges)) or read_many(ranges)
    )
    pack = tuple(draws_of(sources[0], 5))
    assert len(maker.fetch(pack)) == 5 and asked == [5]
    empty = maker.build(None, maker.fetch(None))
    assert empty.keys == () and empty.weight_sum == 0.0 and asked == [5, 0]
    assert BUDGETS.tokens == empty.num_pad_tokens and PACKS_PER_STEP == 3


def test_a_defect_in_a_worker_is_no_hole(
    sources: list[Source], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("data_tools.stream.executor.ask", fail)
    with pytest.raises(ZeroDivisionError):
        list(make_executor(sources, encoder))

    def refuse(*_: object) -> None:
        raise DataError("no answer")

    monkeypatch.setattr("data_tools.stream.executor.ask", refuse)
    found = holes_of(list(make_executor(sources, encoder)))
    assert len(found) >= 20 and {"record"} <= {hole["kind"] for hole in found}
