"""Samples of WebDataset tars that are not ours: a text or some JSON beside the images.

    KEY.jpg + KEY.txt     the text of the page
    KEY.jpg + KEY.json    any of text | caption | transcription, messages, annotations (the guide's:
                          bbox, text, category, image), fields

Several images are `KEY.0.jpg`, `KEY.1.jpg`. Boxes are in pixels of the oriented image.
"""

from collections.abc import Sequence
from typing import Any

from data_tools.errors import DataError
from data_tools.formats.document import EntryError, enclosing_box, text_annotation
from data_tools.sample import Annotation, PageImage, Sample

TEXT_NAMES = ("text", "caption", "transcription")
SOURCE = "webdataset"
_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


def text_sample(
    key: str, data: bytes, sizes: Sequence[tuple[int, int]], image_bytes: tuple[bytes, ...]
) -> Sample:
    """Return the sample of images and a text file.

    Args:
        key: of the sample.
        data: the text, in UTF-8.
        sizes: oriented (width, height) of the images.
        image_bytes: encoded images, or none if only the record is wanted.

    Raises:
        DataError: if the text is empty or no UTF-8.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8: {error}") from error
    if not text:
        raise DataError(f"no text: {key}.txt is empty")
    return Sample(
        key, _pages(sizes, image_bytes), text=text, source=SOURCE, image_bytes=image_bytes
    )


def json_sample(
    key: str,
    record: dict[str, Any],
    sizes: Sequence[tuple[int, int]],
    image_bytes: tuple[bytes, ...],
) -> Sample:
    """Return the sample of images and a JSON object of another shape than ours (`text_sample`).

    Raises:
        DataError: if nothing in it says what stands on the images, or a member is malformed.
    """
    pages = _pages(sizes, image_bytes)
    texts = (record[name] for name in TEXT_NAMES if isinstance(record.get(name), str))
    text = next((text.strip() for text in texts if text.strip()), None)
    try:
        messages = _messages(record.get("messages"))
        annotations = _annotations(record.get("annotations"))
        fields = _fields(record.get("fields"))
    except EntryError as error:
        raise DataError(f"malformed record: {error}") from error
    if text is None and not (messages or annotations or fields):
        names = ", ".join((*TEXT_NAMES, "messages", "annotations", "fields"))
        raise DataError(f"no text: expected one of {names} in {key}.json")
    sample = Sample(
        key,
        pages,
        annotations,
        fields,
        text,
        messages,
        source=str(record.get("source") or SOURCE),
        image_bytes=image_bytes,
    )
    if annotations:
        _check_boxes(sample)
    return sample


def _pages(
    sizes: Sequence[tuple[int, int]], image_bytes: tuple[bytes, ...]
) -> tuple[PageImage, ...]:
    kinds = [_extension(data) for data in image_bytes or [b""] * len(sizes)]
    return tuple(
        PageImage(f"{number}.{kind}", width, height)
        for number, (kind, (width, height)) in enumerate(zip(kinds, sizes, strict=True))
    )


def _extension(data: bytes) -> str:
    return next((name for magic, name in _MAGIC if data.startswith(magic)), "tif")


def _check_boxes(sample: Sample) -> None:
    for problem in sample.problems():
        if "annotation" in problem or "box" in problem:
            raise DataError(f"malformed record: {problem}")


def _messages(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in value
    ):
        raise EntryError("messages is not a list of role and content", repr(value)[:80])
    return tuple(value) or None


def _annotations(value: Any) -> tuple[Annotation, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise EntryError("annotations is not a list", type(value).__name__)
    found = []
    for entry in value:
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise EntryError("an annotation has no text", repr(entry)[:80])
        category, image = entry.get("category"), entry.get("image", 0)
        if not isinstance(image, int):
            raise EntryError("an annotation names no page by number", repr(image)[:80])
        box = enclosing_box(entry.get("bbox"))
        kind = category if isinstance(category, str) and category else None
        found.append(text_annotation(entry["text"], box, kind, image))
    return tuple(found)


def _fields(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EntryError("fields is not an object", type(value).__name__)
    return {str(name): _field(content) for name, content in value.items()}


def _field(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value  # `Sample.problems` judges the others
