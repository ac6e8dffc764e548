"""The index of a shard: round trip, foreign tars, damage, races."""

import dataclasses
import io
import json
import multiprocessing
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.sample import Annotation, Sample
from data_tools.stream.files import write_atomically
from data_tools.stream.index import (
    ShardChangedError,
    expand,
    index_path,
    index_shard,
    iterate_samples,
    open_index,
    same_shards,
)
from tests.builders import make_sample, write_shard, write_shards

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, **options: Any) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def members_of(*samples: Sample) -> Members:
    return [item for sample in samples for item in sample.to_members().items()]


def test_every_sample_comes_back_as_it_was(tmp_path: Path) -> None:
    samples = [make_sample(i, num_images=i % 4) for i in range(9)]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    for index in (index_shard(shard), open_index(shard)):
        assert len(index) == 9 and index.keys == tuple(sample.key for sample in samples)
        assert [index.read(row) for row in (8, 0, 3, 1, 2, 4, 5, 6, 7)] == [
            samples[row] for row in (8, 0, 3, 1, 2, 4, 5, 6, 7)
        ]
        sizes = [[p.width, p.height] for sample in samples for p in sample.images]
        assert index.image_wh.tolist() == sizes
        characters = [sum(len(a.text) for a in sample.annotations) for sample in samples]
        assert index.num_chars.tolist() == characters


def test_the_stored_index_equals_the_made_one(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [5])[0]
    made, stored = index_shard(shard), open_index(shard)
    for field in dataclasses.fields(made):
        one, other = getattr(made, field.name), getattr(stored, field.name)
        assert type(one) is type(other)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_empty_shards_have_empty_indexes(tmp_path: Path) -> None:
    shard = str(write_shard(tmp_path / "a.tar", []))
    assert len(index_shard(shard)) == 0 and len(open_index(shard)) == 0


def test_stock_webdataset_reads_our_shards(tmp_path: Path) -> None:
    samples = [make_sample(0), make_sample(1, num_images=2), make_sample(2, num_images=0)]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    records = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [record["__key__"] for record in records] == [sample.key for sample in samples]
    for record, sample in zip(records, samples, strict=True):
        images = tuple(record[name] for name in sorted(record) if name.endswith("png"))
        assert Sample.from_json(sample.key, json.loads(record["json"]), images) == sample


def test_we_read_shards_of_stock_webdataset(tmp_path: Path) -> None:
    samples = [make_sample(i, num_images=1 + i % 3) for i in range(5)]
    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as writer:
        for sample in samples:
            parts = {name.split(".", 1)[1]: data for name, data in sample.to_members().items()}
            writer.write({"__key__": sample.key} | parts)
    assert list(iterate_samples([path])) == samples


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize("key", ["doc", "发票-1", "x" * 98, "x" * 200, "a b", "sub.dir/doc"])
def test_any_tar_format_and_key(tmp_path: Path, key: str, tar_format: int) -> None:
    if len(key) > 90 and tar_format == tarfile.USTAR_FORMAT:
        pytest.skip("ustar holds no name of this length")
    samples = [dataclasses.replace(make_sample(i), key=f"{key}{i}") for i in range(2)]
    shard = write_tar(tmp_path / "a.tar", members_of(*samples), format=tar_format)
    index = index_shard(shard)
    assert [index.read(row) for row in range(2)] == samples


def test_names_as_tar_writes_them(tmp_path: Path) -> None:
    """`tar cf x.tar .` puts "./" in front of names; some systems add files of their own."""
    samples = [make_sample(i) for i in range(2)]
    members: Members = [("README", b"hello"), ("./._doc-0000.png", b"junk")]
    members += [(f"./{name}", data) for name, data in members_of(*samples)]
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert [index.read(row) for row in range(2)] == samples


def test_pages_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    sample = make_sample(0, num_images=12)
    sample = dataclasses.replace(sample, image_bytes=tuple(b"page %d" % i for i in range(12)))
    members = sorted(members_of(sample))
    assert [name for name, _ in members][2] == "doc-0000.10.png"
    assert index_shard(write_tar(tmp_path / "a.tar", members)).read(0) == sample


def test_extensions_may_be_in_capitals_and_others_are_left_alone(tmp_path: Path) -> None:
    sample = make_sample(0)
    (_, image), (_, record) = members_of(sample)
    members = [
        ("doc-0000.ocr.json", b"[]"),
        ("doc-0000.PNG", image),
        ("doc-0000.txt", b"x"),
        ("doc-0000.json", record),
    ]
    assert index_shard(write_tar(tmp_path / "a.tar", members)).read(0) == sample


SAMPLES = [make_sample(0), make_sample(1)]
IMAGE_0, JSON_0, IMAGE_1, JSON_1 = members_of(*SAMPLES)


@pytest.mark.parametrize(
    "members, complaint",
    [
        ([IMAGE_0, IMAGE_1, JSON_0, JSON_1], '"doc-0000": no doc-0000.json'),
        ([JSON_0, JSON_1, IMAGE_0, IMAGE_1], '"doc-0000": 0 image files, 1 in doc-0000.json'),
        ([IMAGE_0, JSON_0, IMAGE_1, JSON_1, IMAGE_0, JSON_0], '"doc-0000" are not adjacent'),
        ([IMAGE_0, JSON_0, JSON_0], '"doc-0000": two doc-0000.json'),
        ([IMAGE_0, IMAGE_1, JSON_1], '"doc-0000": no doc-0000.json'),
        ([IMAGE_0, IMAGE_0, JSON_0], '"doc-0000": 2 image files, 1 in'),
        ([IMAGE_0, ("doc-0000.json", b"{")], '"doc-0000": doc-0000.json is no valid JSON'),
        ([IMAGE_0, ("doc-0000.json", b"[]")], '"doc-0000": doc-0000.json holds no JSON object'),
        ([IMAGE_0, ("doc-0000.json", b'{"version": 1}')], '"doc-0000": malformed JSON member'),
        ([IMAGE_0, ("doc-0000.json", b'"\xff"')], '"doc-0000": doc-0000.json is no valid JSON'),
        ([("a\nb.json", JSON_0[1])], "holds a character that no key may have"),
    ],
)
def test_foreign_shards_are_refused_by_name(
    tmp_path: Path, members: Members, complaint: str
) -> None:
    shard = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=complaint) as caught:
        index_shard(shard)
    assert shard in str(caught.value)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_interleaved_members_are_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [JSON_0, JSON_1, IMAGE_0])
    no_images = dataclasses.replace(SAMPLES[0], images=(), annotations=(), image_bytes=())
    members = [*members_of(no_images), JSON_1, IMAGE_1, ("doc-0000.png", b"x")]
    shard = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match='"doc-0000" are not adjacent'):
        index_shard(shard)


def cuts(size: int) -> list[int]:
    return [0, 1, 511, 512, 700, *range(1024, size - 1024, 512), size // 2 + 7]


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = Path(write_shards(tmp_path, [3])[0])
    data = whole.read_bytes()
    content = data.rstrip(b"\0")
    cut = tmp_path / "cut.tar"
    for size in cuts(len(content)):
        cut.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cut.tar"):
            index_shard(str(cut))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    shard = Path(write_shards(tmp_path, [3])[0])
    index = index_shard(str(shard))
    data = bytearray(shard.read_bytes())
    data[int(index.offset[1]) + 10] ^= 1
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=f"damaged or cut off at byte {int(index.offset[1])}"):
        index_shard(str(damaged))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: no readable tar file"):
        index_shard(str(shard))


def test_a_replaced_shard_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [3])[0]
    index_shard(shard)
    write_shards(tmp_path, [3], first=5)
    with pytest.raises(ShardChangedError, match=r"another version of this shard .* delete it"):
        open_index(shard)
    os.remove(index_path(shard))
    assert open_index(shard).keys[0] == "doc-0005"


@pytest.mark.parametrize("kind", ["cut", "other keys", "zeros"])
def test_a_shard_replaced_while_it_is_open_is_noticed(tmp_path: Path, kind: str) -> None:
    shard = write_shards(tmp_path, [3])[0]
    index = open_index(shard)
    data = Path(shard).read_bytes()
    changed = {
        "cut": data[: int(index.offset[2]) + 100],
        "other keys": data.replace(b"doc-0002", b"doc-9999"),
        "zeros": bytes(len(data)),
    }
    Path(shard).write_bytes(changed[kind])
    with pytest.raises(ShardChangedError, match='sample "doc-0002": the shard does not hold what'):
        index.read(2)


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    shard = write_shards(tmp_path, [1])[0]
    Path(index_path(shard)).write_bytes(content)
    with pytest.raises(DataError, match=r"no readable index .* delete it"):
        open_index(shard)


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    """Each writer holds its file open until all have begun: a shared name would be mixed up."""
    target = str(tmp_path / "x")
    contents = [bytes([number]) * 10_000 for number in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(target, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Path(target).read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


def test_names_of_unfinished_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for processes of the same number on two nodes."""
    moved: list[str] = []
    filesystem = fsspec.filesystem("file")
    monkeypatch.setattr(type(filesystem), "mv", lambda _, source, target: moved.append(source))
    monkeypatch.setattr("os.getpid", lambda: 7)
    for _ in range(3):
        write_atomically(str(tmp_path / "x"), b"")
    assert len(set(moved)) == 3


def _index_often(shard: str, times: int) -> None:
    for _ in range(times):
        assert len(index_shard(shard)) == 20
        assert len(open_index(shard)) == 20


def test_two_processes_index_one_shard(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [20])[0]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_index_often, args=(shard, 20)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["train-000000.tar", "train-000000.tar.index"]


def test_shards_behind_a_url(tmp_path: Path) -> None:
    local = write_shards(tmp_path, [2])[0]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tar", Path(local).read_bytes())
    url = "memory://bucket/a.tar"
    assert expand(["memory://bucket/*.tar"]) == ["memory:///bucket/a.tar"]
    for _ in range(2):  # made, then opened
        index = open_index(url)
        assert index.read(1) == make_sample(1)
    memory.rm("/bucket", recursive=True)


def test_patterns_are_sorted_and_must_match(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [1, 1, 1])
    assert expand([f"{tmp_path}/*.tar"]) == shards
    assert expand([shards[2], shards[0]]) == [shards[2], shards[0]]
    with pytest.raises(DataError, match=r"no shard matches .*nothing-\*.tar"):
        expand([f"{tmp_path}/nothing-*.tar"])


def test_braces_are_those_of_webdataset(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [1] * 11)
    assert expand([f"{tmp_path}/train-{{000008..000010}}.tar"]) == shards[8:]
    assert expand([f"{tmp_path}/train-00000{{1,0}}.tar"]) == [shards[1], shards[0]]
    assert expand([f"{tmp_path}/{{train-000003,train-00000[56]}}.tar"]) == [
        shards[i] for i in (3, 5, 6)
    ]
    odd = write_shards(tmp_path / "}", [1])
    assert expand(odd) == odd


@pytest.mark.parametrize("braces", ["{000000..000003}", "{000000,*7}", "{000000"])
def test_braces_that_match_nothing_are_named(tmp_path: Path, braces: str) -> None:
    write_shards(tmp_path, [1, 1])
    with pytest.raises(DataError) as caught:
        expand([f"{tmp_path}/train-{braces}.tar"])
    assert f"{tmp_path}/train-{braces}.tar" in str(caught.value)


def test_shards_in_both_lists_are_found_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = write_shards(tmp_path, [1, 1, 1])
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    other = ["train-000001.tar", f"{tmp_path}/link/train-000002.tar", "memory://a/b.tar"]
    assert same_shards([first, second, third, second], other) == [second, third]
    assert same_shards(["memory:///a/b.tar", first], other) == ["memory:///a/b.tar"]
    assert same_shards([first], [second]) == []


keys = st.lists(
    st.text("abcXYZ019-_发é ", min_size=1, max_size=20).filter(str.strip),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(keys, st.data())
@settings(max_examples=40, deadline=None)
def test_any_mix_of_samples_comes_back(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    samples = []
    for number, key in enumerate(keys):
        base = make_sample(number, num_images=data.draw(st.integers(0, 3)), num_lines=1)
        blobs = tuple(data.draw(st.binary(max_size=600)) for _ in base.images)
        annotation = Annotation(data.draw(st.text(st.characters(exclude_categories=["Cs"]))))
        samples.append(
            dataclasses.replace(base, key=key, image_bytes=blobs, annotations=(annotation,))
        )
    shard = str(write_shard(folder / "a.tar", samples))
    assert list(iterate_samples([shard])) == samples
