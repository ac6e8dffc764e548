"""Open files stay few, whatever forks or pickles; what cannot be written is said in words."""

import errno
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_tools.errors import DataError
from data_tools.stream import files as files_module
from data_tools.stream.files import Descriptors, beside, read_at, write_atomically
from data_tools.stream.index import index_shard, open_index
from data_tools.stream.shard_index import reader
from tests.builders import make_sample, write_shards


def num_open_tars(folder: Path) -> int:
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return sum(name.startswith(str(folder)) and name.endswith(".tar") for name in names)


def test_reading_many_shards_keeps_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader._here.descriptors, "limit", 20)
    indexes = [open_index(shard) for shard in write_shards(tmp_path, [1] * 50)]
    for number in [*range(50), *range(50)]:
        assert indexes[number].read(0) == make_sample(number)
        assert num_open_tars(tmp_path) <= 20


def test_the_file_unused_for_longest_is_closed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    files = Descriptors(limit=2)
    assert files.read(str(paths[0]), "v1", 0, 9) == b"a"
    (first,) = files._files.values()
    for name in "bac":
        assert files.read(str(tmp_path / name), "v1", 0, 9) == name.encode()
    assert [Path(url).name for url, _ in files._files] == ["a", "c"]
    assert files._files[str(paths[0]), "v1"] is first
    del first
    files.close(str(paths[0]), "v1")
    assert len(files) == 1


def test_a_file_stays_open_while_a_thread_reads_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    files, pread = Descriptors(limit=1), os.pread

    def evicted_meanwhile(descriptor: int, size: int, offset: int) -> bytes:
        monkeypatch.setattr(os, "pread", pread)
        assert files.read(str(other), "v", 0, 9) == b"other"
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", evicted_meanwhile)
    assert files.read(str(one), "v", 0, 9) == b"one"
    assert len(files) == 1 and num_open_tars(tmp_path) == 0


def test_reads_longer_than_the_kernel_gives_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(files_module.os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at))
    with open(path, "rb") as file:
        assert read_at(file.fileno(), 3, 50) == bytes(range(3, 53))
        assert read_at(file.fileno(), 90, 50) == bytes(range(90, 100))
        assert read_at(file.fileno(), 200, 50) == b""


def test_files_beside_a_shard_or_in_a_folder_for_them() -> None:
    url = "s3://bucket/a/train.tar"
    assert beside(url, ".index") == "s3://bucket/a/train.tar.index"
    names = {
        beside(shard, suffix, "/indexes/")
        for shard in (url, "s3://bucket/b/train.tar", "/data/train.tar", "train.tar")
        for suffix in (".index", ".lengths-1")
    }
    assert len(names) == 8
    assert all(n.startswith("/indexes/") and "-train.tar." in n for n in names)
    assert beside("file:///data/train.tar", ".x", "d") == beside("/data/train.tar", ".x", "d")


def test_a_replaced_file_is_opened_anew(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [2])[0]
    assert open_index(shard).read(0) == make_sample(0)
    newer = write_shards(tmp_path / "new", [2], first=5)[0]
    os.replace(newer, shard)
    os.remove(f"{shard}.index")
    assert open_index(shard).read(0) == make_sample(5)


def test_an_index_that_has_been_read_from_can_be_pickled(tmp_path: Path) -> None:
    index = index_shard(write_shards(tmp_path, [2])[0])
    index.read(0)
    assert pickle.loads(pickle.dumps(index)).read(1) == make_sample(1)


def _read_often(shard: str, times: int) -> None:
    index = open_index(shard)
    for number in range(times):
        row = number % len(index)
        assert index.read(row) == make_sample(row)


def test_a_fork_does_not_move_its_parents_place(tmp_path: Path) -> None:
    """A forked process shares its parent's descriptors, read positions included."""
    shard = write_shards(tmp_path, [20])[0]
    _read_often(shard, 1)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read_often, args=(shard, 200)) for _ in range(2)]
    for process in processes:
        process.start()
    _read_often(shard, 200)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    shard = write_shards(tmp_path, [1])[0]

    local = type(fsspec.filesystem("file"))
    opened = local.open

    def read_only(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb":
            raise OSError(number, os.strerror(number), path)
        return opened(self, path, mode, **options)

    monkeypatch.setattr(local, "open", read_only)
    with pytest.raises(DataError, match=r"set data.index_dir \(commands: --index-dir\)") as caught:
        index_shard(shard)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} is not writable ({os.strerror(number)})")
    assert "train-000000.tar.index" in message


def test_other_failures_of_writing_are_no_data_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(str(tmp_path / "missing" / "x"), b"")
