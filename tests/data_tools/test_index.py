"""The index of a shard: round trip, foreign tars, damage, races."""

import dataclasses
import json
import mmap
import multiprocessing
import os
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from data_tools.errors import DataError
from data_tools.sample import Annotation, Sample
from data_tools.stream.files import write_atomically
from data_tools.stream.index import (
    ShardChangedError,
    expand,
    index_path,
    index_shard,
    index_shards,
    iterate_samples,
    open_index,
    same_shards,
)
from data_tools.stream.shard_index import Keys
from tests.builders import make_sample, write_shard, write_shards
from tests.data_tools.tars import Members, members_of, write_tar


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


def test_a_replaced_shard_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [3])[0]
    index_shard(shard)
    write_shards(tmp_path, [3], first=5)
    complaint = f"another version of this shard .* index it again: .*data_tools.index {shard}"
    with pytest.raises(ShardChangedError, match=complaint):
        open_index(shard)
    with pytest.raises(ShardChangedError, match=complaint):
        index_shards([shard], workers=1)
    assert index_shards([shard], workers=1, replace=True) == [shard]
    assert open_index(shard).keys[0] == "doc-0005"


def test_missing_indexes_alone_are_made(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [1, 2, 3])
    index_shard(shards[1])
    assert index_shards([*shards, shards[0]], workers=1) == [shards[0], shards[2]]
    times = [os.stat(index_path(shard)).st_mtime_ns for shard in shards]
    assert index_shards(shards, workers=2) == []
    assert [os.stat(index_path(shard)).st_mtime_ns for shard in shards] == times


@pytest.mark.timeout(120)
def test_indexes_are_made_by_several_processes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [1, 2, 0])
    Path(shards[1]).write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"train-000001.tar: no readable tar file"):
        index_shards(shards, workers=2)
    assert [os.path.exists(index_path(shard)) for shard in shards] == [True, False, True]


def test_an_index_of_an_earlier_release_is_made_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [2])[0]
    old = save({"offset": np.zeros(2, np.uint64)}, {"version": "1", "tar_bytes": "10240"})
    Path(index_path(shard)).write_bytes(old)
    assert index_shards([shard], workers=1) == [shard]
    Path(index_path(shard)).write_bytes(old)
    assert open_index(shard).read(1) == make_sample(1)


def test_indexes_of_read_only_data_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    one = write_shards(tmp_path / "one", [2])[0]
    two = write_shards(tmp_path / "two", [1], first=7)[0]
    folder = str(tmp_path / "new" / "indexes")
    assert index_shards([one, two], workers=1, index_dir=folder) == [one, two]
    assert sorted(os.listdir(tmp_path / "one")) == ["train-000000.tar"]
    names = os.listdir(folder)
    assert len(names) == 2 and all(name.endswith("-train-000000.tar.index") for name in names)
    assert open_index(two, folder).read(0) == make_sample(7)
    assert open_index(one, folder).keys == ["doc-0000", "doc-0001"]
    relative = os.path.relpath(one)
    assert index_path(relative, folder) == index_path(one, folder)
    Path(folder, "x").touch()
    with pytest.raises(DataError, match="data.index_dir: .*x cannot be made"):
        index_shard(one, index_dir=f"{folder}/x")


def test_keys_are_decoded_when_they_are_asked_for(tmp_path: Path) -> None:
    keys = Keys.of(["a", "", "发票", "x" * 300])
    assert [keys[row] for row in (0, 1, 2, 3, -1, -4)] == [
        "a", "", "发票", "x" * 300, "x" * 300, "a",
    ]  # fmt: skip
    assert keys[1:3] == ("", "发票") and list(keys) == ["a", "", "发票", "x" * 300]
    assert "发票" in keys and keys.index("发票") == 2 and "b" not in keys
    assert keys == ["a", "", "发票", "x" * 300] and keys != ["a"] and len(keys) == 4
    with pytest.raises(IndexError):
        keys[4]


def test_the_columns_are_mapped_not_read(tmp_path: Path) -> None:
    index = open_index(write_shards(tmp_path, [5])[0])
    for column in (index.offset, index.crc32, index.keys.blob):
        while isinstance(column.base, np.ndarray):
            column = column.base
        assert isinstance(column, mmap.mmap) or isinstance(column.base, mmap.mmap)
        assert not index.offset.flags.writeable


def test_records_can_be_read_without_images(tmp_path: Path) -> None:
    samples = [make_sample(i, num_images=i % 3) for i in range(6)]
    shard = write_tar(tmp_path / "a.tar", [*members_of(*samples), ("z.json", b"{")])
    index = index_shard(shard)
    found = index.read_records([5, 0, 6, 2])
    assert [str(sample) for sample in found if isinstance(sample, DataError)] == [
        f'{shard}, sample "z": {index.reasons[6]}'
    ]
    expected = [dataclasses.replace(samples[row], image_bytes=()) for row in (5, 0, 2)]
    assert [sample for sample in found if not isinstance(sample, DataError)] == expected
    whole = index.read_many([3, 6, 1])
    assert whole[0] == samples[3] and whole[2] == samples[1] and isinstance(whole[1], DataError)


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
    complaint = (
        "was cut off or replaced" if kind == "cut" else '"doc-0002": the shard does not hold'
    )
    with pytest.raises(ShardChangedError, match=complaint):
        index.read(2)


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    shard = write_shards(tmp_path, [1])[0]
    Path(index_path(shard)).write_bytes(content)
    with pytest.raises(DataError, match=r"no readable index; delete it"):
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
