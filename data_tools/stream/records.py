"""From the bytes of one sample's range to the sample: checked against what the index says."""

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from data_tools.errors import ChecksumError, DataError, ShardChangedError
from data_tools.sample import Sample
from data_tools.stream.foreign import json_sample, text_sample

BLOCK_BYTES = 512  # of a tar: headers and padding
KIND_SAMPLE, KIND_JSON, KIND_TEXT, KIND_UNUSABLE = range(4)

ImagePlace = tuple[int, int, int, int]


def parse_sample(
    key: str,
    kind: int,
    json_start: int,
    json_size: int,
    images: Sequence[ImagePlace],
    crc32: int,
    data: bytes,
) -> Sample:
    """Build a sample from the bytes of its range.

    Args:
        key: of the sample.
        kind: of its record: ours, JSON of another shape, text, or unusable.
        json_start: place of the record in `data`.
        json_size: its size in bytes.
        images: (start, size, width, height) of every image; the sizes are the oriented ones.
        crc32: of `data` when it was indexed; 0 if that is unknown.
        data: exactly the range.

    Raises:
        ShardChangedError: if the shard does not hold this sample where its index says.
        ChecksumError: if the bytes are not those that were indexed.
        DataError: if they make no sample.
    """
    if crc32 == 0 or zlib.crc32(data) != crc32:
        check_header(key, [json_start, *(start for start, *_ in images)], data)
        if crc32:
            raise ChecksumError(f'sample "{key}": bytes differ from the index (crc32)')
    image_bytes = tuple(data[start : start + size] for start, size, *_ in images)
    return parse_record(key, kind, data[json_start : json_start + json_size], images, image_bytes)


def parse_record(
    key: str,
    kind: int,
    record: bytes,
    images: Sequence[ImagePlace],
    image_bytes: tuple[bytes, ...] = (),
) -> Sample:
    """Build a sample from the bytes of its record, without those of its images (`parse_sample`).

    Raises:
        DataError: if they make no sample.
    """
    if kind == KIND_UNUSABLE:
        raise DataError(f'sample "{key}": its index says that it cannot be used')
    sizes = [(width, height) for *_, width, height in images]
    try:
        return build_sample(key, kind, record, sizes, image_bytes)
    except DataError as error:
        raise DataError(f'sample "{key}": {error}') from error


def check_header(key: str, starts: Iterable[int], data: bytes) -> None:
    """Check that a range holds members of a sample.

    One header that fits is enough: a flipped byte spoils a sample, not the shard.

    Args:
        key: of the sample.
        starts: places of members in `data`; each has its tar header in the block before.
        data: the range.

    Raises:
        ShardChangedError: if no member can belong to the sample.
    """
    blocks = (data[max(0, start - BLOCK_BYTES) :][:BLOCK_BYTES] for start in starts)
    if not any(_is_header_of(block, key) for block in blocks):
        raise ShardChangedError(
            f'sample "{key}": the shard does not hold what its index says; it was replaced or cut '
            "off. If that was meant, index it again: `python -m data_tools.index SHARD`"
        )


def build_sample(
    key: str,
    kind: int,
    record: bytes,
    sizes: Sequence[tuple[int, int]],
    image_bytes: tuple[bytes, ...],
) -> Sample:
    """Build a sample from its record and images; messages of errors do not name it.

    Args:
        key: of the sample.
        kind: of its record.
        record: its bytes.
        sizes: oriented (width, height) of the images; our own records hold them.
        image_bytes: encoded images, or none.

    Raises:
        DataError: if the record is malformed.
    """
    if kind == KIND_TEXT:
        return text_sample(key, record, sizes, image_bytes)
    content = load_json(record)
    if kind == KIND_JSON:
        return json_sample(key, content, sizes, image_bytes)
    try:
        return Sample.from_json(key, content, image_bytes)
    except DataError as error:
        text = str(error).removeprefix(f'sample "{key}": ')
        raise DataError(f"malformed record: {text}") from error


def load_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object that some bytes hold.

    Raises:
        DataError: if they hold none.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"no JSON object: {type(record).__name__} in its place")
    return record


def is_ours(record: dict[str, Any]) -> bool:
    """Tell whether a JSON object is the record of `data_tools.build`, of any version of it."""
    version = record.get("version")
    return isinstance(version, int) and not isinstance(version, bool)


def _is_header_of(header: bytes, key: str) -> bool:
    if header[257:262] != b"ustar":
        return False
    name = f"{key}.".encode("utf-8", "backslashreplace")
    if not key.isascii() or len(name) > 80:
        return True  # stands in an extended header, which is written in several ways
    return header[:100].removeprefix(b"./").startswith(name)
