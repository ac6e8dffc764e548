"""What a user points at, as documents to be read: images, folders, globs, annotation files, lists.

Everything may be a path or an fsspec URL. Documents come one by one in an order that depends on
their names alone, so that a folder of millions need not be held, and no image is opened here.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from data_tools.errors import ConfigError, DataError
from data_tools.examples.images import decode
from data_tools.formats import FORMATS, SourceDocument, detect
from data_tools.sample import IMAGE_EXTENSIONS
from data_tools.stream.remote import call, connect, exists, is_local
from inference.reader import PageBox

_ANNOTATION_EXTENSIONS = ("json", "jsonl")
_GLOB_SIGNS = frozenset("*?[")


@dataclass(frozen=True)
class Document:
    """A document to be read.

    Attributes:
        files: path or URL of each page.
        boxes: lines on the pages, in reading order; empty where none are given.
        error: why it cannot be read, if that is known without opening an image.
    """

    files: tuple[str, ...]
    boxes: tuple[PageBox, ...] = ()
    error: str = ""

    @property
    def name(self) -> str:
        """What messages and results call it: its first page."""
        return self.files[0]

    def pages(self) -> list[np.ndarray]:
        """Read and decode the pages: (H, W, 3) uint8 each, oriented.

        Raises:
            DataError: if a page is missing or no image.
        """
        if self.error:
            raise DataError(self.error)
        return [_read_page(file) for file in self.files]


def find_documents(paths: Sequence[str], lists: Sequence[str] = ()) -> Iterator[Document]:
    """Yield the documents that paths and lists name.

    Args:
        paths: paths or URLs of image files; annotation files or folders of them (any format of
            `data_tools.formats`), whose boxes come along; other folders, all images in which are
            taken, by name; globs of any of these.
        lists: text files of image paths or URLs, one a line, blank lines and `#` lines apart.

    Raises:
        ConfigError: at once if a path does not exist or holds nothing to read, or a list is
            missing.
        StorageError: if storage does not answer.
    """
    for file in lists:
        if not exists(file):
            raise ConfigError(f"--list {file}: no such file")
    found = [_first_and_rest(path) for path in paths]
    return itertools.chain(*found, *(_listed(file) for file in lists))


def _first_and_rest(path: str) -> Iterator[Document]:
    """Return the documents of a path, having looked whether there is one."""
    documents = _documents(path)
    first = next(documents, None)
    if first is None:
        raise ConfigError(f"{path}: holds no document")
    return itertools.chain((first,), documents)


def _documents(path: str) -> Iterator[Document]:
    if _GLOB_SIGNS & set(path) and not exists(path):
        names = call(path, lambda filesystem, inner: sorted(filesystem.glob(inner)))
        if not names:
            raise ConfigError(f"{path}: matches nothing")
        for name in _as_given(path, names):
            yield from _document_or_folder(name)
        return
    if not exists(path):
        raise ConfigError(f"{path}: no such file or folder")
    yield from _document_or_folder(path)


def _document_or_folder(path: str) -> Iterator[Document]:
    extension = _extension(path)
    if extension in IMAGE_EXTENSIONS:
        yield Document((path,))
    elif extension in _ANNOTATION_EXTENSIONS:
        yield from _annotated(path)
    else:
        yield from _folder(path)


def _folder(path: str) -> Iterator[Document]:
    if any(format_.sniff(path) for format_ in FORMATS.values()):
        yield from _annotated(path)
        return
    is_empty = True
    for image in _images_below(path):
        is_empty = False
        yield Document((image,))
    if is_empty:
        known = ", ".join(IMAGE_EXTENSIONS)
        raise ConfigError(f"{path}: holds neither an image ({known}) nor an annotation file")


def _images_below(folder: str) -> Iterator[str]:
    """Yield the images of a folder and of those below, in the order of their whole names."""
    entries = _local_entries(folder) if is_local(folder) else _remote_entries(folder)
    for name, is_folder in sorted(entries, key=lambda entry: entry[0] + "/" * entry[1]):
        path = f"{folder.rstrip('/')}/{name}"
        if is_folder:
            yield from _images_below(path)
        elif _extension(name) in IMAGE_EXTENSIONS:
            yield path


def _local_entries(folder: str) -> Iterable[tuple[str, bool]]:
    """Return (name, whether it is a folder), without asking the disk about each file."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _remote_entries(folder: str) -> Iterable[tuple[str, bool]]:
    def listed(filesystem: Any, inner: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = filesystem.ls(inner, detail=True)
        return found

    entries = call(folder, listed)
    own = connect(folder)[1].rstrip("/")
    return [
        (entry["name"].rstrip("/").rsplit("/", 1)[-1], entry["type"] == "directory")
        for entry in entries
        if entry["name"].rstrip("/") != own  # an object store may list a folder as its own entry
    ]


def _listed(file: str) -> Iterator[Document]:
    with fsspec.open(file, "rt", encoding="utf-8-sig") as stream:
        for line in stream:
            name = line.strip()
            if name and not name.startswith("#"):
                yield Document((name,))


def _as_given(pattern: str, names: Sequence[str]) -> Iterator[str]:
    """Yield what a filesystem calls its files, as URLs of the pattern's kind."""
    filesystem, _ = connect(pattern)
    is_relative = is_local(pattern) and not os.path.isabs(pattern) and "://" not in pattern
    for name in names:
        if is_relative:
            yield os.path.relpath(name)
        elif "://" in pattern:
            yield name if "://" in name else filesystem.unstrip_protocol(name)
        else:
            yield name


def _extension(path: str) -> str:
    """Return the extension in small letters, of a web address without its query."""
    name = path.split("?", 1)[0] if path.startswith(("http://", "https://")) else path
    return name.rsplit("/", 1)[-1].rpartition(".")[2].lower()


def _annotated(path: str) -> Iterator[Document]:
    for entry in FORMATS[detect(path)].read(path):
        if isinstance(entry, SourceDocument):
            boxes = tuple((a.image, a.bbox) for a in entry.annotations if a.bbox is not None)
            yield Document(entry.image_paths, boxes)
        elif entry.scope == "document":
            reason = f"{entry.reason} ({entry.detail})" if entry.detail else entry.reason
            yield Document((entry.where,), error=f"{entry.where}: {reason}")


def _read_page(file: str) -> np.ndarray:
    """Read and decode a page.

    Raises:
        DataError: if it is missing or no image.
        StorageError: if storage does not answer: the page may be there.
    """
    try:
        content = call(file, lambda filesystem, inner: filesystem.cat_file(inner))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    return decode(content, file)
