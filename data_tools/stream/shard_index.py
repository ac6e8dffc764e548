"""The index of one shard in memory: its columns, and the samples that they find in the tar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from data_tools.errors import DataError, ShardChangedError
from data_tools.sample import Sample
from data_tools.stream.ranges import ByteRange, RangeReader
from data_tools.stream.records import ImagePlace, parse_record, parse_sample
from data_tools.stream.storage import shard_version

reader = RangeReader()  # of commands and indexing; a run has one with its own settings


class Keys(Sequence[str]):
    """The names of a shard's samples, decoded one by one when they are asked for.

    Attributes:
        blob: (bytes,) uint8, all of them in UTF-8 without anything between.
        ends: (n,) uint64, where each ends in `blob`.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """Return the sequence of some names."""
        parts = [key.encode("utf-8") for key in keys]
        ends = np.cumsum([len(part) for part in parts], dtype=np.uint64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        if isinstance(row, slice):
            return tuple(self[number] for number in range(*row.indices(len(self))))
        row = range(len(self))[row]
        start = int(self.ends[row - 1]) if row else 0
        return bytes(self.blob[start : int(self.ends[row])]).decode("utf-8")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class ShardIndex:
    """The columns of one shard.

    Attributes:
        path: of the tar (a path or URL).
        offset: (n,) uint64, first byte of a sample's first member header.
        size: (n,) uint32, length of the range that holds all members of a sample.
        crc32: (n,) uint32, zlib.crc32 of that range; 0 if it is unknown.
        kind: (n,) uint8, of the record (`data_tools.stream.records`).
        json_start, json_size: (n,) uint32, the record inside that range.
        num_chars: (n,) uint32, characters of all annotations or of `text`.
        first_image: (n + 1,) uint32, a sample's images are rows [first_image[i], first_image[i+1]).
        image_start, image_size: (m,) uint32, an encoded image inside its sample's range.
        image_wh: (m, 2) uint32, oriented width and height in pixels.
        keys: the samples' names.
        reasons: row -> why the sample cannot be used: general words, a colon, the case.
        damage: what is wrong with the tar, whose samples up to there are kept; "" if nothing.
        identity: the tar's size and a digest of both of its ends.
        etag: what an object store calls this version of the tar; "" if it says nothing.
    """

    path: str
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    kind: np.ndarray
    json_start: np.ndarray
    json_size: np.ndarray
    num_chars: np.ndarray
    first_image: np.ndarray
    image_start: np.ndarray
    image_size: np.ndarray
    image_wh: np.ndarray
    keys: Keys
    reasons: dict[int, str]
    damage: str
    identity: str
    etag: str

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def version(self) -> str:
        """What a `ByteRange` of this shard is checked against."""
        return shard_version(self.identity, self.etag)

    def images(self, row: int) -> list[ImagePlace]:
        """Return (start, size, width, height) of each image of a sample."""
        rows = slice(int(self.first_image[row]), int(self.first_image[row + 1]))
        starts, sizes, wh = (
            column[rows].tolist() for column in (self.image_start, self.image_size, self.image_wh)
        )
        return [(a, b, w, h) for a, b, (w, h) in zip(starts, sizes, wh, strict=True)]

    def byte_range(self, row: int) -> ByteRange:
        """Return where the bytes of a sample lie."""
        return ByteRange(self.path, self.version, int(self.offset[row]), int(self.size[row]))

    def parse(self, row: int, data: bytes) -> Sample:
        """Build the sample of a row from the bytes of its range.

        Raises:
            ShardChangedError: if the tar does not hold this sample where its index says.
            DataError: if the sample is malformed or has a reason.
        """
        self._check_usable(row)
        record = int(self.kind[row]), int(self.json_start[row]), int(self.json_size[row])
        crc32 = int(self.crc32[row])
        try:
            return parse_sample(self.keys[row], *record, self.images(row), crc32, data)
        except DataError as error:
            raise type(error)(f"{self.path}, {error}") from error

    def read(self, row: int) -> Sample:
        """Read one sample: one range read of the tar.

        Raises:
            ShardChangedError: if the tar does not hold this sample where its index says.
            DataError: if the sample is malformed or has a reason.
            StorageError: if the tar cannot be read.
        """
        self._check_usable(row)
        return self.parse(row, reader.read(self.byte_range(row)))

    def read_many(self, rows: Sequence[int]) -> list[Sample | DataError]:
        """Read several samples at once; one that cannot be used gives the error that says why."""
        blocks = reader.read_many([self.byte_range(row) for row in rows])
        return [_or_error(self.parse, row, data) for row, data in zip(rows, blocks, strict=True)]

    def read_records(self, rows: Sequence[int]) -> list[Sample | DataError]:
        """Read several samples without the bytes of their images (`read_many`)."""
        places = [
            ByteRange(
                self.path,
                self.version,
                int(self.offset[row]) + int(self.json_start[row]),
                int(self.json_size[row]),
            )
            for row in rows
        ]
        blocks = reader.read_many(places)
        return [
            _or_error(self._parse_record, row, data) for row, data in zip(rows, blocks, strict=True)
        ]

    def _parse_record(self, row: int, data: bytes) -> Sample:
        self._check_usable(row)
        try:
            return parse_record(self.keys[row], int(self.kind[row]), data, self.images(row))
        except DataError as error:
            raise type(error)(f"{self.path}, {error}") from error

    def _check_usable(self, row: int) -> None:
        if row in self.reasons:
            raise DataError(f'{self.path}, sample "{self.keys[row]}": {self.reasons[row]}')


def _or_error(parse: Callable[[int, bytes], Sample], row: int, data: bytes) -> Sample | DataError:
    try:
        return parse(row, data)
    except ShardChangedError:
        raise
    except DataError as error:
        return error
