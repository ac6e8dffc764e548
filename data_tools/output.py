"""An output folder for a command that may be typed again: its settings, files that appear whole.

The folder may be an fsspec URL. A file is written under a temporary name and renamed when it is
complete, so what stands under its final name is finished and a second run may skip it. The settings
of the run lie in a JSON file; the same folder with other settings is refused. Several processes may
fill one folder, each its own files; two that write one file at once must write the same bytes.
"""

import glob
import json
import os
import socket
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from data_tools.errors import ConfigError
from data_tools.sample import Sample

PARTIAL = ".partial"


def join(folder: str, name: str) -> str:
    """Return the path or URL of a name inside a folder; an absolute name or URL stays as it is."""
    if "://" in name or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if folder else name


def exists(path: str) -> bool:
    """Tell whether a path or URL exists."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(inner))


def make_folder(path: str) -> None:
    """Create a folder and its parents; a folder that exists is fine."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    filesystem.makedirs(inner, exist_ok=True)


def write_file(path: str, content: bytes) -> None:
    """Write a file so that it appears under its name only when it is complete."""
    with _published(path) as stream:
        stream.write(content)


def write_shard(path: str, samples: Iterable[Sample]) -> int:
    """Write samples as one plain WebDataset tar and return their number.

    The bytes of the tar depend on the samples alone (no time, no owner). Members stand together,
    images first, so that any WebDataset reader groups them by key.
    """
    count = 0
    with (
        _published(path) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for sample in samples:
            for name, content in sample.to_members().items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                member.mode = 0o644
                tar.addfile(member, BytesIO(content))
            count += 1
    return count


def claim_folder(folder: str, record_name: str, settings: dict[str, Any]) -> None:
    """Make `folder` and record the settings in it, or check that the recorded ones are the same.

    Processes that start at once with the same settings all pass.

    Raises:
        ConfigError: if the folder was begun with other settings; the message names them.
    """
    make_folder(folder)
    path = join(folder, record_name)
    if not exists(path):
        write_file(path, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    # Read back even so: another process may have begun the folder at the same moment.
    with fsspec.open(path, "rt", encoding="utf-8") as stream:
        recorded = json.load(stream)
    wanted = json.loads(json.dumps(settings))
    changed = [
        f"{name} was {recorded.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(set(recorded) | set(wanted))
        if recorded.get(name) != wanted.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{path}: this folder was begun with other settings: {'; '.join(changed)}. "
            "Use the same settings to go on, or another output folder."
        )


@contextmanager
def _published(path: str) -> Iterator[BinaryIO]:
    """Open a file to be written that gets its name when it is complete.

    The temporary name is the process's own. What earlier, interrupted writers of the same file left
    is removed; so is the temporary file of one that writes at this moment, which then finds that
    its file is there already.
    """
    filesystem, inner = fsspec.core.url_to_fs(path)
    partial = f"{inner}.{socket.gethostname()}-{os.getpid()}{PARTIAL}"
    with filesystem.open(partial, "wb") as stream:
        yield stream
    try:
        filesystem.mv(partial, inner)
    except FileNotFoundError:
        if not filesystem.exists(inner):
            raise
    if isinstance(filesystem, LocalFileSystem):
        for left in glob.glob(f"{glob.escape(inner)}*{PARTIAL}"):
            with suppress(FileNotFoundError):
                os.remove(left)


@contextmanager
def text_file_or_none(path: Path | None) -> Iterator[TextIO | None]:
    """Open a UTF-8 file to be written, or give None where none is wanted."""
    if path is None:
        yield None
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file
