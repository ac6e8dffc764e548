"""Range reads: exactly the bytes that were asked for, whatever the storage does."""

import errno
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import ConfigError, ShardChangedError, StorageError
from data_tools.stream import storage
from data_tools.stream.ranges import ByteRange, RangeReader, StorageSettings
from data_tools.stream.remote import exists
from data_tools.stream.storage import Attempts, shard_identity, shard_version, split_version
from tests.servers import KINDS, Faults, Server, always, every, first, never, serve_folder

CONTENT = bytes(range(256)) * 40
QUICK = StorageSettings(request_timeout_s=0.4, tries=9)
ETAG = "abc-7"
VERSION = shard_version(shard_identity(len(CONTENT), "digest"), ETAG)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(CONTENT)
    return tmp_path


def pieces(url: str, version: str = "") -> list[ByteRange]:
    return [ByteRange(url, version, start, 100 + start % 7) for start in range(0, 10_000, 997)]


def expected(ranges: list[ByteRange]) -> list[bytes]:
    return [CONTENT[item.offset : item.offset + item.size] for item in ranges]


def serve(folder: Path, faults: Faults = never) -> Any:
    return serve_folder(folder, faults)


def with_etag(server: Server) -> str:
    server.etags["/a.tar"] = ETAG
    return f"{server.url}/a.tar"


@given(st.lists(st.tuples(st.integers(0, 10_240), st.integers(0, 10_240)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_ranges_of_local_files(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "a.tar"
    path.write_bytes(CONTENT)
    ranges = [ByteRange(str(path), "v", a, min(b, len(CONTENT) - a)) for a, b in spans]
    assert RangeReader().read_many(ranges) == expected(ranges)


def test_local_and_remote_ranges_in_the_order_they_were_asked_for(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/ranges/a.tar", CONTENT)
    with serve(folder) as server:
        urls = [str(folder / "a.tar"), f"{server.url}/b.tar", "memory://ranges/a.tar"]
        urls.append(f"file://{folder}/b.tar")
        ranges = [item for parts in zip(*map(pieces, urls), strict=True) for item in parts]
        ranges += ranges[:5]  # asked for twice
        assert RangeReader().read_many(ranges) == expected(ranges)
        assert RangeReader().read_many([]) == []
        assert RangeReader().read(ByteRange(urls[1], "", 5, 0)) == b""
    memory.rm("/ranges", recursive=True)


def test_many_requests_are_in_flight(folder: Path) -> None:
    with serve(folder) as server:
        reader = RangeReader()
        url = f"{server.url}/a.tar"
        reader.read(ByteRange(url, "", 0, 1))
        barrier = threading.Barrier(30)

        def wait_for_all(method: str, path: str, number: int) -> str:
            return ""

        server.faults = wait_for_all
        answer = server.take

        def take(method: str, path: str, byte_range: str) -> str:
            barrier.wait(5)  # breaks, and so fails, unless 30 requests come together
            return answer(method, path, byte_range)

        server.take = take  # type: ignore[method-assign]
        ranges = [ByteRange(url, "", start, 10) for start in range(30)]
        assert reader.read_many(ranges) == expected(ranges)


@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_pass_change_nothing(folder: Path, kind: str) -> None:
    with serve(folder, every(3, kind)) as server:
        url, reader = with_etag(server), RangeReader(QUICK)
        ranges = pieces(url, VERSION)
        assert reader.read_many(ranges) == expected(ranges)
        assert server.faulted[kind] >= 3
        if kind not in ("slow", "reset"):  # aiohttp itself asks again after a reset
            assert reader.num_retries >= 2


@pytest.mark.parametrize(
    "kind, method",
    [*((kind, "GET") for kind in KINDS if kind != "slow"), ("stall", "HEAD")],
)
def test_faults_that_last_stop_within_the_deadline(folder: Path, kind: str, method: str) -> None:
    limits = StorageSettings(deadline_s=1.0, request_timeout_s=0.3)
    with serve(folder, always(kind, method)) as server:
        url, begin = with_etag(server), time.monotonic()
        with pytest.raises(StorageError, match="no correct answer in .* tries") as caught:
            RangeReader(limits).read_many(pieces(url, VERSION))
        assert time.monotonic() - begin < 4
    message = str(caught.value)
    assert url in message and "start the command again" in message and caught.value.exit_code == 70


def test_servers_that_know_no_head(folder: Path) -> None:
    with serve(folder, always("405", "HEAD")) as server:
        ranges = pieces(with_etag(server), VERSION)
        assert RangeReader().read_many(ranges) == expected(ranges)


@pytest.mark.parametrize("kind", ["500", "stall", "reset"])
def test_a_server_that_is_not_up_yet_is_not_taken_for_one_without_the_file(
    folder: Path, kind: str
) -> None:
    """The client of fsspec says "not found" of anything that goes wrong before the first range."""
    with serve(folder, lambda method, path, number: kind if number < 4 else "") as server:
        url = with_etag(server)
        assert exists(url, QUICK) and not exists(f"{server.url}/missing.tar", QUICK)
        ranges, start = pieces(url, VERSION), len(server.requests)
        server.faults = lambda method, path, number: kind if number < start + 4 else ""
        assert RangeReader(QUICK).read_many(ranges) == expected(ranges)
        server.faults = lambda method, path, number: kind
        with pytest.raises(StorageError, match="no correct answer"):
            exists(url, StorageSettings(deadline_s=1, request_timeout_s=0.3))


def test_no_more_tries_than_allowed(folder: Path) -> None:
    with serve(folder, always("500")) as server:
        reader = RangeReader(StorageSettings(tries=2))
        with pytest.raises(StorageError, match="in 2 tries"):
            reader.read(ByteRange(f"{server.url}/a.tar", "", 0, 10))
        assert server.faulted["500"] == 2 and reader.num_retries == 1


@pytest.mark.parametrize(
    "kind, complaint",
    [
        ("404", r"not found \(404\).* put it back"),
        ("403", r"access denied \(403\).* credentials"),
        ("401", r"access denied \(401\).* credentials"),
        ("400", "refused with status 400"),
    ],
)
def test_what_cannot_pass_is_asked_once(folder: Path, kind: str, complaint: str) -> None:
    with serve(folder, always(kind)) as server:
        url = with_etag(server)
        with pytest.raises(StorageError, match=f"{url}: {complaint}"):
            RangeReader().read(ByteRange(url, VERSION, 0, 10))
        assert server.faulted[kind] == 1


def test_a_server_that_ignores_ranges_is_named(folder: Path) -> None:
    with serve(folder, always("whole")) as server:
        url = with_etag(server)
        with pytest.raises(StorageError, match="ignores byte ranges .* data.storage.cache_dir"):
            RangeReader().read_many(pieces(url, VERSION))
        assert server.faulted["whole"] == 1, "more than one whole shard was sent"


def test_a_replaced_object_is_noticed_by_its_etag(folder: Path) -> None:
    with serve(folder) as server:
        url = with_etag(server)
        assert RangeReader().read(ByteRange(url, VERSION, 0, 9)) == CONTENT[:9]
        server.etags["/a.tar"] = "other"
        with pytest.raises(
            ShardChangedError, match="ETag is other, its index says abc-7"
        ) as caught:
            RangeReader().read(ByteRange(url, VERSION, 0, 9))
        assert f"python -m data_tools.index {url}" in str(caught.value)


def test_a_replaced_object_is_noticed_by_its_size(folder: Path) -> None:
    with serve(folder) as server:
        url = with_etag(server)
        (folder / "a.tar").write_bytes(CONTENT[:-1])
        with pytest.raises(ShardChangedError, match="has 10239 bytes, its index says 10240"):
            RangeReader().read(ByteRange(url, VERSION, 0, 9))


def test_an_object_cut_off_while_it_is_read_is_noticed(folder: Path) -> None:
    """The first check has passed; the short answers make the reader look again."""
    with serve(folder) as server:
        url, reader = with_etag(server), RangeReader()
        reader.read(ByteRange(url, VERSION, 0, 9))
        (folder / "a.tar").write_bytes(CONTENT[:5000])
        for offset in (4990, 6000):
            with pytest.raises(ShardChangedError, match="was replaced: it has 5000 bytes"):
                reader.read(ByteRange(url, VERSION, offset, 100))


def test_the_version_is_asked_for_once_a_process(folder: Path) -> None:
    with serve(folder) as server:
        url, reader = with_etag(server), RangeReader()
        for _ in range(3):
            reader.read_many(pieces(url, VERSION))
        assert [method for method, *_ in server.requests].count("HEAD") == 1


def test_a_slow_request_gets_a_second_one_beside_it(folder: Path) -> None:
    with serve(folder, first(1, "stall")) as server:
        reader = RangeReader(StorageSettings(hedge_after_s=0.1))
        begin = time.monotonic()
        item = ByteRange(f"{server.url}/a.tar", "", 7, 100)
        assert reader.read(item) == CONTENT[7:107]
        assert time.monotonic() - begin < 2 and reader.num_retries == 0
        assert server.faulted == {"stall": 1, "": 1}


def test_a_second_request_that_fails_does_not_spoil_the_first(folder: Path) -> None:
    with serve(folder, lambda method, path, number: "500" if number else "late") as server:
        reader = RangeReader(StorageSettings(hedge_after_s=0.1))
        assert reader.read(ByteRange(f"{server.url}/a.tar", "", 7, 100)) == CONTENT[7:107]
        assert reader.num_retries == 0 and server.faulted == {"late": 1, "500": 1}


def test_local_files_that_are_gone_or_cut_off(folder: Path) -> None:
    path = folder / "a.tar"
    reader = RangeReader()
    with pytest.raises(StorageError, match=r"missing.tar: cannot be read \(No such file"):
        reader.read(ByteRange(str(folder / "missing.tar"), "v", 0, 1))
    with pytest.raises(StorageError, match=r"cannot be read \(Is a directory"):
        reader.read(ByteRange(str(folder), "v", 0, 1))
    with pytest.raises(ShardChangedError, match="bytes 10000 to 10999 are asked for but it ends"):
        reader.read(ByteRange(str(path), "v", 10_000, 1000))


def test_a_network_disk_that_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, failures = os.pread, [errno.EIO, errno.ESTALE]

    def flaky(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "flaky")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    reader = RangeReader()
    assert reader.read(ByteRange(str(folder / "a.tar"), "v", 3, 9)) == CONTENT[3:12]
    assert reader.num_retries == 2
    failures.extend([errno.EIO] * 9)
    with pytest.raises(StorageError, match="in 2 tries .* flaky"):
        RangeReader(StorageSettings(tries=2)).read(ByteRange(str(folder / "a.tar"), "v", 3, 9))


def test_filesystems_without_coroutines_are_tried_again_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/flaky/a.tar", CONTENT)
    cat, failures = type(memory).cat_file, [OSError("flaky"), TimeoutError()]

    def flaky(self: Any, path: str, start: int, end: int) -> bytes:
        if failures:
            raise failures.pop()
        return cat(self, path, start, end)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    reader, version = RangeReader(), shard_identity(len(CONTENT), "digest")
    assert reader.read(ByteRange("memory://flaky/a.tar", version, 3, 9)) == CONTENT[3:12]
    assert reader.num_retries == 2

    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: threading.Event().wait(3))
    begin = time.monotonic()
    with pytest.raises(StorageError, match="no answer in time"):
        limits = StorageSettings(tries=2, request_timeout_s=0.2)
        RangeReader(limits).read(ByteRange("memory://flaky/a.tar", "", 3, 9))
    assert time.monotonic() - begin < 2
    memory.rm("/flaky", recursive=True)


def _read_in_child(reader: RangeReader, url: str) -> None:
    ranges = pieces(url, VERSION) + pieces(url)
    assert reader.read_many(ranges) == expected(ranges)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_used_reader_works_in_other_processes(folder: Path, method: str) -> None:
    with serve(folder) as server:
        reader, url = RangeReader(), with_etag(server)
        _read_in_child(reader, url)
        _read_in_child(reader, str(folder / "a.tar"))
        context = multiprocessing.get_context(method)
        processes = [
            context.Process(target=_read_in_child, args=(reader, place))
            for place in (url, str(folder / "a.tar"))
        ]
        for process in processes:
            process.start()
        _read_in_child(reader, url)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]


def test_a_pickled_reader_keeps_settings_and_starts_to_count_anew(folder: Path) -> None:
    with serve(folder, first(1, "500")) as server:
        reader = RangeReader(QUICK)
        reader.read(ByteRange(f"{server.url}/a.tar", "", 0, 1))
        assert reader.num_retries == 1
        copy = pickle.loads(pickle.dumps(reader))
        assert copy.settings == QUICK and copy.num_retries == 0
        assert len(pickle.dumps(reader)) < 1000


def test_threads_share_a_reader(folder: Path) -> None:
    with serve(folder, every(7, "500")) as server:
        reader, results = RangeReader(), []
        ranges = pieces(with_etag(server), VERSION) + pieces(str(folder / "b.tar"), "v")
        threads = [
            threading.Thread(target=lambda: results.append(reader.read_many(ranges)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected(ranges)] * 8


def test_pauses_double_and_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    drawn = []
    for _ in range(50):
        attempts = Attempts(StorageSettings(tries=6))
        drawn.append([attempts.pause_s("x", OSError("y")) for _ in range(5)])
    for number, pauses in enumerate(zip(*drawn, strict=True)):
        middle = 0.2 * 2**number
        assert 0.5 * middle <= min(pauses) < 0.8 * middle
        assert 1.2 * middle < max(pauses) <= 1.5 * middle


def test_versions_come_apart_as_they_were_put_together() -> None:
    identity = shard_identity(1234, "ab12")
    for etag in ("", "abc", "0123-45", "a-b-c"):
        assert split_version(shard_version(identity, etag)) == (1234, etag)
    assert split_version("") == (None, "") and split_version("v1") == (None, "")


def test_unknown_storage_is_a_mistake_of_the_user() -> None:
    with pytest.raises(ConfigError, match="nosuch://x/y: .*nosuch"):
        RangeReader().read(ByteRange("nosuch://x/y", "", 0, 1))
    with pytest.raises(ConfigError, match="cache_dir is s3://x; expected a local folder"):
        RangeReader(StorageSettings(cache_dir="s3://x"))
