"""What a user points at, as documents to be read: images, folders of them, annotation files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np

from data_tools.errors import ConfigError, DataError
from data_tools.examples.images import decode
from data_tools.formats import FORMATS, SourceDocument, detect
from data_tools.sample import IMAGE_EXTENSIONS
from inference.reader import PageBox

_ANNOTATION_EXTENSIONS = ("json", "jsonl")


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


def find_documents(paths: Sequence[str]) -> Iterator[Document]:
    """Yield the documents that paths name.

    Args:
        paths: image files; annotation files or folders of them (any format of
            `data_tools.formats`), whose boxes come along; other folders, all images in which are
            taken, by name.

    Raises:
        ConfigError: if a path does not exist or holds nothing to read.
    """
    for path in paths:
        if "://" not in path and not os.path.exists(path):
            raise ConfigError(f"{path}: no such file or folder")
        extension = path.rsplit(".", 1)[-1].lower()
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
    images = sorted(
        str(file)
        for file in Path(path).rglob("*")
        if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
    )
    if not images:
        known = ", ".join(IMAGE_EXTENSIONS)
        raise ConfigError(f"{path}: holds neither an image ({known}) nor an annotation file")
    yield from (Document((image,)) for image in images)


def _annotated(path: str) -> Iterator[Document]:
    for entry in FORMATS[detect(path)].read(path):
        if isinstance(entry, SourceDocument):
            boxes = tuple((a.image, a.bbox) for a in entry.annotations if a.bbox is not None)
            yield Document(entry.image_paths, boxes)
        elif entry.scope == "document":
            reason = f"{entry.reason} ({entry.detail})" if entry.detail else entry.reason
            yield Document((entry.where,), error=f"{entry.where}: {reason}")


def _read_page(file: str) -> np.ndarray:
    try:
        with fsspec.open(file, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    return decode(content, file)
