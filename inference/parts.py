"""The output of a long reading in parts, each of which can be interrupted and goes on.

    OUT/read.json                     what is read, with what: another reading is refused
    OUT/part-00003-of-00064.jsonl     one line a document, in the order of the input
    OUT/part-00003-of-00064.done      counts; there when the part is finished

Which part reads a document depends on its name alone. What a part has read stands in its own lines:
starting again, it cuts a torn last line and passes over the documents that have one. Behind a URL,
where nothing can be appended to, lines are collected in `part-….jsonl.d/000000.jsonl` and so on,
and put together at the end.
"""

import fcntl
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec

from data_tools.errors import EXIT_AGAIN, ConfigError, LaunchError
from data_tools.output import claim_folder, exists, join, make_folder, write_file
from data_tools.stream.remote import is_local, local_path
from inference.documents import Document

RECORD_NAME = "read.json"
LINES_A_FILE = 1000  # behind a URL: so many are lost at most when a machine is lost


@dataclass(frozen=True)
class Part:
    """A share of the documents: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Return the part of `3/64`.

        Raises:
            ConfigError: if it is no K/N with K from 0 to N - 1.
        """
        index, separator, count = text.partition("/")
        if not (separator and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(f"--part {text}: expected K/N with K from 0 to N - 1, as 3/64")
        return cls(int(index), int(count))

    @property
    def name(self) -> str:
        """Name of its files, without extension."""
        return f"part-{self.index:05d}-of-{self.count:05d}"

    def holds(self, name: str) -> bool:
        """Tell whether it reads a document. New documents do not move the others."""
        return zlib.crc32(name.encode("utf-8", "surrogatepass")) % self.count == self.index


def missing(documents: Iterable[Document], part: Part, done: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part that have no line yet; one that comes twice has two."""
    left = done.copy()
    for document in documents:
        if not part.holds(document.name):
            continue
        if left[document.name] > 0:
            left[document.name] -= 1
        else:
            yield document


class Lines(Protocol):
    """Where the lines of a part go."""

    done: Counter[str]
    num_errors: int

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Add lines, so that they are kept whatever happens after."""

    def finish(self) -> None:
        """Put everything under the part's name."""

    def clear_away(self) -> None:
        """Remove what the finished part no longer needs."""


def finished(out: str, part: Part) -> dict[str, int] | None:
    """Return the counts of a finished part; None if it is not."""
    path = join(out, f"{part.name}.done")
    if not exists(path):
        return None
    with fsspec.open(path, "rt", encoding="utf-8") as stream:
        counts: dict[str, int] = json.load(stream)
    return counts


@contextmanager
def open_part(out: str, part: Part, settings: dict[str, Any]) -> Iterator[Lines]:
    """Open a part to be written or continued.

    Args:
        out: folder or URL.
        part: which.
        settings: of the reading, recorded in the folder.

    Raises:
        ConfigError: if the folder was begun with other settings.
        LaunchError: if another process writes this part (exit code 75).
    """
    claim_folder(out, RECORD_NAME, settings | {"parts": part.count})
    path = join(out, f"{part.name}.jsonl")
    if not is_local(path):
        remote = _RemoteLines(path)
        try:
            yield remote
        finally:
            remote.flush()
        return
    with open(local_path(path), "ab+", buffering=0) as file:
        _lock(file, path)
        yield _LocalLines(file)


def close_part(out: str, part: Part, lines: Lines) -> dict[str, int]:
    """Mark a part as finished; return its counts."""
    lines.finish()
    counts = {"documents": lines.done.total(), "errors": lines.num_errors}
    write_file(join(out, f"{part.name}.done"), (json.dumps(counts) + "\n").encode("utf-8"))
    lines.clear_away()
    return counts


def _lock(file: Any, path: str) -> None:
    """Keep a second process away: an old start of a job may outlive its node's silence."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        error = LaunchError(f"{path}: another process writes it; start again when it has ended")
        error.exit_code = EXIT_AGAIN
        raise error from None
    except OSError as error:  # a file system without locks
        print(f"{path} cannot be locked ({error}); start each part once", file=sys.stderr)


class _Counted:
    """Counts lines that are there already and those that are added."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.num_errors = 0

    def _count(self, record: dict[str, Any]) -> None:
        self.done[record["file"]] += 1
        self.num_errors += "error" in record


class _LocalLines(_Counted):
    """Lines at the end of a file, which is cut after its last complete line first."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        end = 0
        with open(file.fileno(), "rb", closefd=False) as reader:
            reader.seek(0)
            for line in reader:
                record = _record(line)
                if record is None:
                    break
                end += len(line)
                self._count(record)
        file.truncate(end)

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append lines in one piece."""
        records = list(records)
        data = memoryview(_encode(records))
        while data:
            data = data[self._file.write(data) :]
        for record in records:
            self._count(record)

    def finish(self) -> None:
        """Make sure that the lines have reached the disk."""
        os.fsync(self._file.fileno())

    def clear_away(self) -> None:
        """Remove nothing: the lines stand where they belong."""


class _RemoteLines(_Counted):
    """Lines in numbered files behind a URL, joined to one at the end."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._folder = path, f"{path}.d"
        self._waiting: list[dict[str, Any]] = []
        make_folder(self._folder)
        self._num_files = 0
        for content in self._files():
            self._num_files += 1
            for line in content.splitlines():
                self._count(json.loads(line))

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Write a file as soon as enough lines have come together."""
        for record in records:
            self._count(record)
            self._waiting.append(record)
        if len(self._waiting) >= LINES_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are waiting."""
        if self._waiting:
            write_file(self._name(self._num_files), _encode(self._waiting))
            self._num_files += 1
            self._waiting = []

    def finish(self) -> None:
        """Join the files."""
        self.flush()
        with fsspec.open(self._path, "wb") as stream:
            for content in self._files():
                stream.write(content)

    def clear_away(self) -> None:
        """Remove the files that were joined."""
        filesystem, inner = fsspec.core.url_to_fs(self._folder)
        if filesystem.exists(inner):
            filesystem.rm(inner, recursive=True)

    def _files(self) -> Iterator[bytes]:
        number = 0
        while exists(self._name(number)):
            with fsspec.open(self._name(number), "rb") as stream:
                yield stream.read()
            number += 1

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:06d}.jsonl"


def _encode(records: Iterable[dict[str, Any]]) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")  # a file name that is no UTF-8, as JSON has it


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a complete line's record; None if a killed process or a lost disk left half of it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
