"""Whole copies of remote shards on a local disk, of limited size, shared by a node's processes.

A copy is made by one process while the others that want it wait; it appears under its name when it
is complete. The name holds a digest of URL and version, so that a replaced shard is fetched anew.
When room is needed, the copies unused for longest are removed. Locks are `flock`s, which end with
the process that holds them.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import ConfigError, StorageError

PARTIAL = ".partial"
NUM_LOCKS = 256  # files to lock, over which the names of copies are spread

logger = logging.getLogger(__name__)

Fill = Callable[[str, str, int, int], None]


class ShardCache:
    """Copies of shards in a local folder; threads and processes may share it.

    Args:
        folder: made if it does not exist.
        max_bytes: size of all copies together.

    Raises:
        ConfigError: if the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._locks = self.folder / "locks"
        self._made_here: set[str] = set()
        self._is_told = False
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            (self._locks / "room").touch()
        except OSError as error:
            raise ConfigError(
                f"data.storage.cache_dir: {self.folder} cannot be used "
                f"({error.strerror or error}); expected a local folder that can be written to"
            ) from error

    def path_of(self, url: str, version: str, size: int, fill: Fill) -> str | None:
        """Return the path of a shard's copy, made now if there is none.

        Args:
            url: of the shard.
            version: of the shard.
            size: in bytes.
            fill: writes the shard: fill(url, version, size, open descriptor).

        Returns:
            The path, or None if there is no room: the shard is larger than all copies may be, or
            others are being copied. Another process may remove the copy at any time; what has been
            opened stays readable.

        Raises:
            StorageError: if the disk is full.
        """
        path = self.folder / _name(url, version)
        if self._touch(path):
            return str(path)
        if size > self.max_bytes:
            return None
        with self._locked(_lock_name(path.name)):
            # It may have been made while this process waited.
            is_there = self._touch(path) or self._make(path, url, version, size, fill)
        return str(path) if is_there else None

    def _touch(self, path: Path) -> bool:
        """Mark a copy as used now; False if there is none."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make(self, path: Path, url: str, version: str, size: int, fill: Fill) -> bool:
        """Copy a shard; False if there is no room."""
        self._tell_if_too_small(path.name, url)
        temporary = path.with_name(path.name + PARTIAL)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with self._locked("room"):
                if not self._make_room(size, temporary.name):
                    return False
                os.truncate(descriptor, size)  # counts from now on
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            fill(url, version, size, descriptor)
            os.replace(temporary, path)
            return True
        except OSError as error:
            raise StorageError(
                f"{self.folder}: no copy of {url} can be written ({error.strerror or error}); make "
                "room there, or lower data.storage.cache_gb"
            ) from error
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int, own_name: str) -> bool:
        """Remove what is left of ended processes, then the copies unused for longest.

        Returns:
            Whether there is room for `size` bytes now.
        """
        entries = []
        for entry in os.scandir(self.folder):
            if not entry.is_file() or entry.name == own_name:
                continue
            if entry.name.endswith(PARTIAL) and self._is_left_over(entry.name):
                Path(entry.path).unlink(missing_ok=True)
                continue
            try:
                entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            except FileNotFoundError:
                continue  # another process has just finished or given up its copy
        total = sum(entry_size for _, entry_size, _ in entries)
        for _, entry_size, path in sorted(entries):
            if total + size <= self.max_bytes:
                break
            if not path.endswith(PARTIAL):
                Path(path).unlink(missing_ok=True)
                total -= entry_size
        return total + size <= self.max_bytes

    def _is_left_over(self, partial: str) -> bool:
        """Tell whether nobody is writing an unfinished copy."""
        with open(self._locks / _lock_name(partial.removesuffix(PARTIAL)), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _tell_if_too_small(self, name: str, url: str) -> None:
        if name in self._made_here and not self._is_told:
            self._is_told = True
            logger.warning(
                "%s was copied to %s, removed for want of room and copied again: raise "
                "data.storage.cache_gb so that 128 shards of every source find room",
                url,
                self.folder,
            )
        self._made_here.add(name)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self._locks / name, "w") as file:  # closing ends the lock
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _name(url: str, version: str) -> str:
    digest = hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:32]
    return f"{digest}-{url.rsplit('/', 1)[-1][-100:]}"


def _lock_name(name: str) -> str:
    return f"{int(name[:8], 16) % NUM_LOCKS:03d}"
