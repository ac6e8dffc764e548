"""Range reads of objects behind URLs: many in flight, tried again, never another object's bytes.

Everything runs in fsspec's own event loop, one thread a process. Filesystems without coroutines
get a thread a request. Filesystems are made in the process that uses them and tried once a
request, since the retries here are the only ones that know our deadline.
"""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import fsspec.config
import fsspec.core

from data_tools.errors import ConfigError, LecternError, ShardChangedError, StorageError
from data_tools.stream.storage import (
    Attempts,
    ByteRange,
    StorageSettings,
    describe,
    split_version,
)

IN_FLIGHT = 64
LOCAL_PROTOCOLS = ("file", "local")
RETRIED_STATUS = (408, 416, 425, 429)  # of those below 500
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}

Result = TypeVar("Result")


class NoRangesError(StorageError):
    """A server sends whole files only."""


class _WrongLengthError(Exception):
    """An answer is shorter or longer than the range that was asked for."""


def is_local(url: str) -> bool:
    """Tell whether a path or URL is of a file of this machine."""
    return "::" not in url and ("://" not in url or url.split("://")[0] in LOCAL_PROTOCOLS)


def local_path(url: str) -> str:
    """Return the path of a local file, given as a path or file URL."""
    return os.path.expanduser(url.split("://", 1)[-1])


def connect(url: str, settings: StorageSettings | None = None) -> tuple[Any, str]:
    """Return (the filesystem of this process, the path inside it) of a path or URL.

    Raises:
        ConfigError: if the protocol is unknown or its package is not installed.
    """
    protocol = url.split("://")[0] if "://" in url else "file"
    try:
        if is_local(url) or "::" in url:
            filesystem, path = fsspec.core.url_to_fs(url)
            return filesystem, path
        cls = fsspec.get_filesystem_class(protocol)
        limits = _client_options(protocol, settings or StorageSettings())
        # What a parent made before a fork has dead threads behind it.
        key = os.getpid(), protocol, repr((cls._get_kwargs_from_urls(url), limits, _credentials()))
        if key not in _filesystems:
            # Listings that are remembered would hide that a shard was replaced.
            fresh = {"skip_instance_cache": True, "use_listings_cache": False}
            _filesystems[key] = fsspec.core.url_to_fs(url, **fresh, **limits)[0]
            if isinstance(getattr(_filesystems[key], "retries", None), int):
                _filesystems[key].retries = 1
        return _filesystems[key], _filesystems[key]._strip_protocol(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        how = f"pip install -e '.[{extra}]'" if extra else "install the package that it names"
        raise ConfigError(f"{url}: {error}; {how}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from error


_filesystems: dict[tuple[int, str, str], Any] = {}


def _credentials() -> list[tuple[str, str]]:
    """Return the environment that clients take endpoints and credentials from."""
    return sorted(i for i in os.environ.items() if i[0].startswith(("AWS_", "FSSPEC_", "GOOGLE_")))


def call(
    url: str,
    function: Callable[[Any, str], Result],
    settings: StorageSettings | None = None,
) -> Result:
    """Return function(filesystem, path) of a path or URL, tried again where storage fails.

    Raises:
        FileNotFoundError: from the function, at once.
        StorageError: if access is denied or there is no answer.
    """
    settings = settings or StorageSettings()
    filesystem, path = connect(url, settings)
    if is_local(url):
        return function(filesystem, path)
    attempts = Attempts(settings)
    while True:
        try:
            return function(filesystem, path)
        except LecternError:
            raise
        except Exception as error:  # each client has errors of its own
            real = _real_error(error)
            if isinstance(real, FileNotFoundError):
                raise
            _stop_if_final(url, real)
            time.sleep(attempts.pause_s(url, real))


def exists(url: str, settings: StorageSettings | None = None) -> bool:
    """Tell whether a path or URL exists; storage that does not answer is not taken for "no".

    Raises:
        StorageError: if access is denied or there is no answer.
    """
    try:
        call(url, lambda filesystem, path: filesystem.info(path), settings)
    except FileNotFoundError:
        return False
    return True


def object_state(info: dict[str, Any]) -> tuple[int | None, str]:
    """Return (size in bytes, etag) of an object from a filesystem's `info`; None, "" if unsaid."""
    for name in ("ETag", "etag", "md5Hash", "content_md5", "blob_id"):
        if info.get(name):
            return info.get("size"), str(info[name]).removeprefix("W/").strip('"')
    return info.get("size"), ""


def http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind a client's error: aiohttp, botocore, or of gcsfs."""
    for name in ("status", "code"):
        if isinstance(getattr(error, name, None), int):
            return int(getattr(error, name))
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore's, behind an OSError of s3fs
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__
    return None


class RemoteStore:
    """Reads ranges of objects in this process; its methods may be called by several threads."""

    def __init__(self, settings: StorageSettings, on_retry: Callable[[], None]) -> None:
        self._settings = settings
        self._on_retry = on_retry
        self._places: dict[str, tuple[Any, str]] = {}
        # From here on used inside the event loop only.
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._locks: dict[Any, asyncio.Lock] = {}
        self._sizes: dict[tuple[str, str], int | None] = {}  # of shards of the right version
        self._honours_ranges: dict[Any, bool] = {}  # by host

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of every range, each of exactly its size.

        Raises:
            ShardChangedError: if a shard is not the one that was indexed.
            StorageError: if a range cannot be had.
        """
        for url in {item.url for item in ranges} - self._places.keys():
            self._places[url] = connect(url, self._settings)
        loop = fsspec.asyn.get_loop()
        future = asyncio.run_coroutine_threadsafe(self._read_all(ranges), loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _read_all(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        tasks = [asyncio.ensure_future(self._read(item)) for item in ranges]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, item: ByteRange) -> bytes:
        async with self._slots:
            attempts = Attempts(self._settings)
            while True:
                try:
                    return await self._try(item, attempts)
                except (ShardChangedError, StorageError):
                    raise
                except Exception as caught:  # each client has errors of its own
                    error = _real_error(caught)
                    _stop_if_final(item.url, error)
                    if isinstance(error, _WrongLengthError) or http_status(error) == 416:
                        self._sizes.pop((item.url, item.version), None)  # look at it again
                    await asyncio.sleep(attempts.pause_s(str(item), error))
                    self._on_retry()

    async def _try(self, item: ByteRange, attempts: Attempts) -> bytes:
        filesystem, path = self._places[item.url]
        total = None
        if item.version:
            total = await self._check_version(filesystem, path, item, attempts)
        if total is not None and item.offset + item.size > total:
            raise ShardChangedError(
                f"{item} are asked for but it ends at {total}: the shard was cut off or replaced. "
                f"{how_to_index(item.url)}"
            )

        def request() -> Coroutine[Any, Any, bytes]:
            return self._hedged(lambda: self._request(filesystem, path, item, total))

        host = id(filesystem), urlsplit(item.url).netloc
        if host not in self._honours_ranges:
            # The first one alone: a server that ignores ranges answers with a whole shard.
            async with self._lock_of(host):
                if host not in self._honours_ranges:
                    return await self._first_of_host(host, request, attempts)
        if not self._honours_ranges[host]:
            raise _no_ranges(item)
        return await asyncio.wait_for(request(), attempts.timeout_s)

    async def _first_of_host(
        self, host: Any, request: Callable[[], Coroutine[Any, Any, bytes]], attempts: Attempts
    ) -> bytes:
        try:
            data = await asyncio.wait_for(request(), attempts.timeout_s)
        except NoRangesError:
            self._honours_ranges[host] = False
            raise
        self._honours_ranges[host] = True
        return data

    async def _check_version(
        self, filesystem: Any, path: str, item: ByteRange, attempts: Attempts
    ) -> int | None:
        """Return the size of the shard, seen once a process to be that of the index."""
        key = item.url, item.version
        async with self._lock_of(key):
            if key not in self._sizes:
                if filesystem.async_impl:
                    asked = filesystem._info(path)
                else:
                    asked = _in_thread(lambda: filesystem.info(path))
                info = await asyncio.wait_for(asked, attempts.timeout_s)
                self._sizes[key] = _size_of_version(item, info)
        return self._sizes.get(key)

    async def _request(
        self, filesystem: Any, path: str, item: ByteRange, total: int | None
    ) -> bytes:
        start, end = item.offset, item.offset + item.size
        if filesystem.async_impl:
            data = bytes(await filesystem._cat_file(path, start=start, end=end))
        else:
            data = await _in_thread(lambda: filesystem.cat_file(path, start=start, end=end))
        if len(data) == item.size:
            return data
        if len(data) > item.size and len(data) == (total or split_version(item.version)[0]):
            raise _no_ranges(item)
        raise _WrongLengthError(f"{len(data)} bytes came, {item.size} were asked for")

    async def _hedged(self, start: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return the first good answer of one request or, if that one is slow, of two."""
        tasks = [asyncio.ensure_future(start())]
        try:
            if self._settings.hedge_after_s is not None:
                done, _ = await asyncio.wait(tasks, timeout=self._settings.hedge_after_s)
                if not done:
                    tasks.append(asyncio.ensure_future(start()))
            pending = set(tasks)
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good or not pending:
                    return await (good or list(done))[0]
        finally:
            for task in tasks:
                task.cancel()

    def _lock_of(self, key: Any) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())


def how_to_index(url: str) -> str:
    """Return the sentence that says how a shard that was replaced is indexed again."""
    return f"If that was meant, index it again: `python -m data_tools.index {url}`"


def _client_options(protocol: str, settings: StorageSettings) -> dict[str, Any]:
    """Return options that keep a client from retries and time limits of its own."""
    timeout_s = settings.request_timeout_s
    configured = fsspec.config.conf.get(protocol, {})
    if protocol in ("s3", "s3a"):
        limits = {
            "read_timeout": timeout_s,
            "connect_timeout": timeout_s,
            "retries": {"max_attempts": 0},
            "max_pool_connections": IN_FLIGHT,
        }
        return {"config_kwargs": configured.get("config_kwargs", {}) | limits}
    if protocol in ("http", "https"):
        import aiohttp

        # Of silence: how long a whole request takes is limited where it is made.
        limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        return {"client_kwargs": configured.get("client_kwargs", {}) | {"timeout": limit}}
    return {}


def _size_of_version(item: ByteRange, info: dict[str, Any]) -> int | None:
    """Return the size of an object; ShardChangedError if it is not the one that was indexed."""
    size, etag = object_state(info)
    indexed_size, indexed_etag = split_version(item.version)
    if info.get("partial") is False and item.size != size:
        raise _no_ranges(item)
    if None not in (size, indexed_size) and size != indexed_size:
        change = f"it has {size} bytes, its index says {indexed_size}"
    elif etag and indexed_etag and etag != indexed_etag:
        change = f"its ETag is {etag}, its index says {indexed_etag}"
    else:
        return size
    raise ShardChangedError(f"{item.url} was replaced: {change}. {how_to_index(item.url)}")


def _no_ranges(item: ByteRange) -> NoRangesError:
    return NoRangesError(
        f"{item.url}: the server ignores byte ranges and sends the whole file for "
        f"{item.size} bytes. Copy the shards to a local folder or to storage that knows ranges, or "
        "set data.storage.cache_dir to a local folder, where shards are then copied once a node"
    )


def _real_error(error: Exception) -> Exception:
    """Return what is behind an error: fsspec's HTTP client calls every failed `info` not found."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_of_transport = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    is_not_found = isinstance(cause, FileNotFoundError) or http_status(cause) == 404
    return cause if is_of_transport and not is_not_found else error


def _stop_if_final(url: str, error: Exception) -> None:
    """Raise StorageError if trying again cannot help."""
    status = http_status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        raise StorageError(
            f"{url}: not found (404). It was deleted or renamed since it was indexed, or the "
            "storage is another one than then: put it back, or correct the path"
        ) from error
    if isinstance(error, PermissionError) or status in (401, 403):
        raise StorageError(
            f"{url}: access denied ({status or 403}). Give this machine credentials that may read "
            "it (S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a public "
            "bucket: FSSPEC_S3_ANON=true)"
        ) from error
    if status is not None and 400 <= status < 500 and status not in RETRIED_STATUS:
        raise StorageError(f"{url}: refused with status {status} ({describe(error)})") from error


def _in_thread(function: Callable[[], Any]) -> "asyncio.Future[Any]":
    """Run a blocking call beside the event loop; one that never ends keeps no process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            result, error = function(), None
        except Exception as caught:  # handed to the one who waits
            result, error = None, caught
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    return future
