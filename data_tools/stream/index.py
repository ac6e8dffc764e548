"""Where every sample of a shard lies: one index file beside each tar, `name-000123.tar.index`.

The index holds what depends on the shard alone. It is a safetensors file (columns, no pickle, easy
to memory-map): per sample the byte range that holds all its members, the JSON inside it and the
number of annotated characters; per image its range and oriented size. How long a sample is for a
given tokenizer and task is not in here but in `data_tools.stream.lengths`.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import braceexpand
import fsspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_tools.errors import DataError
from data_tools.sample import IMAGE_EXTENSIONS, Sample
from data_tools.stream.files import OpenFiles, write_atomically

INDEX_VERSION = "1"
FINGERPRINT_BYTES = 65536
BLOCK_BYTES = 512  # of a tar: headers and padding
# WebDataset's own rule: the key goes up to the first dot behind the last slash.
MEMBER_NAME = re.compile(r"(?:\./)*((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)


class ShardChangedError(DataError):
    """A shard is no longer what its index describes: replaced or cut off."""


@dataclass(frozen=True)
class ShardIndex:
    """The columns of one shard.

    Attributes:
        path: of the tar (a path or URL).
        offset: (n,) uint64, first byte of a sample's first member header.
        size: (n,) uint32, length of the range that holds all members of a sample.
        json_start, json_size: (n,) uint32, `KEY.json` inside that range.
        num_chars: (n,) uint32, characters of all annotations or of `text`.
        first_image: (n + 1,) uint32, a sample's images are rows [first_image[i], first_image[i+1]).
        image_start, image_size: (m,) uint32, an encoded image inside its sample's range.
        image_wh: (m, 2) uint32, oriented width and height in pixels.
        keys: the samples' names.
        identity: digest of the tar's size and both of its ends.
    """

    path: str
    offset: np.ndarray
    size: np.ndarray
    json_start: np.ndarray
    json_size: np.ndarray
    num_chars: np.ndarray
    first_image: np.ndarray
    image_start: np.ndarray
    image_size: np.ndarray
    image_wh: np.ndarray
    keys: tuple[str, ...]
    identity: str

    def __len__(self) -> int:
        return len(self.keys)

    def parse(self, row: int, data: bytes) -> Sample:
        """Build the sample of a row from the bytes of its range."""
        start = int(self.json_start[row])
        record = _load_json(self.keys[row], data[start : start + int(self.json_size[row])])
        images = []
        for image in range(int(self.first_image[row]), int(self.first_image[row + 1])):
            begin = int(self.image_start[image])
            images.append(data[begin : begin + int(self.image_size[image])])
        return Sample.from_json(self.keys[row], record, tuple(images))

    def read(self, row: int) -> Sample:
        """Read one sample: one range read of the tar.

        Raises:
            ShardChangedError: if the tar does not hold this sample where its index says.
            DataError: if the sample is malformed.
        """
        offset, size = int(self.offset[row]), int(self.size[row])
        data = _open_shards.read(self.path, self.identity, offset, size)
        header = data[max(0, int(self.json_start[row]) - BLOCK_BYTES) :][:BLOCK_BYTES]
        if len(data) != size or not _is_header_of(header, self.keys[row]):
            raise ShardChangedError(
                f'{self.path}, sample "{self.keys[row]}": the shard does not hold what its index '
                "says; it was replaced or cut off. Delete the .index and .lengths files beside it "
                "to index it again"
            )
        return self.parse(row, data)


def index_path(shard: str) -> str:
    """Return where the index of a shard lies."""
    return f"{shard}.index"


def index_shard(shard: str) -> ShardIndex:
    """Index one shard, write the index beside it and return it.

    Raises:
        DataError: if the tar is damaged, a sample's members are not adjacent, one has no JSON, or
            the index cannot be written beside the shard.
    """
    identity = _identity(shard)
    index = _scan(shard, identity["sha256_of_ends"])
    columns = {name: getattr(index, name) for name in _COLUMNS}
    blob = "\n".join(index.keys).encode("utf-8")
    columns["keys"] = np.frombuffer(blob, np.uint8)
    write_atomically(index_path(shard), save(columns, {"version": INDEX_VERSION} | identity))
    return index


def open_index(shard: str) -> ShardIndex:
    """Open the index of a shard; make it if there is none.

    Raises:
        ShardChangedError: if the index belongs to another version of the shard.
        DataError: if the index is damaged.
    """
    url = index_path(shard)
    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.exists(path):
        return index_shard(shard)
    local = path if "file" in _protocols(filesystem) else fsspec.open_local(f"simplecache::{url}")
    try:
        with safe_open(local, framework="np") as file:
            metadata = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{url}: no readable index ({error}); delete it") from error
    expected = {"version": INDEX_VERSION} | _identity(shard)
    if any(metadata.get(name) != value for name, value in expected.items()):
        raise ShardChangedError(
            f"{url} describes another version of this shard ({metadata.get('tar_bytes')} bytes, "
            f"now {expected['tar_bytes']}); delete it and the .lengths files beside it"
        )
    blob = bytes(columns.pop("keys")).decode("utf-8")
    return ShardIndex(
        path=shard,
        keys=tuple(blob.split("\n")) if blob else (),
        identity=metadata["sha256_of_ends"],
        **columns,
    )


def expand(patterns: list[str]) -> list[str]:
    """Return the shards that paths, URLs, globs and braces name, sorted within each glob.

    Braces are those of WebDataset: `shards/train-{000000..000012}.tar`, `{train,extra}-*.tar`.

    Raises:
        DataError: if a pattern, or a part of its braces, matches nothing.
    """
    return [
        shard
        for pattern in patterns
        for part in _braces(pattern)
        for shard in _match(part, pattern)
    ]


def same_shards(first: list[str], second: list[str]) -> list[str]:
    """Return the shards that both lists name, however they write them; links are followed.

    Args:
        first: paths or URLs (`expand`).
        second: likewise.

    Returns:
        Resolved paths, sorted.
    """
    return sorted({_resolve(shard) for shard in first} & {_resolve(shard) for shard in second})


def iterate_samples(patterns: list[str]) -> Iterator[Sample]:
    """Read every sample of the shards in their order, images included."""
    for shard in expand(patterns):
        index = open_index(shard)
        for row in range(len(index)):
            yield index.read(row)


_open_shards = OpenFiles()

_COLUMNS = (
    "offset",
    "size",
    "json_start",
    "json_size",
    "num_chars",
    "first_image",
    "image_start",
    "image_size",
    "image_wh",
)


def _scan(shard: str, identity: str) -> ShardIndex:
    rows: list[tuple[int, int, int, int, int]] = []
    images: list[tuple[int, int, int, int]] = []
    first_image, keys = [0], []
    with fsspec.open(shard, "rb") as file:
        for key, members in _groups(shard, file):
            begin = members[0].offset
            record_member, pages = _json_and_pages(shard, key, members)
            file.seek(record_member.offset_data)
            try:
                sample = Sample.from_json(key, _load_json(key, file.read(record_member.size)))
            except DataError as error:
                raise DataError(f"{shard}: {error}") from error
            if len(pages) != len(sample.images):
                raise DataError(
                    f'{shard}, sample "{key}": {len(pages)} image files, '
                    f"{len(sample.images)} in {key}.json"
                )
            for member, page in zip(pages, sample.images, strict=True):
                images.append((member.offset_data - begin, member.size, page.width, page.height))
            end = max(member.offset_data + member.size for member in members)
            start = record_member.offset_data - begin
            rows.append((begin, end - begin, start, record_member.size, _num_chars(sample)))
            first_image.append(len(images))
            keys.append(key)
    offset, size, json_start, json_size, num_chars = np.asarray(rows, np.uint64).reshape(-1, 5).T
    image = np.asarray(images, np.uint32).reshape(-1, 4)
    return ShardIndex(
        path=shard,
        offset=np.ascontiguousarray(offset),
        size=size.astype(np.uint32),
        json_start=json_start.astype(np.uint32),
        json_size=json_size.astype(np.uint32),
        num_chars=num_chars.astype(np.uint32),
        first_image=np.asarray(first_image, np.uint32),
        image_start=np.ascontiguousarray(image[:, 0]),
        image_size=np.ascontiguousarray(image[:, 1]),
        image_wh=np.ascontiguousarray(image[:, 2:]),
        keys=tuple(keys),
        identity=identity,
    )


def _json_and_pages(
    shard: str, key: str, members: list[tarfile.TarInfo]
) -> tuple[tarfile.TarInfo, list[tarfile.TarInfo]]:
    """Return `KEY.json` and the images in the order of their numbers, however the tar has them."""
    records: list[tarfile.TarInfo] = []
    pages: list[tuple[int, int, tarfile.TarInfo]] = []
    for member in members:
        extension = _split_name(member.name)[1]
        *number, kind = extension.split(".")
        if extension == "json":
            records.append(member)
        elif kind in IMAGE_EXTENSIONS:
            place = int(number[-1]) if number and number[-1].isdecimal() else -1
            pages.append((place, len(pages), member))
    if len(records) != 1:
        how_many = "two" if records else "no"
        raise DataError(f'{shard}, sample "{key}": {how_many} {key}.json; expected one a sample')
    return records[0], [member for _, _, member in sorted(pages, key=lambda page: page[:2])]


def _groups(shard: str, file: Any) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yield (key, members) of a WebDataset tar; members that WebDataset skips are skipped."""
    key = ""
    members: list[tarfile.TarInfo] = []
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = _split_name(member.name)[0] if member.isfile() else ""
                if not name:
                    continue
                if members and name != key:
                    yield key, members
                    members = []
                if not members:
                    _check_key(shard, name, seen)
                    seen.add(name)
                key = name
                members.append(member)
            if members:
                yield key, members
            file.seek(tar.offset)
            if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
                # tarfile takes a damaged header behind the first one for the end.
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
    except tarfile.TarError as error:
        raise DataError(f"{shard}: no readable tar file ({error}); build it again") from error


def _split_name(name: str) -> tuple[str, str]:
    """Return (key, extension in lower case) of a member's name; ("", "") if it is of no sample."""
    match = MEMBER_NAME.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else ("", "")


def _check_key(shard: str, key: str, seen: set[str]) -> None:
    if key in seen:
        raise DataError(
            f'{shard}: the members of sample "{key}" are not adjacent, or two samples share the '
            "key; write the shard in WebDataset order"
        )
    if "\n" in key or not key.isprintable():
        raise DataError(f"{shard}: the key {key!r} holds a character that no key may have")


def _is_header_of(header: bytes, key: str) -> bool:
    """Return whether a tar header can be that of `KEY.json`."""
    name = f"{key}.json".encode()
    if header[257:262] != b"ustar":
        return False
    if not key.isascii() or len(name) > 100 - len("./"):
        return True  # stands in an extended header, which is written in several ways
    return header[:100].rstrip(b"\0").lower().removeprefix(b"./") == name.lower()


def _num_chars(sample: Sample) -> int:
    if sample.text is not None:
        return len(sample.text)
    return sum(len(annotation.text) for annotation in sample.annotations)


def _load_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f'sample "{key}": {key}.json is no valid JSON ({error})') from error
    if not isinstance(record, dict):
        raise DataError(f'sample "{key}": {key}.json holds no JSON object')
    return record


def _identity(shard: str) -> dict[str, str]:
    """Return what tells one version of a shard from another: its size and both of its ends."""
    with fsspec.open(shard, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return {"tar_bytes": str(size), "sha256_of_ends": digest.hexdigest()}


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"shard pattern {pattern}: a brace is not closed; write a range as "
            "train-{000000..000012}.tar"
        ) from error


def _match(part: str, pattern: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(part))
    matches = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
    if not matches or not filesystem.exists(matches[0]):
        whole = "" if part == pattern else f", a part of {pattern}"
        raise DataError(
            f"no shard matches {part}{whole}; build some with `python -m data_tools.build SRC OUT`"
        )
    if "file" in _protocols(filesystem):
        return matches
    return [filesystem.unstrip_protocol(match) for match in matches]


def _resolve(shard: str) -> str:
    filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(shard))
    if "file" in _protocols(filesystem):
        return os.path.realpath(path)
    return str(filesystem.unstrip_protocol(path))


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
