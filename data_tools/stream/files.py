"""Files of shards: descriptors that stay open, what lies beside a shard, writing in one piece."""

import errno
import hashlib
import os
import threading
import uuid
from collections import OrderedDict
from typing import Any

from data_tools.errors import DataError
from data_tools.stream.remote import call, is_local, local_path

MAX_OPEN = 256  # an epoch's order works in windows of 64 shards a source
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class _Descriptor:
    """An open file; closed when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Descriptors:
    """The files that this process has read from last; the one unused for longest is closed first.

    Threads may share it: `pread` has no position.

    Args:
        limit: open files at most.
    """

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self.limit = limit
        self._files: OrderedDict[tuple[str, str], _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, path: str, version: str, offset: int, size: int) -> bytes:
        """Return a range of a file, shorter where the file ends.

        Args:
            path: of a local file.
            version: a file that replaces another one under its name is opened anew.
            offset: first byte.
            size: in bytes.
        """
        file = self._open(path, version)  # held, so that no other thread closes it
        return read_at(file.number, offset, size)

    def read_ahead(self, path: str, version: str, offset: int, size: int) -> None:
        """Ask the kernel to fetch a range that will be read soon."""
        file = self._open(path, version)
        os.posix_fadvise(file.number, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self, path: str, version: str) -> None:
        """Open the file anew when it is read the next time."""
        with self._lock:
            self._files.pop((path, version), None)

    def _open(self, path: str, version: str) -> _Descriptor:
        with self._lock:
            file = self._files.pop((path, version), None) or _Descriptor(path)
            self._files[path, version] = file
            while len(self._files) > self.limit:
                self._files.popitem(last=False)
            return file


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Return a range of an open file, shorter where the file ends."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]  # the kernel gives at most 2 GiB at a time
    while data and (missing := size - sum(map(len, parts))):
        data = os.pread(descriptor, missing, offset + size - missing)
        parts.append(data)
    return b"".join(parts)


def beside(shard: str, suffix: str, index_dir: str | None = None) -> str:
    """Return where a file that belongs to a shard lies.

    Args:
        shard: path or URL of the shard.
        suffix: of the file, with its dot.
        index_dir: a folder for the files of shards whose own folder cannot be written to; names in
            it tell apart shards of the same name in several folders.
    """
    if index_dir is None:
        return f"{shard}{suffix}"
    place = os.path.abspath(local_path(shard)) if is_local(shard) else shard
    digest = hashlib.sha256(place.encode("utf-8")).hexdigest()[:16]
    return f"{index_dir.rstrip('/')}/{digest}-{shard.rsplit('/', 1)[-1]}{suffix}"


def make_local_folder(folder: str) -> None:
    """Make a folder for indexes; object stores have none to make.

    Raises:
        DataError: if it cannot be made.
    """
    if not is_local(folder):
        return
    try:
        os.makedirs(local_path(folder), exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data.index_dir: {folder} cannot be made ({error.strerror or error}); name a folder "
            "that can be written to"
        ) from error


def write_atomically(url: str, data: bytes) -> None:
    """Write a file in one piece; several processes may do so at a time, the last one wins.

    Raises:
        DataError: if its folder cannot be written to.
        StorageError: if remote storage does not answer.
    """
    folder, name = os.path.split(url)

    def write(filesystem: Any, path: str) -> None:
        temporary = f"{path}.tmp-{uuid.uuid4().hex}"
        try:
            with filesystem.open(temporary, "wb") as file:
                file.write(data)
            filesystem.mv(temporary, path)
        except (OSError, NotImplementedError) as error:
            reason = _why_unwritable(error)
            if reason is None:
                raise
            raise DataError(
                f"{folder or '.'} is not writable ({reason}), so {name} cannot be stored there: "
                "indexes and lengths lie beside their shards. Make the folder writable, copy the "
                "shards to one that is, or set data.index_dir (commands: --index-dir) to a folder "
                "for them"
            ) from error

    call(url, write)


def _why_unwritable(error: OSError | NotImplementedError) -> str | None:
    """Return why a folder cannot be written to; None if that is not what is wrong."""
    if isinstance(error, NotImplementedError):  # fsspec's filesystems that only read
        return "this kind of storage can only be read"
    if isinstance(error, PermissionError) or error.errno in UNWRITABLE:
        return error.strerror or str(error)
    return None
