"""Where every sample of a shard lies: one index file a tar, beside it or in a folder of indexes.

The index holds what depends on the shard alone. It is a file of columns, memory-mapped
(`data_tools.stream.columns`): per sample the byte range that holds all its members, the record
inside it, the number of characters and a checksum; per image its range and oriented size. How long
a sample is for a given tokenizer and task is not in here but in `data_tools.stream.lengths`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import braceexpand
import numpy as np

from data_tools.errors import DataError, ShardChangedError
from data_tools.jobs import run_jobs
from data_tools.sample import Sample
from data_tools.stream.columns import create_columns, open_columns
from data_tools.stream.files import beside, make_local_folder, write_atomically
from data_tools.stream.ranges import ByteRange
from data_tools.stream.remote import (
    NoRangesError,
    call,
    connect,
    exists,
    how_to_index,
    http_status,
    is_local,
    local_path,
)
from data_tools.stream.scan import Scan, scan
from data_tools.stream.shard_index import Keys, ShardIndex, reader
from data_tools.stream.storage import shard_identity, shard_version

__all__ = ["ShardChangedError", "ShardIndex", "beside", "expand", "index_shard", "index_shards",
           "iterate_samples", "open_beginning", "open_index", "same_shards"]  # fmt: skip

INDEX_VERSION = "2"
FINGERPRINT_BYTES = 65536
HEADERS_BLOCK_BYTES = 65536  # headers and records are read from remote shards in such pieces
WHOLE_BLOCK_BYTES = 8 * 2**20
LOOKUPS_AT_A_TIME = 16
ERRORS_SHOWN = 5


def index_path(shard: str, index_dir: str | None = None) -> str:
    """Return where the index of a shard lies (`beside`)."""
    return beside(shard, ".index", index_dir)


def index_shard(shard: str, *, index_dir: str | None = None, checksums: bool = False) -> ShardIndex:
    """Index one shard, store the index and return it.

    Args:
        shard: path or URL.
        index_dir: a folder for the index, if not beside the shard.
        checksums: read all of a remote shard for its checksums; local ones always have them.

    Raises:
        DataError: if the file is no tar, holds no whole sample before a damage, or the index cannot
            be stored.
        StorageError: if the shard cannot be read.
    """
    size, etag = reader.state_of(shard)
    has_checksums = checksums or is_local(shard)
    try:
        identity, found = _walk(shard, shard, size, etag, has_checksums)
    except NoRangesError:
        with tempfile.TemporaryDirectory() as folder:
            copy, has_checksums = f"{folder}/shard.tar", True
            reader.copy_whole(shard, size, copy)
            identity, found = _walk(shard, copy, size, "", has_checksums)
    if index_dir is not None:
        make_local_folder(index_dir)
    metadata = {
        "version": INDEX_VERSION,
        "shard": shard,
        "identity": identity,
        "etag": etag,
        "damage": found.damage,
        "checksums": str(int(has_checksums)),
    }
    url = index_path(shard, index_dir)
    write_atomically(url, _file_of(found, metadata))
    stored = _stored(url)
    if stored is None:
        raise DataError(f"{url}: the index was removed while it was made; start the command again")
    return _shard_index(shard, *stored, etag)


def open_index(shard: str, index_dir: str | None = None) -> ShardIndex:
    """Open the index of a shard; make it if there is none, or one of an earlier release.

    Raises:
        ShardChangedError: if the index belongs to another version of the shard.
        DataError: if the index is damaged.
        StorageError: if shard or index cannot be read.
    """
    url = index_path(shard, index_dir)
    stored = _stored(url)
    if stored is None:
        return index_shard(shard, index_dir=index_dir)
    return _shard_index(shard, *stored, _check_identity(shard, url, stored[1]))


def open_beginning(shard: str, num_samples: int, index_dir: str | None = None) -> ShardIndex:
    """Open the index of a shard; without one, look at its first samples only and store nothing.

    Raises:
        ShardChangedError: if the index belongs to another version of the shard.
        DataError: if the index is damaged, or the shard holds no whole sample.
        StorageError: if shard or index cannot be read.
    """
    url = index_path(shard, index_dir)
    stored = _stored(url)
    if stored is not None:
        return _shard_index(shard, *stored, _check_identity(shard, url, stored[1]))
    size, etag = reader.state_of(shard)
    identity = _identity(shard, size, etag)
    with reader.open(shard, shard_version(identity, etag), HEADERS_BLOCK_BYTES) as file:
        found = scan(shard, file, size, checksums=False, limit=num_samples)
    columns = found.columns() | _names(found)
    return _shard_index(shard, columns, {"damage": found.damage, "identity": identity}, etag)


def index_shards(
    shards: Sequence[str],
    *,
    workers: int,
    index_dir: str | None = None,
    checksums: bool = False,
    replace: bool = False,
) -> list[str]:
    """Make the indexes that are missing, in parallel, with a progress bar.

    Args:
        shards: paths or URLs.
        workers: processes.
        index_dir: a folder for the indexes, if not beside the shards.
        checksums: also those of remote shards, all of which is read then.
        replace: index anew a shard that was replaced since; else that is an error.

    Returns:
        The shards that were indexed now.

    Raises:
        ShardChangedError: if a shard is not the one that was indexed.
        DataError: if shards cannot be indexed; all others are.
        StorageError: if a shard cannot be read.
    """

    def is_missing(shard: str) -> bool:
        url = index_path(shard, index_dir)
        stored = _stored(url)
        if stored is None or (checksums and stored[1].get("checksums") != "1"):
            return True
        try:
            _check_identity(shard, url, stored[1])
        except ShardChangedError:
            if not replace:
                raise
            return True
        return False

    unique = list(dict.fromkeys(shards))
    with ThreadPoolExecutor(LOOKUPS_AT_A_TIME) as pool:
        missing = [s for s, m in zip(unique, pool.map(is_missing, unique), strict=True) if m]
    if not missing:
        return []
    jobs = [_Job(shard, index_dir, checksums) for shard in missing]
    failed = [error for error in run_jobs(_run_job, jobs, workers, "indexing shards") if error]
    if failed:
        rest = f"\n... and {len(failed) - ERRORS_SHOWN} more" if len(failed) > ERRORS_SHOWN else ""
        raise DataError("\n".join(sorted(failed)[:ERRORS_SHOWN]) + rest)
    return missing


@dataclass(frozen=True)
class _Job:
    shard: str
    index_dir: str | None
    checksums: bool


def _run_job(job: _Job) -> str:
    """Index a shard; return what is wrong with it."""
    try:
        index_shard(job.shard, index_dir=job.index_dir, checksums=job.checksums)
    except DataError as error:
        return str(error)
    return ""


def expand(patterns: list[str]) -> list[str]:
    """Return the shards that paths, URLs, globs and braces name, sorted within each glob.

    Braces are those of WebDataset: `shards/train-{000000..000012}.tar`, `{train,extra}-*.tar`.

    Raises:
        DataError: if a pattern, or a part of its braces, matches nothing.
    """
    parts = [(part, pattern) for pattern in patterns for part in _braces(pattern)]
    with ThreadPoolExecutor(LOOKUPS_AT_A_TIME) as pool:
        found = list(pool.map(_match, *zip(*parts, strict=True))) if parts else []
    return [shard for shards in found for shard in shards]


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
    """Read every usable sample of the shards in their order, images included.

    Samples with a reason in their index are passed over; `python -m data_tools.index` counts them.
    """
    for shard in expand(patterns):
        index = open_index(shard)
        for row in range(len(index)):
            if row not in index.reasons:
                yield index.read(row)


_COLUMNS = (
    "offset", "size", "crc32", "kind", "json_start", "json_size", "num_chars", "first_image",
    "image_start", "image_size", "image_wh",
)  # fmt: skip


def _file_of(found: Scan, metadata: dict[str, str]) -> bytes:
    """Return the content of an index file."""
    columns = found.columns() | _names(found)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        specs = {name: (column.dtype, column.shape) for name, column in columns.items()}
        with create_columns(path, specs, metadata) as stored:
            for name, column in columns.items():
                stored[name][:] = column
        return path.read_bytes()


def _names(found: Scan) -> dict[str, np.ndarray]:
    """Return the columns of what is text."""
    keys = Keys.of(found.keys)
    reasons = json.dumps(found.reasons, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return {
        "keys": keys.blob,
        "key_end": keys.ends,
        "reasons": np.frombuffer(reasons, np.uint8),
    }


def _stored(url: str) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """Open an index file; None if there is none of this release."""
    try:
        if is_local(url):
            columns, metadata = open_columns(local_path(url))
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "index"
                path.write_bytes(call(url, _content))
                columns, metadata = open_columns(path)  # stays mapped when the file is gone
    except FileNotFoundError:
        return None
    except DataError as error:
        raise DataError(f"{url}: no readable index; delete it ({error})") from error
    return (columns, metadata) if metadata.get("version") == INDEX_VERSION else None


def _content(filesystem: Any, path: str) -> bytes:
    try:
        return cast(bytes, filesystem.cat_file(path))
    except Exception as error:  # each client has errors of its own
        # Object stores answer 403 for what is not there to those who may not list.
        if isinstance(error, PermissionError) or http_status(error) == 403:
            raise FileNotFoundError(path) from None
        raise


def _shard_index(
    shard: str, columns: dict[str, np.ndarray], metadata: dict[str, str], etag: str
) -> ShardIndex:
    reasons = json.loads(bytes(columns["reasons"]))
    return ShardIndex(
        path=shard,
        keys=Keys(columns["keys"], columns["key_end"]),
        reasons={int(row): reason for row, reason in reasons.items()},
        damage=metadata["damage"],
        identity=metadata["identity"],
        etag=etag,
        **{name: columns[name] for name in _COLUMNS},
    )


def _walk(shard: str, place: str, size: int, etag: str, checksums: bool) -> tuple[str, Scan]:
    """Return (identity, what a walk over it finds) of a shard that is read at some place."""
    identity = _identity(place, size, etag)
    block = WHOLE_BLOCK_BYTES if checksums else HEADERS_BLOCK_BYTES
    with reader.open(place, shard_version(identity, etag), block) as file:
        return identity, scan(shard, file, size, checksums=checksums)


def _identity(shard: str, size: int, etag: str) -> str:
    """Return the identity of a shard as it is now."""
    length = min(size, FINGERPRINT_BYTES)
    places = [(0, length), (size - length, length)]
    if is_local(shard):
        with reader.open(shard) as file:
            ends = [os.pread(file.fileno(), length, start) for start, length in places]
    else:
        version = shard_version(shard_identity(size, ""), etag)
        ends = reader.read_many([ByteRange(shard, version, *place) for place in places])
    return shard_identity(size, hashlib.sha256(b"".join(ends)).hexdigest())


def _check_identity(shard: str, url: str, metadata: dict[str, str]) -> str:
    """Return the etag of a shard that is the one that was indexed.

    Raises:
        ShardChangedError: if it is another one.
    """
    size, etag = reader.state_of(shard)
    # An index may have come with its shard from another place, where etags are others.
    if etag and metadata["etag"] and metadata["shard"] == shard:
        is_same, now = etag == metadata["etag"], f"ETag {etag}, now"
    else:
        is_same = _identity(shard, size, etag) == metadata["identity"]
        now = f"{size} bytes, now"
    if is_same:
        return etag
    was = metadata["identity"].split("-")[0]
    raise ShardChangedError(
        f"{url} describes another version of this shard ({was} bytes, then; {now}). "
        f"{how_to_index(shard)}, or delete the index and the .lengths files beside it"
    )


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
    place = os.path.expanduser(part)
    filesystem, inner = connect(place)
    is_web = place.startswith(("http://", "https://"))  # where ? begins a query
    if any(c in inner for c in ("*[" if is_web else "*?[")):
        found = sorted(call(place, lambda filesystem, path: filesystem.glob(path)))
    else:
        found = [inner] if exists(place) else []
    matches = found if is_local(place) else [filesystem.unstrip_protocol(m) for m in found]
    if not matches:
        whole = "" if part == pattern else f", a part of {pattern}"
        raise DataError(
            f"no shard matches {part}{whole}; build some with `python -m data_tools.build SRC OUT`"
        )
    return matches


def _resolve(shard: str) -> str:
    if is_local(shard):
        return os.path.realpath(local_path(shard))
    filesystem, path = connect(shard)
    return str(filesystem.unstrip_protocol(path))
