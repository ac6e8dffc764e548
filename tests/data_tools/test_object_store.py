"""Shards in object stores and behind HTTP: every sample as from local files, whatever happens."""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataError, ShardChangedError, StorageError
from data_tools.sample import Sample
from data_tools.stream import storage
from data_tools.stream.index import (
    ShardIndex,
    _stored,
    expand,
    index_path,
    index_shard,
    index_shards,
    iterate_samples,
    open_index,
)
from data_tools.stream.ranges import RangeReader, StorageSettings
from tests.builders import make_sample, write_shard, write_shards
from tests.data_tools.tars import PAGE, encode, members_of, write_tar
from tests.servers import KINDS, Server, always, every, never, serve_folder, serve_s3

Serve = Callable[..., AbstractContextManager[Server]]
QUICK = StorageSettings(request_timeout_s=0.5, tries=9)
NAMES = ("train-000000.tar", "train-000001.tar")
both = pytest.mark.parametrize("serve", [serve_folder, serve_s3], ids=["http", "s3"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bucket")
    write_shards(folder, [5, 6], num_images=2)
    return folder


@pytest.fixture(scope="module", params=[serve_folder, serve_s3], ids=["http", "s3"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    with request.param(folder) as server:
        yield server


def everything(indexes: list[ShardIndex], reader: RangeReader) -> list[Sample]:
    places = [(index, row) for index in indexes for row in range(len(index))]
    blocks = reader.read_many([index.byte_range(row) for index, row in places])
    return [index.parse(row, data) for (index, row), data in zip(places, blocks, strict=True)]


def samples() -> list[Sample]:
    return [make_sample(number, num_images=2) for number in range(11)]


@pytest.mark.parametrize("checksums", [False, True])
def test_a_remote_index_says_what_the_local_one_says(
    folder: Path, server: Server, tmp_path: Path, checksums: bool
) -> None:
    for name in NAMES:
        url = f"{server.url}/{name}"
        local = index_shard(str(folder / name), index_dir=str(tmp_path))
        remote = index_shard(url, index_dir=str(tmp_path), checksums=checksums)
        assert remote.etag and not local.etag
        assert open_index(url, str(tmp_path)).etag == remote.etag
        for field in dataclasses.fields(ShardIndex):
            if field.name in ("path", "etag") or (field.name == "crc32" and not checksums):
                continue
            one, other = getattr(local, field.name), getattr(remote, field.name)
            is_same = one.tolist() == other.tolist() if hasattr(one, "tolist") else one == other
            assert is_same, field.name
        assert local.crc32.all() and bool(remote.crc32.any()) == checksums


def test_indexing_reads_headers_not_images(tmp_path: Path) -> None:
    page = encode((900, 900), "PNG")
    samples = [dataclasses.replace(make_sample(i), image_bytes=(page,)) for i in range(4)]
    foreign = [(f"f{i}.{k}", data) for i in range(3) for k, data in (("jpg", PAGE), ("txt", b"x"))]
    write_tar(tmp_path / "data.tar", [*members_of(*samples), *foreign])
    with serve_folder(tmp_path) as server:
        index = index_shard(f"{server.url}/data.tar", index_dir=str(tmp_path / "indexes"))
        assert index.reasons == {} and index.read(2) == samples[2]
        spans = [r.removeprefix("bytes=").split("-") for m, _, r in server.requests if m == "GET"]
        total = sum(int(end) - int(start) + 1 for start, end in spans[:-1])
        size = (tmp_path / "data.tar").stat().st_size
        assert size > 4 * 2_000_000 and total < size / 4


def test_a_server_that_ignores_ranges_will_do_with_a_cache(tmp_path: Path, folder: Path) -> None:
    with serve_folder(folder, faults=always("whole")) as server:
        urls = [f"{server.url}/{name}" for name in NAMES]
        assert index_shards(urls, workers=1, index_dir=str(tmp_path)) == urls
        indexes = [open_index(url, str(tmp_path)) for url in urls]
        assert all(index.crc32.all() and index.etag for index in indexes)
        with pytest.raises(StorageError, match="ignores byte ranges"):
            everything(indexes, RangeReader())
        cached = RangeReader(StorageSettings(cache_dir=str(tmp_path / "cache")))
        assert everything(indexes, cached) == samples()


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_the_local_one_under_each_fault(
    server: Server, tmp_path: Path, kind: str
) -> None:
    server.faults = never
    indexes = [open_index(f"{server.url}/{name}", str(tmp_path)) for name in NAMES]
    server.faulted.clear()
    server.faults = every(3, kind)
    try:
        assert everything(indexes, RangeReader(QUICK)) == samples()
        assert server.faulted[kind] >= 4
        cached = dataclasses.replace(QUICK, cache_dir=str(tmp_path / "cache"))
        assert everything(indexes, RangeReader(cached)) == samples()
    finally:
        server.faults = never


@pytest.mark.parametrize("kind", ["500", "503", "truncated", "stall", "reset"])
def test_a_lasting_fault_is_a_storage_error_and_no_hole(
    server: Server, tmp_path: Path, kind: str
) -> None:
    server.faults = never
    indexes = [open_index(f"{server.url}/{name}", str(tmp_path)) for name in NAMES]
    server.faults = always(kind)
    limits = StorageSettings(deadline_s=0.8, request_timeout_s=0.3)
    try:
        with pytest.raises(StorageError, match="no correct answer in") as caught:
            everything(indexes, RangeReader(limits))
        assert not isinstance(caught.value, DataError) and caught.value.exit_code == 70
    finally:
        server.faults = never


@pytest.mark.parametrize("kind", ["503", "500"])
def test_clients_do_not_try_again_by_themselves(server: Server, tmp_path: Path, kind: str) -> None:
    """They would go on for half a minute, whatever deadline the run has."""
    server.faults = never
    index = open_index(f"{server.url}/{NAMES[0]}", str(tmp_path))
    server.faulted.clear()
    server.faults = always(kind)
    try:
        with pytest.raises(StorageError, match="in 3 tries"):
            RangeReader(StorageSettings(tries=3)).read(index.byte_range(0))
        assert server.faulted[kind] == 3
    finally:
        server.faults = never


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kinds", [("500", "reset"), ("truncated", "503", "slow")])
@both
def test_indexes_are_made_over_a_network_with_faults(
    folder: Path, tmp_path: Path, serve: Serve, kinds: tuple[str, ...]
) -> None:
    with serve(folder, faults=every(4, *kinds)) as server:
        urls = [f"{server.url}/{name}" for name in NAMES]
        assert index_shards(urls, workers=2, index_dir=str(tmp_path)) == urls
        assert everything([open_index(u, str(tmp_path)) for u in urls], RangeReader()) == samples()


def test_a_bucket_is_used_like_a_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, [2, 1])
    with serve_s3(tmp_path) as server:
        urls = [f"{server.url}/{name}" for name in NAMES]
        assert expand([f"{server.url}/train-*.tar"]) == urls
        assert expand([f"{server.url}/train-{{000001,000000}}.tar"]) == urls[::-1]
        with pytest.raises(DataError, match="no shard matches s3://.*nothing"):
            expand([f"{server.url}/nothing-*.tar"])
        assert index_shards(urls, workers=1) == urls
        assert index_shards(urls, workers=1) == []
        assert expand([f"{server.url}/*.index"]) == [index_path(url) for url in urls]
        assert list(iterate_samples([f"{server.url}/*.tar"])) == [make_sample(i) for i in range(3)]


def test_an_index_may_come_with_its_shard_from_a_local_folder(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [3])[0]
    local = index_shard(shard)
    with serve_s3(tmp_path) as server:
        remote = open_index(f"{server.url}/{NAMES[0]}")
        assert remote.identity == local.identity and remote.etag
        assert remote.crc32.tolist() == local.crc32.tolist()
        assert [method for method, *_ in server.requests].count("PUT") == 0


@both
def test_an_index_that_is_not_there_may_be_forbidden(tmp_path: Path, serve: Serve) -> None:
    """Object stores answer 403 for what is missing to those who may not list."""
    write_shards(tmp_path, [2])

    def fault(method: str, path: str, number: int) -> str:
        return "403" if path.endswith(".index") and method == "GET" else ""

    with serve(tmp_path, faults=fault) as server:
        url, folder = f"{server.url}/{NAMES[0]}", str(tmp_path / "indexes")
        assert _stored(index_path(url)) is None
        assert index_shard(url, index_dir=folder).read(1) == make_sample(1)


@both
def test_a_replaced_shard_is_noticed(tmp_path: Path, serve: Serve) -> None:
    """Also one of the same size, whose ends are the same: by its ETag."""
    indexes = str(tmp_path / "indexes")
    large = [dataclasses.replace(make_sample(i), image_bytes=(bytes(90_000),)) for i in range(3)]
    write_shard(tmp_path / "data" / NAMES[0], large)
    with serve(tmp_path / "data") as server:
        url = f"{server.url}/{NAMES[0]}"
        index, reader = open_index(url, indexes), RangeReader()
        assert reader.read(index.byte_range(0))
        content = (tmp_path / "data" / NAMES[0]).read_bytes()
        start, end = int(index.offset[1]), int(index.offset[2])
        middle = content[start:end].replace(b'"total":"12.50"', b'"total":"99.99"')
        changed = content[:start] + middle + content[end:]
        _put(url, tmp_path / "data" / NAMES[0], changed)
        with pytest.raises(ShardChangedError, match=f"{url} was replaced: its ETag is"):
            RangeReader().read(index.byte_range(0))
        with pytest.raises(ShardChangedError, match="another version of this shard"):
            open_index(url, indexes)
        assert index_shards([url], workers=1, index_dir=indexes, replace=True) == [url]
        assert open_index(url, indexes).read(1).fields["total"] == "99.99"


def test_a_flipped_byte_on_the_way_is_found_by_the_checksum(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "data", [2])[0]
    with serve_folder(tmp_path / "data") as server:
        index = index_shard(f"{server.url}/{NAMES[0]}", index_dir=str(tmp_path), checksums=True)
        server.etags[f"/{NAMES[0]}"] = index.etag  # the server itself knows of nothing
        data = bytearray(Path(shard).read_bytes())
        data[int(index.offset[1]) + int(index.image_start[1]) + 40] ^= 1
        Path(shard).write_bytes(data)
        assert index.read(0) == make_sample(0)
        with pytest.raises(DataError, match=r'"doc-0001": bytes differ from the index \(crc32\)'):
            index.read(1)


def test_a_remote_tar_that_is_cut_off_keeps_its_whole_samples(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [make_sample(i) for i in range(3)])
    cut = int(index_shard(str(path)).offset[2]) + 700
    path.write_bytes(path.read_bytes()[:cut])
    with serve_folder(tmp_path) as server:
        index = index_shard(f"{server.url}/a.tar", index_dir=str(tmp_path / "i"))
        assert index.damage.startswith("damaged or cut off at byte")
        assert [index.read(row) for row in range(len(index))] == [make_sample(0), make_sample(1)]


def _read_in_child(indexes: list[ShardIndex], reader: RangeReader) -> None:
    assert everything(indexes, reader) == samples()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", ["fork", "spawn"])
@both
def test_worker_processes_connect_by_themselves(
    folder: Path, tmp_path: Path, serve: Serve, method: str
) -> None:
    with serve(folder) as server:
        indexes = [open_index(f"{server.url}/{name}", str(tmp_path)) for name in NAMES]
        reader = RangeReader()
        assert everything(indexes, reader) == samples()
        context: Any = multiprocessing.get_context(method)
        workers = [context.Process(target=_read_in_child, args=(indexes, reader)) for _ in "ab"]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0]


def _put(url: str, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    if url.startswith("s3://"):
        boto3 = pytest.importorskip("boto3")
        bucket, key = url.removeprefix("s3://").split("/", 1)
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data)
