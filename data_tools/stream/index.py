"""Where every sample of a shard lies: one index file beside each tar, `name-000123.tar.index`.

The index holds what depends on the shard alone. It is a safetensors file (columns, no pickle, easy
to memory-map): per sample the byte range that holds all its members, the JSON inside it and the
number of annotated characters; per image its range and oriented size. How long a sample is for a
given tokenizer and task is not in here but in `data_tools.stream.lengths`.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from data_tools.errors import DataError
from data_tools.sample import IMAGE_EXTENSIONS, Sample

INDEX_VERSION = "1"
FINGERPRINT_BYTES = 65536


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

    @cached_property
    def _file(self) -> Any:
        return fsspec.open(self.path, "rb").open()

    def read(self, row: int) -> Sample:
        """Read one sample: one range read of the tar.

        Raises:
            DataError: if the tar is shorter than its index says, or the sample is malformed.
        """
        offset, size = int(self.offset[row]), int(self.size[row])
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size or data[257:262] != b"ustar":
            raise DataError(
                f'{self.path}, sample "{self.keys[row]}": the shard does not hold what its index '
                "says; it was replaced or cut off. Delete the .index file to index it again"
            )
        return self.parse(row, data)


def index_path(shard: str) -> str:
    """Return where the index of a shard lies."""
    return f"{shard}.index"


def index_shard(shard: str) -> ShardIndex:
    """Index one shard, write the index beside it and return it.

    Raises:
        DataError: if the tar is damaged, a sample's members are not adjacent, or one has no JSON.
    """
    index = _scan(shard)
    columns = {name: getattr(index, name) for name in _COLUMNS}
    blob = "\n".join(index.keys).encode("utf-8")
    columns["keys"] = np.frombuffer(blob, np.uint8)
    metadata = {"version": INDEX_VERSION} | _identity(shard)
    target = index_path(shard)
    temporary = f"{target}.tmp"
    filesystem, path = fsspec.core.url_to_fs(temporary)
    with filesystem.open(path, "wb") as file:
        file.write(save(columns, metadata))
    filesystem.mv(path, fsspec.core.url_to_fs(target)[1])
    return index


def open_index(shard: str) -> ShardIndex:
    """Open the index of a shard; make it if there is none.

    Raises:
        DataError: if the index belongs to another version of the shard.
    """
    filesystem, path = fsspec.core.url_to_fs(index_path(shard))
    if not filesystem.exists(path):
        return index_shard(shard)
    local = path if "file" in _protocols(filesystem) else fsspec.open_local(f"simplecache::{path}")
    with safe_open(local, framework="np") as file:
        metadata = file.metadata()
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    identity = _identity(shard)
    if metadata.get("version") != INDEX_VERSION or any(
        metadata[name] != value for name, value in identity.items()
    ):
        raise DataError(
            f"{index_path(shard)} describes another version of this shard "
            f"({metadata.get('tar_bytes')} bytes, now {identity['tar_bytes']}); delete it"
        )
    keys = bytes(columns.pop("keys")).decode("utf-8")
    return ShardIndex(path=shard, keys=tuple(keys.split("\n")) if keys else (), **columns)


def expand(patterns: list[str]) -> list[str]:
    """Return the shards that paths, URLs and globs name, sorted within each pattern.

    Raises:
        DataError: if a pattern matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(pattern))
        matches = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
        if not matches or not filesystem.exists(matches[0]):
            raise DataError(
                f"no shard matches {pattern}; build some with `python -m data_tools.build SRC OUT`"
            )
        is_local = "file" in _protocols(filesystem)
        found += matches if is_local else [filesystem.unstrip_protocol(match) for match in matches]
    return found


def iterate_samples(patterns: list[str]) -> Iterator[Sample]:
    """Read every sample of the shards in their order, images included."""
    for shard in expand(patterns):
        index = open_index(shard)
        for row in range(len(index)):
            yield index.read(row)


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


def _scan(shard: str) -> ShardIndex:
    rows: list[tuple[int, int, int, int, int]] = []
    images: list[tuple[int, int, int, int]] = []
    first_image, keys = [0], []
    with fsspec.open(shard, "rb") as file:
        for key, members in _groups(shard, file):
            begin = members[0].offset
            record_member = next((m for m in members if m.name.endswith(".json")), None)
            if record_member is None:
                raise DataError(f'{shard}, sample "{key}": no {key}.json; expected one a sample')
            file.seek(record_member.offset_data)
            record = _load_json(key, file.read(record_member.size))
            pages = [m for m in members if m.name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
            sample = Sample.from_json(key, record)
            if len(pages) != len(sample.images):
                raise DataError(
                    f'{shard}, sample "{key}": {len(pages)} image files, '
                    f"{len(sample.images)} in {key}.json"
                )
            for page, image in zip(pages, sample.images, strict=True):
                images.append((page.offset_data - begin, page.size, image.width, image.height))
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
    )


def _groups(shard: str, file: Any) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yield (key, members) of a WebDataset tar; the key is the name up to its first dot."""
    key, members, seen = "", [], set()
    try:
        for member in tarfile.open(fileobj=file, mode="r:"):
            if not member.isfile():
                continue
            name = member.name.split(".", 1)[0]
            if members and name != key:
                yield key, members
                members = []
            if not members:
                if name in seen:
                    raise DataError(
                        f'{shard}: the members of sample "{name}" are not adjacent, or two '
                        "samples share the key; write the shard in WebDataset order"
                    )
                seen.add(name)
            key = name
            members.append(member)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: no readable tar file ({error}); build it again") from error
    if members:
        yield key, members


def _num_chars(sample: Sample) -> int:
    if sample.text is not None:
        return len(sample.text)
    return sum(len(annotation.text) for annotation in sample.annotations)


def _load_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f'sample "{key}": {key}.json is no valid JSON ({error})') from error


def _identity(shard: str) -> dict[str, str]:
    """Return what tells one version of a shard from another: its size and both of its ends."""
    with fsspec.open(shard, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return {"tar_bytes": str(size), "sha256_of_ends": digest.hexdigest()}


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
