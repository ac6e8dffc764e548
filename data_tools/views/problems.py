"""What can be wrong with a sample, and the check of a piece of a shard for all of it."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.errors import DataError, ShardChangedError
from data_tools.examples.images import decode
from data_tools.sample import Sample
from data_tools.stream.index import ShardIndex, open_index
from data_tools.stream.ranges import RangeReader
from data_tools.stream.records import parse_sample

KINDS = {
    "shard": "the tar is damaged, cut off, or not the one that was indexed",
    "checksum": "bytes differ from those that were indexed",
    "record": "no usable JSON or text, or members that are missing",
    "image": "cannot be decoded",
    "size": "an image is not of the size that its record says",
    "box": "a box is empty or leaves its page, or the record breaks the contract otherwise",
    "text": "nothing to read: no text at all, or an annotation without any",
    "key": "another sample has the same key",
}
BATCH = 32  # samples whose ranges are read at once


@dataclass(frozen=True)
class Problem:
    """Something that is wrong; `key` is empty where it is the whole shard."""

    shard: str
    key: str
    kind: str
    problem: str


@dataclass(frozen=True)
class CheckJob:
    """Some rows of a shard, for a worker."""

    shard: str
    first: int
    stop: int
    index_dir: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """What a worker found in its rows."""

    num_samples: int
    num_images: int
    problems: tuple[Problem, ...]


def check_rows(job: CheckJob) -> CheckResult:
    """Read and check the samples of a job, images decoded."""
    return check_samples(open_index(job.shard, job.index_dir), range(job.first, job.stop))


def check_samples(index: ShardIndex, wanted: Sequence[int]) -> CheckResult:
    """Read and check some samples of a shard, images decoded."""
    reader = RangeReader()
    problems: list[Problem] = []
    num_images = 0
    for first in range(0, len(wanted), BATCH):
        rows = wanted[first : first + BATCH]
        try:
            contents = reader.read_many([index.byte_range(row) for row in rows])
        except ShardChangedError as error:
            problems.append(Problem(index.path, "", "shard", str(error)))
            break
        for row, data in zip(rows, contents, strict=True):
            num_images += len(index.images(row))
            key = index.keys[row]
            found = check_sample(index, row, data)
            problems += [Problem(index.path, key, kind, text) for kind, text in found]
    return CheckResult(len(wanted), num_images, tuple(problems))


def check_sample(index: ShardIndex, row: int, data: bytes) -> Iterator[tuple[str, str]]:
    """Yield (kind, problem) of a sample.

    Args:
        index: of its shard.
        row: its place there.
        data: the bytes of its range.
    """
    crc32 = int(index.crc32[row])
    if crc32 and zlib.crc32(data) != crc32:
        yield "checksum", f"crc32 {zlib.crc32(data):08x}, the index says {crc32:08x}"
    if row in index.reasons:
        reason = index.reasons[row]
        yield kind_of(reason), reason
        return
    key = index.keys[row]
    record = int(index.kind[row]), int(index.json_start[row]), int(index.json_size[row])
    try:
        # Without the checksum, which has been looked at: what else is wrong is to be told as well.
        sample = parse_sample(key, *record, index.images(row), 0, data)
    except DataError as error:
        kind = "shard" if isinstance(error, ShardChangedError) else "record"
        yield kind, str(error).removeprefix(f'sample "{key}": ')
        return
    yield from check_content(sample)


def kind_of(reason: str) -> str:
    """Return the kind of a problem that was found when the shard was indexed."""
    head = reason.split(":", 1)[0]
    if "key" in head.split():
        return "key"
    return "image" if "image" in head.split() else "record"


def check_content(sample: Sample) -> Iterator[tuple[str, str]]:
    """Yield (kind, problem) of a sample that could be read."""
    for number, (data, page) in enumerate(zip(sample.image_bytes, sample.images, strict=False)):
        try:
            height, width = decode(data, f"image {number}").shape[:2]
        except DataError as error:
            yield "image", str(error)
            continue
        if (width, height) != (page.width, page.height):
            yield (
                "size",
                f"image {number} is {width} x {height} px, its record says "
                f"{page.width} x {page.height}",
            )
    if len(sample.image_bytes) != len(sample.images):
        yield (
            "record",
            f"{len(sample.image_bytes)} image files, {len(sample.images)} in its record",
        )
    for problem in sample.problems():
        yield "box", problem
    blank = [n for n, annotation in enumerate(sample.annotations) if not annotation.text.strip()]
    if blank:
        numbers = ", ".join(map(str, blank[:5])) + (" ..." if len(blank) > 5 else "")
        yield "text", f"{len(blank)} annotations without text (number {numbers})"
    has_text = sample.text is not None and bool(sample.text.strip())
    if not (has_text or sample.annotations or sample.fields or sample.messages):
        yield "text", "no annotation, text, field or message: nothing to learn from"
