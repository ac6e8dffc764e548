"""What every annotation format yields: a document as its owner describes it, or why it is refused.

Nothing of the images has been read at this point, so their sizes are unknown and boxes unchecked.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import fsspec
import fsspec.core

from data_tools.sample import Annotation, Box

ILLEGIBLE = "***"  # how SROIE and others write what cannot be transcribed
MAX_COORDINATE = 1e9
SPLIT_NAMES = {"valid": "val", "validation": "val", "dev": "val", "eval": "val"}


@dataclass(frozen=True)
class SourceDocument:
    """One document before its images are opened.

    Attributes:
        key: unique in its source, without dot and slash.
        image_paths: path or URL of each page.
        annotations: in the order of the source; boxes are not yet known to lie on the page.
        fields: field name to text, list of texts or None.
        text: the transcription, where the source has one that is not the annotations'.
        messages: the conversation, where the source is one.
        split: `train`, `val`, `test` or what the source says.
        source: name of the data set.
        tags: further properties, such as the shop.
        where: file and line the document comes from, for messages.
        declared_size: (width, height) in pixels that the source states for a single page.
    """

    key: str
    image_paths: tuple[str, ...]
    annotations: tuple[Annotation, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    split: str = "train"
    source: str = ""
    tags: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    declared_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rejection:
    """A document or an annotation that is not used, and why.

    Attributes:
        where: file and line, or file and number of the annotation.
        reason: what is wrong, in the same words for every case, so that cases can be counted.
        detail: the values at fault.
        key: the document, where one is known.
        scope: what is lost.
    """

    where: str
    reason: str
    detail: str = ""
    key: str | None = None
    scope: Literal["document", "annotation"] = "document"

    def to_json(self) -> dict[str, Any]:
        """Return the line of rejected.jsonl."""
        record = {"where": self.where, "key": self.key, "reason": self.reason}
        return record | ({"detail": self.detail} if self.detail else {}) | {"scope": self.scope}


class Format(Protocol):
    """A module of this package that reads one annotation format."""

    DESCRIPTION: str

    def sniff(self, path: str) -> bool:
        """Tell whether a path or URL looks like this format; never raise for what it holds."""

    def read(self, path: str) -> Iterator[SourceDocument | Rejection]:
        """Yield every document, and a rejection for each one that cannot be used."""


class EntryError(ValueError):
    """An entry of an annotation file cannot be used: (reason, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Keep the reason in general words and the values at fault apart."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class KeyMaker:
    """Turns file names into keys that are valid and unique in one source, in reading order."""

    def __init__(self) -> None:
        """Start with no key taken."""
        self._taken: set[str] = set()

    def make(self, file_name: str) -> str:
        """Return the key for a file: its stem, odd characters replaced; `-2`, `-3` if taken."""
        stem = os.path.splitext(file_name.rstrip("/").rsplit("/", 1)[-1])[0]
        wanted = re.sub(r"[^\w-]+", "_", stem).strip("_") or "document"
        key, number = wanted, 1
        while key in self._taken:
            number += 1
            key = f"{wanted}-{number}"
        self._taken.add(key)
        return key


def split_name(value: object) -> str:
    """Return the canonical name of a split: `valid`, `validation`, `dev` and `eval` are `val`.

    Raises:
        EntryError: if the value cannot be part of a shard's file name.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_]+", value):
        raise EntryError("the split is not a word", repr(value))
    return SPLIT_NAMES.get(value.lower(), value.lower())


def enclosing_box(value: object) -> Box | None:
    """Return the box (x1, y1, x2, y2) in whole pixels around a box or quadrilateral.

    Args:
        value: 4 numbers x1, y1, x2, y2; 8 numbers or 4 points of a quadrilateral; None for no box.
            Fractions are rounded outwards. The order of the corners of a box is kept, so that a
            reversed one is found to be empty later.

    Raises:
        EntryError: if it is none of these.
    """
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise EntryError("the box is not a list of numbers", repr(value))
    numbers = _flatten(value)
    if len(numbers) not in (4, 8) or not all(map(_is_finite_number, numbers)):
        raise EntryError("the box is neither 4 nor 8 finite numbers", repr(value))
    if len(numbers) == 8:
        xs, ys = numbers[0::2], numbers[1::2]
        numbers = [min(xs), min(ys), max(xs), max(ys)]
    x1, y1, x2, y2 = numbers
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def text_annotation(
    text: str, bbox: Box | None, category: str | None = None, image: int = 0
) -> Annotation:
    """Return an annotation; illegible text (`***` in it) gets weight 0 and keeps its place."""
    weight = 0.0 if ILLEGIBLE in text else 1.0
    return Annotation(text, bbox, image, category, weight=weight)


def read_json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (`FILE:LINE`, value) for each line with content; an EntryError stands for a bad one."""
    name = path.rsplit("/", 1)[-1]
    with fsspec.open(path, "rt", encoding="utf-8-sig", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{name}:{number}", _parsed(line)


def read_json_file(path: str) -> Any:
    """Return the value in a JSON file, or an EntryError for one that is not JSON."""
    with fsspec.open(path, "rt", encoding="utf-8-sig", errors="replace") as stream:
        return _parsed(stream.read())


def is_folder(path: str) -> bool:
    """Tell whether a path or URL is a folder."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return bool(filesystem.isdir(inner))


def list_files(folder: str, extension: str) -> list[str]:
    """Return the files of a folder, not below, that end in `.extension`, sorted by name."""
    filesystem, inner = fsspec.core.url_to_fs(folder)
    paths = sorted(str(path) for path in filesystem.ls(inner, detail=False))
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
    return [f"{folder.rstrip('/')}/{name}" for name in names if name.endswith(f".{extension}")]


def parent(path: str) -> str:
    """Return the folder that a file lies in; `.` for a bare name."""
    return path.rsplit("/", 1)[0] if "/" in path else "."


def source_name(path: str) -> str:
    """Return the name of a data set: that of its folder."""
    folder = path if is_folder(path) else parent(path)
    if "://" not in folder:
        folder = os.path.abspath(folder)
    return folder.rstrip("/").rsplit("/", 1)[-1]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return EntryError("not JSON", str(error)[:120])


def _flatten(value: list[Any] | tuple[Any, ...]) -> list[Any]:
    if value and all(isinstance(point, (list, tuple)) for point in value):
        return [number for point in value for number in point]
    return list(value)


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < MAX_COORDINATE  # also False for NaN
