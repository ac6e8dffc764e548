"""Sample: one document, its page images and what is true of them; to and from WebDataset members.

A sample is one key of a plain WebDataset tar: the images as `KEY.jpg` (several: `KEY.0.jpg`,
`KEY.1.jpg`, ...) and `KEY.json`. Width, height and boxes are those of the *oriented* image (EXIF
applied), in absolute pixels, x2 and y2 exclusive. Which question is asked of a sample is not its
business but the recipe's (`data_tools.examples.tasks`).
"""

import json
from dataclasses import dataclass, field
from typing import Any

from data_tools.errors import DataError

VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class PageImage:
    """One page: the name it came with and its oriented size in pixels."""

    file: str
    width: int
    height: int


@dataclass(frozen=True)
class Annotation:
    """A piece of text on a page.

    Attributes:
        text: what stands there.
        bbox: (x1, y1, x2, y2) in pixels of the oriented image, x2 and y2 exclusive, or None.
        image: index of the page it stands on.
        category: the field it belongs to, if any.
        line: number of the text line it belongs to, if known.
        weight: 0 keeps the text in its place but out of loss and metrics (illegible text).
    """

    text: str
    bbox: Box | None = None
    image: int = 0
    category: str | None = None
    line: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One document. `image_bytes` holds one encoded file a page and may be empty while unread."""

    key: str
    images: tuple[PageImage, ...]
    annotations: tuple[Annotation, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    image_bytes: tuple[bytes, ...] = ()

    def validate(self) -> None:
        """Raise DataError, naming the key and the fault, if the sample breaks the contract."""
        for problem in self.problems():
            raise DataError(f'sample "{self.key}": {problem}')

    def problems(self) -> list[str]:
        """Return every breach of the contract, in words; an empty list if there is none."""
        found = []
        if not self.key or "." in self.key:
            found.append("the key must be non-empty and hold no dot")
        for number, page in enumerate(self.images):
            if page.width < 1 or page.height < 1:
                found.append(f"image {number} has size {page.width} x {page.height} px")
        for number, annotation in enumerate(self.annotations):
            found += self._box_problems(number, annotation)
        for name, value in self.fields.items():
            if not (value is None or isinstance(value, str) or _is_list_of_str(value)):
                found.append(f'field "{name}" must be a text, a list of texts or null')
        return found

    def _box_problems(self, number: int, annotation: Annotation) -> list[str]:
        if not 0 <= annotation.image < max(1, len(self.images)):
            return [f"annotation {number} names image {annotation.image} of {len(self.images)}"]
        if annotation.bbox is None:
            return []
        if not self.images:
            return [f"annotation {number} has a box but the sample has no image"]
        x1, y1, x2, y2 = annotation.bbox
        page = self.images[annotation.image]
        if not (0 <= x1 < x2 <= page.width and 0 <= y1 < y2 <= page.height):
            size = f"{page.width} x {page.height} px"
            return [f"box {number} [{x1}, {y1}, {x2}, {y2}] is empty or leaves the page ({size})"]
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the content of `KEY.json`."""
        record: dict[str, Any] = {
            "version": VERSION,
            "source": self.source,
            "images": [vars(page) for page in self.images],
            "annotations": [_annotation_json(a) for a in self.annotations],
            "fields": self.fields,
        }
        optional = {"text": self.text, "messages": self.messages, "tags": self.tags or None}
        return record | {name: value for name, value in optional.items() if value is not None}

    @classmethod
    def from_json(
        cls, key: str, record: dict[str, Any], image_bytes: tuple[bytes, ...] = ()
    ) -> "Sample":
        """Build a sample from the content of `KEY.json`.

        Raises:
            DataError: if the version is unknown or a member is missing or malformed.
        """
        if record.get("version") != VERSION:
            raise DataError(
                f'sample "{key}": version {record.get("version")!r}, expected {VERSION}; '
                "build the shards again with this release"
            )
        try:
            messages = record.get("messages")
            return cls(
                key=key,
                images=tuple(_page(page) for page in record["images"]),
                annotations=tuple(_annotation(a) for a in record["annotations"]),
                fields=dict(record["fields"]),
                text=record.get("text"),
                messages=None if messages is None else tuple(messages),
                tags=dict(record.get("tags", {})),
                source=record.get("source", ""),
                image_bytes=image_bytes,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f'sample "{key}": malformed JSON member: {error!r}') from error

    def to_members(self) -> dict[str, bytes]:
        """Return tar member name -> content, images first, as they stand in the tar."""
        names = member_names(self.key, [page.file for page in self.images])
        text = json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":"))
        return dict(zip(names, self.image_bytes, strict=True)) | {
            f"{self.key}.json": text.encode("utf-8")
        }


def member_names(key: str, files: list[str]) -> list[str]:
    """Return the tar member names of a sample's images (`KEY.jpg`, or `KEY.0.jpg`, `KEY.1.jpg`)."""
    extensions = [file.rsplit(".", 1)[-1].lower() for file in files]
    if len(files) == 1:
        return [f"{key}.{extensions[0]}"]
    return [f"{key}.{number}.{extension}" for number, extension in enumerate(extensions)]


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _page(record: dict[str, Any]) -> PageImage:
    return PageImage(str(record["file"]), int(record["width"]), int(record["height"]))


def _annotation_json(annotation: Annotation) -> dict[str, Any]:
    record: dict[str, Any] = {
        "image": annotation.image,
        "bbox": None if annotation.bbox is None else list(annotation.bbox),
        "text": annotation.text,
        "category": annotation.category,
    }
    if annotation.line is not None:
        record["line"] = annotation.line
    if annotation.weight != 1.0:
        record["weight"] = annotation.weight
    return record


def _annotation(record: dict[str, Any]) -> Annotation:
    box = record["bbox"]
    x1, y1, x2, y2 = box if box is not None else (0, 0, 0, 0)
    return Annotation(
        text=str(record["text"]),
        bbox=None if box is None else (int(x1), int(y1), int(x2), int(y2)),
        image=int(record.get("image", 0)),
        category=record.get("category"),
        line=record.get("line"),
        weight=float(record.get("weight", 1.0)),
    )
