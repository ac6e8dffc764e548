"""Local copies of remote shards: fetched once a node, within a size limit, never a wrong byte."""

import fcntl
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import ConfigError, StorageError
from data_tools.stream import ranges as ranges_module
from data_tools.stream import storage
from data_tools.stream.cache import PARTIAL, ShardCache, _lock_name
from data_tools.stream.ranges import ByteRange, RangeReader, StorageSettings
from data_tools.stream.storage import shard_identity, shard_version
from tests.servers import Server, always, every, serve_folder

SIZE = 10_000


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.02)


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def write_files(folder: Path, num: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(num):
        (folder / f"{number}.tar").write_bytes(content(number))


def shard(server: Server, number: int, offset: int = 0, size: int = 100) -> ByteRange:
    server.etags[f"/{number}.tar"] = f"etag{number}"
    version = shard_version(shard_identity(SIZE, "digest"), f"etag{number}")
    return ByteRange(f"{server.url}/{number}.tar", version, offset, size)


def reader_of(folder: Path, num_shards: int = 3) -> RangeReader:
    return RangeReader(StorageSettings(cache_dir=str(folder), cache_bytes=num_shards * SIZE))


def copies(folder: Path) -> list[str]:
    return sorted(p.name.split("-")[1] for p in folder.iterdir() if p.is_file())


def num_fetched(server: Server, number: int) -> int:
    return sum(m == "GET" and path == f"/{number}.tar" for m, path, _ in server.requests)


def test_a_shard_is_fetched_once_and_read_from_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges_module, "PIECE_BYTES", 1024)
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data") as server:
        for _ in range(2):
            reader = reader_of(tmp_path / "cache")
            ranges = [shard(server, number, 1234, 700) for number in (0, 1, 0)]
            assert reader.read_many(ranges) == [content(n)[:700] for n in (0, 1, 0)]
        assert num_fetched(server, 0) == num_fetched(server, 1) == 10
        assert copies(tmp_path / "cache") == ["0.tar", "1.tar"]


def test_the_copies_unused_for_longest_make_room(tmp_path: Path) -> None:
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data") as server:
        reader = reader_of(tmp_path / "cache")
        for number in (0, 1, 2, 0, 3):
            time.sleep(0.01)
            assert reader.read(shard(server, number)) == content(number)[:100]
        assert copies(tmp_path / "cache") == ["0.tar", "2.tar", "3.tar"]


def test_a_shard_larger_than_the_limit_is_read_by_range(tmp_path: Path) -> None:
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data") as server:
        reader = RangeReader(StorageSettings(cache_dir=str(tmp_path / "c"), cache_bytes=SIZE - 1))
        assert reader.read(shard(server, 1)) == content(1)[:100]
        assert copies(tmp_path / "c") == []
        assert [r for m, _, r in server.requests if m == "GET"] == ["bytes=0-99"]


def test_a_replaced_shard_is_fetched_again(tmp_path: Path) -> None:
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data") as server:
        reader = reader_of(tmp_path / "cache")
        assert reader.read(shard(server, 0)) == content(0)[:100]
        (tmp_path / "data" / "0.tar").write_bytes(content(9))
        server.etags["/0.tar"] = "new"
        version = shard_version(shard_identity(SIZE, "digest"), "new")
        assert reader.read(ByteRange(f"{server.url}/0.tar", version, 0, 5)) == content(9)[:5]
        assert copies(tmp_path / "cache") == ["0.tar", "0.tar"]


def test_faults_while_a_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_module, "PIECE_BYTES", 1024)
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data", every(4, "500", "truncated", "reset")) as server:
        reader = reader_of(tmp_path / "cache", 4)
        ranges = [shard(server, number, 0, SIZE) for number in range(3)]
        assert reader.read_many(ranges) == [content(number) for number in range(3)]
        server.faults = always("404")
        with pytest.raises(StorageError, match="not found"):
            reader.read(shard(server, 3))
        assert copies(tmp_path / "cache") == ["0.tar", "1.tar", "2.tar"]


def test_servers_that_ignore_ranges_can_be_used_with_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges_module, "PIECE_BYTES", 1024)
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data", always("whole")) as server:
        item = shard(server, 2, 9_000, 1000)
        reader = reader_of(tmp_path / "cache")
        assert reader.read(item) == content(2)[:1000]
        assert reader.read(shard(server, 2)) == content(2)[:100]
        assert num_fetched(server, 2) == 2
        assert copies(tmp_path / "cache") == ["2.tar"]


def _read_all(folder: str, items: list[ByteRange], times: int) -> None:
    reader = reader_of(Path(folder), 2)
    for _ in range(times):
        for item in items:
            number = int(item.url.split("/")[-1].removesuffix(".tar"))
            assert reader.read(item) == content(number)[:100]


@pytest.mark.timeout(120)
def test_processes_share_copies_and_evict_under_each_other(tmp_path: Path) -> None:
    write_files(tmp_path / "data", 5)
    with serve_folder(tmp_path / "data", every(1, "slow")) as server:
        context = multiprocessing.get_context("spawn")
        items = [shard(server, number) for number in range(5)]
        arguments = [
            (str(tmp_path / "one"), items[:2], 3),
            (str(tmp_path / "one"), items[:2], 3),
            (str(tmp_path / "two"), items[2:], 10),
            (str(tmp_path / "two"), items[:1:-1], 10),
        ]
        processes = [context.Process(target=_read_all, args=a) for a in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [0] * 4
        assert copies(tmp_path / "one") == ["0.tar", "1.tar"]
        assert [num_fetched(server, number) for number in (0, 1)] == [1, 1], "once a node"
        assert len(copies(tmp_path / "two")) <= 2


def test_a_copy_that_is_evicted_before_it_is_read_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "data")
    path_of, num_lost = ShardCache.path_of, [2]

    def evicted(self: ShardCache, *arguments: Any) -> str | None:
        path = path_of(self, *arguments)
        if num_lost[0] and path is not None:
            num_lost[0] -= 1
            os.remove(path)
        return path

    monkeypatch.setattr(ShardCache, "path_of", evicted)
    with serve_folder(tmp_path / "data") as server:
        assert reader_of(tmp_path / "cache").read(shard(server, 1)) == content(1)[:100]
        num_lost[0] = 99  # then it is read by range
        assert reader_of(tmp_path / "cache").read(shard(server, 2)) == content(2)[:100]


def test_what_an_ended_process_left_is_removed(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    left = tmp_path / f"{'0' * 32}-x.tar{PARTIAL}"
    busy = tmp_path / f"{'1' * 32}-y.tar{PARTIAL}"
    for path in (left, busy):
        path.write_bytes(bytes(SIZE))

    def fill(url: str, version: str, size: int, descriptor: int) -> None:
        os.pwrite(descriptor, content(5), 0)

    with open(tmp_path / "locks" / _lock_name("1" * 32), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path_of = cache.path_of("s3://b/new.tar", "v", SIZE, fill)
    assert path_of is not None and Path(path_of).read_bytes() == content(5)
    assert not left.exists() and busy.exists()
    with open(tmp_path / "locks" / _lock_name("1" * 32), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cache.path_of("s3://b/other.tar", "v", 2 * SIZE, fill) is None, "no room beside busy"


def test_too_small_a_cache_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path / "data")
    with serve_folder(tmp_path / "data") as server:
        reader = reader_of(tmp_path / "cache", 1)
        with caplog.at_level(logging.WARNING):
            for number in (0, 1, 0, 1, 0):
                reader.read(shard(server, number))
    assert len(caplog.records) == 1 and "raise data.storage.cache_gb" in caplog.text


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = ShardCache(tmp_path, 2 * SIZE)
    with pytest.raises(StorageError, match="no copy of s3://b/x.tar .*No space left.*cache_gb"):
        cache.path_of("s3://b/x.tar", "v", SIZE, lambda *_: None)
    assert copies(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data.storage.cache_dir: .*file.* cannot be used"):
        ShardCache(tmp_path / "file", SIZE)
