"""Range reads of shards, local and remote: many in flight, exactly the bytes that were indexed.

    reader = RangeReader(StorageSettings())
    data = reader.read_many([ByteRange(url, version, offset, size), ...])

Local shards are read with `pread` from descriptors that stay open. Remote ones are read by range
(`data_tools.stream.remote`) or, with a cache folder, copied once a node
(`data_tools.stream.cache`).
"""

import io
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from data_tools.errors import ConfigError, ShardChangedError, StorageError
from data_tools.stream.cache import ShardCache
from data_tools.stream.files import Descriptors, read_at
from data_tools.stream.remote import (
    NoRangesError,
    RemoteStore,
    call,
    how_to_index,
    is_local,
    local_path,
    object_state,
)
from data_tools.stream.storage import Attempts, ByteRange, StorageSettings, split_version

__all__ = ["ByteRange", "RangeReader", "StorageSettings"]

PIECE_BYTES = 8 * 2**20  # of a shard that is copied as a whole
PIECES_AT_A_TIME = 4
TIMES_LOST = 3  # a copy that other processes evict as often before it can be read is given up


class RangeReader:
    """Reads ranges of shards. Threads may share it; a pickled or forked one connects anew.

    Attributes:
        settings: of the storage.
    """

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self.settings = settings or StorageSettings()
        if self.settings.cache_dir and not is_local(self.settings.cache_dir):
            raise ConfigError(
                f"data.storage.cache_dir is {self.settings.cache_dir}; expected a local folder"
            )
        self._state = _State(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]

    @property
    def num_retries(self) -> int:
        """How often this process has tried something again."""
        return self._here.num_retries

    @property
    def _here(self) -> "_State":
        """The connections of this process: after a fork, locks and sockets are the parent's."""
        if self._state.pid != os.getpid():
            self._state = _State(self.settings)
        return self._state

    def read(self, item: ByteRange) -> bytes:
        """Return the bytes of one range (`read_many`)."""
        return self.read_many([item])[0]

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of every range, each of exactly its size.

        Raises:
            ShardChangedError: if a shard was cut off or replaced since it was indexed.
            StorageError: if a range could not be had after all tries.
        """
        found: dict[ByteRange, bytes] = {item: b"" for item in ranges if item.size == 0}
        missing = [item for item in dict.fromkeys(ranges) if item.size]
        local = [item for item in missing if is_local(item.url)]
        self._read_ahead(local)
        for item in local:
            found[item] = self._read_local(item)
        remote = [item for item in missing if item not in found]
        if self._here.cache is not None:
            found |= self._read_copies(self._here.cache, remote)
            remote = [item for item in remote if item not in found]
        if remote:
            answers = self._here.store.read_many(remote)
            found |= dict(zip(remote, answers, strict=True))
        return [found[item] for item in ranges]

    def state_of(self, url: str) -> tuple[int, str]:
        """Return (size in bytes, etag) of a shard as it is now; local ones have the etag "".

        Raises:
            StorageError: if it is not there or cannot be reached.
        """
        if is_local(url):
            try:
                return os.stat(local_path(url)).st_size, ""
            except OSError as error:
                raise _unreadable(url, error) from error
        try:
            size, etag = object_state(call(url, lambda fs, path: fs.info(path), self.settings))
        except FileNotFoundError as error:
            raise StorageError(f"{url}: not found; correct the path") from error
        if size is None:
            raise StorageError(f"{url}: the server does not say its size; copy the shards")
        return size, etag

    def open(self, url: str, version: str = "", block_bytes: int = 65536) -> io.BufferedReader:
        """Return a shard as a file, read in blocks of some size.

        Raises:
            StorageError: if it is not there or may not be read.
        """
        if not is_local(url):
            return io.BufferedReader(_RangeFile(self, url, version), block_bytes)
        try:
            return open(local_path(url), "rb")
        except OSError as error:
            raise _unreadable(url, error) from error

    def copy_whole(self, url: str, size: int, path: str) -> None:
        """Copy a remote shard to a local file in one request, as servers without ranges need it.

        Raises:
            StorageError: if it cannot be had.
        """
        with open(path, "wb") as file:
            call(url, lambda fs, inner: _stream(fs, inner, size, file.fileno()), self.settings)

    def _read_ahead(self, ranges: Sequence[ByteRange]) -> None:
        """Let the kernel fetch all ranges at once; on a network disk that hides its latency."""
        if len(ranges) > 1 and hasattr(os, "posix_fadvise"):
            for item in ranges:
                try:
                    self._here.descriptors.read_ahead(
                        local_path(item.url), item.version, item.offset, item.size
                    )
                except OSError:
                    return  # reading it says what is wrong

    def _read_local(self, item: ByteRange) -> bytes:
        path, attempts = local_path(item.url), Attempts(self.settings)
        while True:
            try:
                data = self._here.descriptors.read(path, item.version, item.offset, item.size)
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise _unreadable(item.url, error) from error
            except OSError as error:  # a network disk may come back
                self._here.descriptors.close(path, item.version)
                time.sleep(attempts.pause_s(str(item), error))
                self._here.count_retry()
                continue
            if len(data) != item.size:
                raise ShardChangedError(
                    f"{item} are asked for but it ends before: the shard was cut off or replaced. "
                    f"{how_to_index(item.url)}"
                )
            return data

    def _read_copies(
        self, cache: ShardCache, ranges: Sequence[ByteRange]
    ) -> dict[ByteRange, bytes]:
        """Return what can be read from whole copies of the shards."""
        by_shard = defaultdict(list)
        for item in ranges:
            by_shard[item.url, item.version].append(item)
        found: dict[ByteRange, bytes] = {}
        for (url, version), items in by_shard.items():
            size = split_version(version)[0]
            if size is None:
                continue
            for _ in range(TIMES_LOST):
                path = cache.path_of(url, version, size, self._copy)
                if path is None:
                    break
                try:
                    found |= _read_file(path, items)
                    break
                except FileNotFoundError:
                    continue  # another process made room at this very moment
        return found

    def _copy(self, url: str, version: str, size: int, descriptor: int) -> None:
        """Write a whole shard into an open file."""
        try:
            self._copy_pieces(url, version, size, descriptor)
        except NoRangesError:
            call(url, lambda fs, path: _stream(fs, path, size, descriptor), self.settings)

    def _copy_pieces(self, url: str, version: str, size: int, descriptor: int) -> None:
        starts = range(0, size, PIECE_BYTES)
        pieces = [ByteRange(url, version, at, min(PIECE_BYTES, size - at)) for at in starts]
        for first in range(0, len(pieces), PIECES_AT_A_TIME):
            several = pieces[first : first + PIECES_AT_A_TIME]
            for piece, data in zip(several, self._here.store.read_many(several), strict=True):
                os.pwrite(descriptor, data, piece.offset)


class _State:
    """What a reader holds in one process."""

    def __init__(self, settings: StorageSettings) -> None:
        self.pid = os.getpid()
        self.num_retries = 0
        self._lock = threading.Lock()
        self.descriptors = Descriptors()
        self.store = RemoteStore(settings, self.count_retry)
        self.cache = (
            ShardCache(settings.cache_dir, settings.cache_bytes) if settings.cache_dir else None
        )

    def count_retry(self) -> None:
        with self._lock:
            self.num_retries += 1


class _RangeFile(io.RawIOBase):
    """A shard as a file whose every read is a range read."""

    def __init__(self, reader: RangeReader, url: str, version: str) -> None:
        self._reader, self._url, self._version = reader, url, version
        self._size, self._place = reader.state_of(url)[0], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._place))
        buffer[:size] = self._reader.read(ByteRange(self._url, self._version, self._place, size))
        self._place += size
        return size


def _read_file(path: str, items: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return {item: read_at(descriptor, item.offset, item.size) for item in items}
    finally:
        os.close(descriptor)


def _stream(filesystem: Any, path: str, size: int, descriptor: int) -> None:
    """Copy a file from its first byte to its last in one request."""
    place = 0
    with filesystem.open(path, "rb", block_size=0) as file:
        while data := file.read(PIECE_BYTES):
            os.pwrite(descriptor, data, place)
            place += len(data)
    if place != size:
        raise TimeoutError(f"{place} bytes came, {size} were expected")


def _unreadable(url: str, error: OSError) -> StorageError:
    return StorageError(
        f"{url}: cannot be read ({error.strerror or error}). Is the disk mounted here, and the "
        "path the same on every node?"
    )
