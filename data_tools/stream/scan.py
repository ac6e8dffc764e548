"""One walk over a tar: where its samples lie, which of them cannot be used and why.

A sample that cannot be used stays a row with a reason, in general words before a colon and the
case behind it. A tar that is damaged or cut off keeps the samples before that place.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

import numpy as np

from data_tools.errors import DataError
from data_tools.examples.images import MAX_ASPECT, MAX_IMAGE_PIXELS, oriented_size
from data_tools.sample import IMAGE_EXTENSIONS, Sample
from data_tools.stream.records import (
    BLOCK_BYTES,
    KIND_JSON,
    KIND_SAMPLE,
    KIND_TEXT,
    KIND_UNUSABLE,
    build_sample,
    is_ours,
    load_json,
)

# WebDataset's own rule: the key goes up to the first dot behind the last slash.
MEMBER_NAME = re.compile(r"(?:\./)*((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
MAX_SAMPLE_BYTES = 2**32 - 1
HEADER_BYTES = 65536  # of an image, in which its size is looked for first
TAIL_BYTES = 65536  # looked at behind the end of a tar
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}

Piece = Callable[[int, int], bytes]


class _UnusableError(Exception):
    """Why a sample cannot be used."""


@dataclass
class Scan:
    """What a walk found.

    Attributes:
        rows: per sample (offset, size, json_start, json_size, num_chars, crc32, kind).
        images: per image (start, size, width, height).
        first_image: per sample and one more, the number of its first image.
        keys: of the samples.
        reasons: row -> why it cannot be used.
        damage: what is wrong with the tar itself; "" if nothing.
    """

    rows: list[tuple[int, int, int, int, int, int, int]] = field(default_factory=list)
    images: list[tuple[int, int, int, int]] = field(default_factory=list)
    first_image: list[int] = field(default_factory=lambda: [0])
    keys: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    damage: str = ""

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns of a `ShardIndex`, without its keys and reasons."""
        rows = np.asarray(self.rows, np.uint64).reshape(-1, 7)
        images = np.asarray(self.images, np.uint32).reshape(-1, 4)
        names = ("size", "json_start", "json_size", "num_chars", "crc32")
        columns = {name: rows[:, i + 1].astype(np.uint32) for i, name in enumerate(names)}
        return columns | {
            "offset": rows[:, 0],
            "kind": rows[:, 6].astype(np.uint8),
            "first_image": np.asarray(self.first_image, np.uint32),
            "image_start": images[:, 0],
            "image_size": images[:, 1],
            "image_wh": images[:, 2:],
        }

    def add(self, key: str, begin: int, size: int, crc32: int, found: "_Found") -> None:
        """Append a sample that can be used."""
        self.rows.append((begin, size, *found.record, found.num_chars, crc32, found.kind))
        self._end(key, found.images)

    def add_unusable(self, key: str, begin: int, size: int, crc32: int, reason: str) -> None:
        """Append a sample that cannot be used."""
        self.reasons[len(self.rows)] = reason
        self.rows.append((begin, size, 0, 0, 0, crc32, KIND_UNUSABLE))
        self._end(key.encode("utf-8", "backslashreplace").decode("utf-8"), [])

    def _end(self, key: str, images: list[tuple[int, int, int, int]]) -> None:
        self.images += images
        self.first_image.append(len(self.images))
        self.keys.append(key)


@dataclass(frozen=True)
class _Found:
    """The parts of a sample that can be used; places count from the sample's first byte."""

    kind: int
    record: tuple[int, int]
    images: list[tuple[int, int, int, int]]
    num_chars: int


def scan(
    shard: str, file: IO[bytes], size: int, *, checksums: bool, limit: int | None = None
) -> Scan:
    """Walk over a tar.

    Args:
        shard: path or URL, for messages.
        file: the tar, which is sought in.
        size: of the tar in bytes.
        checksums: read everything, for the checksums; else headers and records only.
        limit: stop after so many samples; None walks to the end.

    Raises:
        DataError: if the file is no tar, or damaged before its first sample ends.
    """
    found = Scan()
    seen: set[str] = set()
    walk = _Walk(file, size)
    for key, members, is_sure in islice(walk, limit):
        begin, end = members[0].offset, max(m.offset_data + m.size for m in members)
        if end > size:
            continue  # cut off, as the walk is about to say
        whole = b""
        if checksums and end - begin <= MAX_SAMPLE_BYTES:
            file.seek(begin)
            whole = file.read(end - begin)
        piece = _piece(file, whole, begin)
        try:
            _check_group(key, seen, end - begin)
            sample = _examine(key, members, begin, piece)
        except (_UnusableError, DataError) as error:
            if is_sure:
                found.add_unusable(
                    key, begin, min(end - begin, MAX_SAMPLE_BYTES), zlib.crc32(whole), str(error)
                )
        else:
            # Only our own records say how many images there have to be.
            if is_sure or sample.kind == KIND_SAMPLE:
                found.add(key, begin, end - begin, zlib.crc32(whole), sample)
        seen.add(key)
    found.damage = walk.damage
    if walk.damage and not found.rows:
        raise DataError(_no_tar(shard, file, walk.damage))
    return found


class _Walk:
    """Iterates over (key, members, whether all members are known) of a WebDataset tar.

    Members that WebDataset skips are skipped. `damage` says afterwards what ended the walk early.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.damage = ""

    def __iter__(self) -> Iterator[tuple[str, list[tarfile.TarInfo], bool]]:
        key, members = "", list[tarfile.TarInfo]()
        for member in self._members():
            name = split_name(member.name)[0] if member.isfile() else ""
            if not name:
                continue
            if members and name != key:
                yield key, members, True
                members = []
            key = name
            members.append(member)
        if members:
            yield key, members, not self.damage

    def _members(self) -> Iterator[tarfile.TarInfo]:
        place = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    place = tar.offset
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    yield member
                place = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            self.damage = f"damaged or cut off at byte {min(place, self._size)} ({error})"
            return
        self._file.seek(place)
        tail = self._file.read(TAIL_BYTES)
        if tail[:BLOCK_BYTES] != bytes(BLOCK_BYTES):
            # tarfile takes a damaged header behind the first one for the end.
            self.damage = f"damaged or cut off at byte {min(place, self._size)}"
        elif tail.count(0) != len(tail):
            self.damage = f"more data behind its end at byte {place}, which is not read"


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension in lower case) of a member's name; ("", "") if it is of no sample."""
    match = MEMBER_NAME.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else ("", "")


def _piece(file: IO[bytes], whole: bytes, begin: int) -> Piece:
    """Return a function that gives a part of a sample, counted from its first byte."""

    def piece(start: int, size: int) -> bytes:
        if whole:
            return whole[start : start + size]
        file.seek(begin + start)
        return file.read(size)

    return piece


def _check_group(key: str, seen: set[str], size: int) -> None:
    if not key.isprintable():
        raise _UnusableError("the key holds a character that no key may have")
    if key in seen:
        raise _UnusableError(
            "key used twice: two samples share it, or the members of one are not adjacent"
        )
    if size > MAX_SAMPLE_BYTES:
        raise _UnusableError(f"absurd size: {size} bytes")


def _examine(key: str, members: list[tarfile.TarInfo], begin: int, piece: Piece) -> _Found:
    """Find record and images of a sample; _UnusableError or DataError says what is wrong."""
    json_file, text_file, image_files = _sort(key, members)
    pages = [(member.offset_data - begin, member.size) for member in image_files]
    sample: Sample | None = None
    if json_file is not None:
        record = json_file.offset_data - begin, json_file.size
        data = piece(*record)
        if _is_ours(data, has_text=text_file is not None):
            sample = build_sample(key, KIND_SAMPLE, data, [], ())
            return _our_own(sample, record, pages)
    sizes = _measure(pages, piece)
    if json_file is not None:
        try:
            sample = build_sample(key, KIND_JSON, data, sizes, ())
            return _Found(KIND_JSON, record, _places(pages, sizes), num_chars(sample))
        except DataError:
            if text_file is None:
                raise
    if text_file is None:
        raise _UnusableError("no record: expected KEY.json or KEY.txt")
    record = text_file.offset_data - begin, text_file.size
    sample = build_sample(key, KIND_TEXT, piece(*record), sizes, ())
    return _Found(KIND_TEXT, record, _places(pages, sizes), num_chars(sample))


def _is_ours(data: bytes, *, has_text: bool) -> bool:
    """Tell whether a JSON file is a record of ours; DataError if it is not even JSON."""
    try:
        return is_ours(load_json(data))
    except DataError as error:
        if has_text and not str(error).startswith("invalid JSON"):
            return False  # a list or number beside a text, which is the record then
        raise


def _our_own(sample: Sample, record: tuple[int, int], pages: list[tuple[int, int]]) -> _Found:
    if len(pages) != len(sample.images):
        raise _UnusableError(
            f"image files missing or too many: {len(pages)} in the tar, {len(sample.images)} in "
            "the record"
        )
    sizes = [(page.width, page.height) for page in sample.images]
    for width, height in sizes:
        _check_size(width, height)
    return _Found(KIND_SAMPLE, record, _places(pages, sizes), num_chars(sample))


def _places(
    pages: list[tuple[int, int]], sizes: list[tuple[int, int]]
) -> list[tuple[int, int, int, int]]:
    return [(*page, *size) for page, size in zip(pages, sizes, strict=True)]


def _sort(
    key: str, members: list[tarfile.TarInfo]
) -> tuple[tarfile.TarInfo | None, tarfile.TarInfo | None, list[tarfile.TarInfo]]:
    """Return `KEY.json`, `KEY.txt` and the images in the order of their numbers."""
    records: dict[str, list[tarfile.TarInfo]] = {"json": [], "txt": []}
    pages: list[tuple[int, int, tarfile.TarInfo]] = []
    for member in members:
        extension = split_name(member.name)[1]
        *number, kind = extension.split(".")
        if extension in records:
            records[extension].append(member)
        elif kind in IMAGE_EXTENSIONS:
            place = int(number[-1]) if number and number[-1].isdecimal() else -1
            pages.append((place, len(pages), member))
    for extension, found in records.items():
        if len(found) > 1:
            raise _UnusableError(f"two records: {len(found)} x {key}.{extension}")
    json_file, text_file = (next(iter(found), None) for found in records.values())
    return json_file, text_file, [page for *_, page in sorted(pages, key=lambda page: page[:2])]


def _measure(pages: list[tuple[int, int]], piece: Piece) -> list[tuple[int, int]]:
    """Return the oriented (width, height) of images, from their headers."""
    if not pages:
        raise _UnusableError("no image: expected KEY.jpg, KEY.png or the like")
    sizes = []
    for number, (start, size) in enumerate(pages):
        try:
            sizes.append(_oriented_size(start, size, piece))
        except DataError as error:
            raise _UnusableError(f"unreadable image: image {number}, {error}") from error
        _check_size(*sizes[-1])
    return sizes


def _oriented_size(start: int, size: int, piece: Piece) -> tuple[int, int]:
    head = piece(start, min(size, HEADER_BYTES))
    if len(head) < size and head.startswith(b"\xff\xd8"):
        try:
            return oriented_size(head)
        except DataError:
            head = b""  # its header is longer than usual
    return oriented_size(head if len(head) == size else piece(start, size))


def _check_size(width: int, height: int) -> None:
    is_absurd = min(width, height) < 1 or width * height > MAX_IMAGE_PIXELS
    if is_absurd or max(width, height) > MAX_ASPECT * min(width, height):
        raise _UnusableError(f"absurd image size: {width} x {height} px")


def num_chars(sample: Sample) -> int:
    """Return the number of characters of a sample's text or of its annotations."""
    if sample.text is not None:
        return len(sample.text)
    return sum(len(annotation.text) for annotation in sample.annotations)


def _no_tar(shard: str, file: IO[bytes], damage: str) -> str:
    file.seek(0)
    start = file.read(BLOCK_BYTES)
    for magic, (name, command) in COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"{shard}: compressed with {name}, in which no sample can be read by itself. "
                f"Unpack it ({command}); images gain nothing from it"
            )
    return f"{shard}: no readable tar file with a whole sample ({damage}); build it again"
