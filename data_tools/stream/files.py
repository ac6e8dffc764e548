"""Files of shards: kept open for range reads, a few at a time; written in one piece."""

import errno
import os
import threading
import uuid
from collections import OrderedDict
from typing import Any

import fsspec

from data_tools.errors import DataError
from data_tools.stream.order import WINDOW_SHARDS

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class OpenFiles:
    """The files that this process has read from last; the one unused for longest is closed first.

    Args:
        limit: open files at most. An epoch's order works in windows of this many shards, so that
            a shard is opened about once an epoch.
    """

    def __init__(self, limit: int = WINDOW_SHARDS) -> None:
        self.limit = limit
        self._files: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()
        # A fork shares its parent's descriptors, read positions included.
        os.register_at_fork(after_in_child=self._start_anew)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, url: str, version: str, offset: int, size: int) -> bytes:
        """Return a range of a file, shorter where the file ends.

        Args:
            url: path or URL.
            version: a file that replaces another one under its name is opened anew.
            offset: first byte.
            size: in bytes.
        """
        with self._lock:
            file = self._files.pop((url, version), None) or fsspec.open(url, "rb").open()
            file.seek(offset)
            data = file.read(size)
            self._files[url, version] = file  # not if reading failed: then it is opened anew
            while len(self._files) > self.limit:
                self._files.popitem(last=False)[1].close()
            return data

    def _start_anew(self) -> None:
        self._files = OrderedDict()
        self._lock = threading.Lock()


def write_atomically(url: str, data: bytes) -> None:
    """Write a file in one piece; several processes may do so at a time, the last one wins.

    Raises:
        DataError: if its folder cannot be written to.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    try:
        with filesystem.open(temporary, "wb") as file:
            file.write(data)
        filesystem.mv(temporary, path)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in UNWRITABLE:
            raise
        folder, name = os.path.split(url)
        raise DataError(
            f"{folder or '.'} is not writable ({error.strerror or error}), so {name} cannot be "
            "stored there: indexes and lengths lie beside their shards. Make the folder writable, "
            "or copy the shards to one that is"
        ) from error
