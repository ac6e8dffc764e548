"""The fault campaign: what damages a sample leaves a hole that is named; too many of them stop."""

import dataclasses
import io
import os
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import EXIT_DATA, BadDataShareError, ShardChangedError
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.sample import PageImage, Sample
from data_tools.stream.executor import Executor, StepBatches
from data_tools.stream.faults import KINDS, SAMPLES_BEFORE_SHARE, HoleCounter
from data_tools.stream.fit import Budgets
from data_tools.stream.pool import WorkerLostError
from data_tools.stream.source import Source
from data_tools.templates import load_template
from tests.builders import encode_png, make_sample, write_shard
from tests.data_tools.streams import (
    SETTINGS,
    assert_same_steps,
    holes_of,
    keys_of,
    make_executor,
    open_sources,
)

NUM_SAMPLES = 24


@pytest.fixture(scope="module")
def encoder(byte_folder: Path) -> Encoder:
    return Encoder.from_folder(byte_folder, SETTINGS)


def with_image(sample: Sample, data: bytes, size: tuple[int, int] | None = None) -> Sample:
    """Return a sample with another file for its page; its record says what it said, or `size`."""
    images = (PageImage("a.png", *size),) if size else sample.images
    boxless = tuple(dataclasses.replace(a, bbox=None) for a in sample.annotations)
    return dataclasses.replace(sample, image_bytes=(data,), images=images, annotations=boxless)


def png_of_claimed_size(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def strip(width: int, height: int) -> bytes:
    return encode_png(np.zeros((height, width, 3), np.uint8))


def cut(sample: Sample) -> Sample:
    return with_image(sample, sample.image_bytes[0][: len(sample.image_bytes[0]) // 2])


# What is wrong when the shard is written -> (how, what it is called, message).
WRITTEN: dict[str, tuple[Callable[[Sample], Sample], str, str]] = {
    "no image": (lambda s: with_image(s, b"<html>"), "image", "no known image format"),
    "cut off": (cut, "image", "cannot be decoded"),
    "bomb": (
        lambda s: with_image(s, png_of_claimed_size(60_000, 60_000)),
        "image",
        "decompression bomb",
    ),
    "zero bytes": (lambda s: with_image(s, b""), "image", "no known image format"),
    "another size": (
        lambda s: with_image(s, strip(29, 31)),
        "size",
        "image 0: 29 x 31 px, its record says",
    ),
    "a line of pixels": (
        lambda s: with_image(s, strip(20_000, 1)),
        "size",
        "image 0: 20000 x 1 px, its record says",
    ),
}


def make_campaign(folder: Path, model: Path) -> tuple[list[Source], dict[str, tuple[str, str]]]:
    """Return the source of a shard with every fault, and key -> (kind, message) of its holes."""
    samples = [make_sample(i) for i in range(NUM_SAMPLES)]
    expected = {}
    for number, (damage, kind, message) in enumerate(WRITTEN.values(), start=3):
        samples[number] = damage(samples[number])
        expected[samples[number].key] = (kind, message)
    shard = write_shard(folder / "a.tar", samples)
    sources = open_sources(folder, [[str(shard)]], model)
    # Damage after the index was made: a byte of an image, one of a record, one of a header.
    data = bytearray(shard.read_bytes())
    for key, what in [("doc-0012", ".png"), ("doc-0013", ".json"), ("doc-0014", ".png")]:
        header = data.index(f"{key}{what}".encode())
        data[header + (2 if key == "doc-0014" else 512 + 40)] ^= 1
        expected[key] = ("checksum", "bytes differ from the index (crc32)")
    shard.write_bytes(data)
    return sources, expected


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_fault_leaves_a_hole_that_is_named_and_nothing_moves_up(
    tmp_path: Path, byte_folder: Path, encoder: Encoder, num_workers: int
) -> None:
    def run(sources: list[Source]) -> list[StepBatches]:
        executor = make_executor(sources, encoder, augmentation=None, num_workers=num_workers)
        return list(executor)

    sources, expected = make_campaign(tmp_path, byte_folder)
    holed = run(sources)
    found = {hole["key"]: hole for hole in holes_of(holed)}
    assert set(found) | set(keys_of(holed)) == {f"doc-{i:04d}" for i in range(NUM_SAMPLES)}
    assert set(found) == set(expected)
    for key, (kind, message) in expected.items():
        assert found[key]["source"] == 0 and found[key]["kind"] == kind, found[key]
        assert f'sample "{key}"' in found[key]["reason"] and message in found[key]["reason"]

    packs = [pack for step in holed for micro in step.step.assign(1) for pack in micro]
    batches = [batch for step in holed for batch in step.batches]
    for pack, batch in zip(packs, batches, strict=True):
        planned = [sources[0].key(sample.sample_id) for sample in pack or ()]
        assert batch.keys == tuple(key for key in planned if key not in expected)
        assert {hole["key"] for hole in batch.holes} == set(planned) & set(expected)


@pytest.mark.parametrize("name, why", [("json", "invalid JSON"), ("png", "image"), ("nothing", "")])
def test_what_the_index_finds_is_left_out_with_its_reason(
    name: str, why: str, tmp_path: Path, byte_folder: Path, encoder: Encoder
) -> None:
    """A record that is no JSON, an image that is missing: not planned at all."""
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for sample in (make_sample(i) for i in range(3)):
            for member, data in sample.to_members().items():
                if member == "doc-0001.png" == f"doc-0001.{name}":
                    continue
                damaged = data[1:] if member == "doc-0001.json" == f"doc-0001.{name}" else data
                info = tarfile.TarInfo(member)
                info.size = len(damaged)
                tar.addfile(info, io.BytesIO(damaged))
    (source,) = open_sources(tmp_path, [[str(shard)]], byte_folder)
    keys = sorted(keys_of(list(make_executor([source], encoder))))
    if not why:
        assert keys == ["doc-0000", "doc-0001", "doc-0002"] and not source.left_out
        return
    assert keys == ["doc-0000", "doc-0002"]
    ((count, first),) = source.left_out.values()
    assert count == 1 and "doc-0001" in first and why in first


def test_a_page_of_one_by_twenty_thousand_pixels_is_left_out(
    tmp_path: Path, byte_folder: Path
) -> None:
    thin = with_image(make_sample(1), strip(20_000, 1), (20_000, 1))
    shard = write_shard(tmp_path / "a.tar", [make_sample(0), thin])
    (source,) = open_sources(tmp_path, [[str(shard)]], byte_folder)
    ((count, first),) = source.left_out.values()
    assert count == 1 and "doc-0001" in first and "20000 x 1 px" in first


def test_a_longer_example_than_planned_is_a_hole(
    tmp_path: Path, byte_folder: Path, encoder: Encoder
) -> None:
    shard = write_shard(tmp_path / "a.tar", [make_sample(0)])
    sources = open_sources(tmp_path, [[str(shard)]], byte_folder)
    maker = make_executor(sources, encoder, augmentation=None).maker
    planned = sources[0].draws(0, 0)[0]
    example = maker.example(planned, maker.fetch((planned,))[0])
    short = (planned._replace(tokens=len(example.input_ids) - 1),)
    batch = maker.build(short, maker.fetch(short))
    assert batch.keys == () and batch.weight_sum == 0.0
    assert batch.holes[0]["kind"] == "longer" and "tokens, planned" in batch.holes[0]["reason"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_replaced_during_a_run_stops_it(
    tmp_path: Path, byte_folder: Path, encoder: Encoder, num_workers: int
) -> None:
    shard = write_shard(tmp_path / "a.tar", [make_sample(i) for i in range(4)])
    sources = open_sources(tmp_path, [[str(shard)]], byte_folder)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ShardChangedError, match="cut off"):
        list(make_executor(sources, encoder, num_workers=num_workers))


def test_what_was_damaged_on_its_way_is_read_again_once(
    tmp_path: Path, byte_folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "a.tar", [make_sample(0)])
    sources = open_sources(tmp_path, [[str(shard)]], byte_folder)
    maker = make_executor(sources, encoder).maker
    pack = sources[0].draws(0, 0)
    (data,) = maker.fetch(pack)
    damaged = data[:700] + bytes([data[700] ^ 1]) + data[701:]
    garbage = bytes(len(data))
    answers: list[bytes] = []
    monkeypatch.setattr(type(maker._reader), "read", lambda *_: answers.pop(0))

    (hole,) = maker.build(pack, [damaged]).holes  # a local file is what it is
    assert hole["kind"] == "checksum"
    with pytest.raises(ShardChangedError):
        maker.build(pack, [garbage])

    monkeypatch.setattr("data_tools.stream.executor.is_local", lambda _: False)
    for first in (damaged, garbage):
        answers = [data]
        assert maker.build(pack, [first]).keys == ("doc-0000",) and not answers
    for second in (damaged, data[:900] + b"??" + data[902:]):
        answers = [second]
        (hole,) = maker.build(pack, [damaged]).holes
        assert hole["kind"] == "checksum" and not answers
    answers = [garbage]
    with pytest.raises(ShardChangedError):
        maker.build(pack, [garbage])


def wait_until_ready(executor: Executor) -> None:
    dispatcher: Any = executor._pool._dispatcher  # type: ignore[union-attr]
    while not all(worker.is_ready for worker in dispatcher._workers):
        time.sleep(0.01)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_workers_change_neither_packs_nor_contents(
    tmp_path: Path, byte_folder: Path, encoder: Encoder, how: signal.Signals
) -> None:
    shard = write_shard(tmp_path / "a.tar", [make_sample(i) for i in range(NUM_SAMPLES)])
    sources = open_sources(tmp_path, [[str(shard)]], byte_folder)
    expected = list(make_executor(sources, encoder, epochs=9))
    # Far more steps than fit into the queue: the lost worker has work left.
    executor = make_executor(
        sources, encoder, epochs=9, num_workers=2, timeout_s=5.0, max_bytes=100_000
    )
    found = []
    for step in executor:
        found.append(step)
        if len(found) == 2:
            wait_until_ready(executor)  # one that is stopped while it starts has nothing to lose
            os.kill(executor.worker_pids[0], how)
    assert_same_steps(found, expected)
    assert executor.counters["workers_replaced"] == 1


@dataclasses.dataclass(frozen=True)
class Deadly:
    """An augmentation that no process survives."""

    def __call__(self, sample: Sample, *_: Any) -> Any:
        if sample.key == "doc-0001":
            os.kill(os.getpid(), signal.SIGKILL)
        return (sample, _[0])


@pytest.mark.timeout(60)
def test_a_sample_that_no_worker_survives_is_named(
    tmp_path: Path, byte_folder: Path, encoder: Encoder
) -> None:
    shard = write_shard(tmp_path / "a.tar", [make_sample(i) for i in range(3)])
    sources = open_sources(tmp_path, [[str(shard)]], byte_folder)
    deadly: Any = Deadly()
    executor = make_executor(sources, encoder, augmentation=deadly, num_workers=1)
    with pytest.raises(WorkerLostError, match=r"signal 9.*the samples .*doc-0001"):
        list(executor)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(120)
def test_memory_stays_flat_over_three_epochs(tmp_path: Path, byte_folder: Path) -> None:
    """An epoch of these batches is a fifth of a process: what is kept of it would show."""
    buffer = io.BytesIO()
    Image.new("L", (588, 588), "white").save(buffer, "PNG")
    samples = [with_image(make_sample(i), buffer.getvalue(), (588, 588)) for i in range(120)]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    images, budgets = ImageSettings(784, 10**6), Budgets(2500, 10_000)
    (source,) = open_sources(
        tmp_path,
        [[shard]],
        byte_folder,
        images=images,
        recipe=Recipe((load_template("text-en"),), seed=1),
        budgets=budgets,
    )
    executor = make_executor(
        [source],
        Encoder.from_folder(byte_folder, images),
        budgets=budgets,
        epochs=4,
        num_workers=1,  # with more, one may not have had its largest pack yet
        max_bytes=10_000_000,
        augmentation=None,
    )
    peaks, num_bytes = np.zeros((4, 2)), 0
    for step in executor:
        num_bytes += sum(batch.pixels.nbytes for batch in step.batches)
        epoch = min(step.state.cursors[0] // len(source), 3)
        pids = [os.getpid(), *executor.worker_pids]
        peaks[epoch] = np.maximum(peaks[epoch], [resident_bytes(pid) for pid in pids])
    assert num_bytes == 4 * 120 * 588 * 588 * 3
    assert (peaks[2] <= 1.05 * peaks[0]).all(), peaks


def holes(count: int, kind: str = "image") -> list[dict[str, Any]]:
    return [{"key": f"k{i}", "kind": kind, "reason": f"reason {i}"} for i in range(count)]


def test_a_share_above_the_limit_stops_with_the_last_reason() -> None:
    counter = HoleCounter(0.001)
    counter.add(5000, holes(5))
    with pytest.raises(
        BadDataShareError, match=r"7 of 5100 .*max_hole_share = 0.001.*reason 1"
    ) as caught:
        counter.add(100, holes(2))
    assert caught.value.exit_code == EXIT_DATA


def test_holes_are_counted_by_kind() -> None:
    counter = HoleCounter(1.0)
    assert counter.by_kind == dict.fromkeys(KINDS, 0)
    counter.add(100, holes(2) + holes(1, "checksum"))
    counter.add(100, holes(3))
    assert counter.by_kind["image"] == 5 and counter.by_kind["checksum"] == 1
    assert counter.num_holes == 6


def test_a_share_at_the_limit_is_fine() -> None:
    counter = HoleCounter(0.01)
    for _ in range(100):
        counter.add(100, holes(1))


def test_few_samples_make_no_share() -> None:
    counter = HoleCounter(0.001)
    counter.add(10, holes(1))
    with pytest.raises(BadDataShareError):
        counter.add(10, holes(1))
    assert SAMPLES_BEFORE_SHARE * 0.001 == 1


def test_only_a_hole_stops_a_run() -> None:
    """A resumed run that starts above its share must not stop at a healthy step."""
    counter = HoleCounter(1.0)
    counter.add(1000, holes(900))
    counter._max_share = 0.5
    counter.add(10, [])


def test_a_limit_of_zero_allows_none() -> None:
    counter = HoleCounter(0.0)
    counter.add(10**6, [])
    with pytest.raises(BadDataShareError):
        counter.add(1, holes(1))
