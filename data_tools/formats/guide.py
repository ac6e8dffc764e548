"""The guide's JSON: image_path and annotations of bbox, text and category, one document an entry.

A source is a .jsonl file (one document a line), a .json file (one document or a list), a folder
with a labels.jsonl, or a folder of .json files. An entry:

    {"image_path": "images/a.jpg",
     "annotations": [{"bbox": [x1, y1, x2, y2], "text": "TOTAL", "category": "total"}],
     "fields": {"total": "9.99"}, "split": "train", "width": 600, "height": 900, "shop": "s1"}

`image_path` is relative to the annotation file, absolute, or a URL; a list of paths is a document
of several pages, whose annotations then carry `"image": 1` and so on. Boxes refer to the image as
it is seen (EXIF orientation applied) and may be quadrilaterals. All but `image_path` is optional.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_tools.formats.document import (
    EntryError,
    KeyMaker,
    Rejection,
    SourceDocument,
    enclosing_box,
    is_folder,
    list_files,
    parent,
    read_json_file,
    read_json_lines,
    source_name,
    split_name,
    text_annotation,
)
from data_tools.output import exists, join
from data_tools.sample import Annotation

DESCRIPTION = "JSON with image_path and annotations: a .jsonl, a .json, or a folder of them"
LABELS_NAME = "labels.jsonl"

_SNIFFED_FILES = 20  # a folder may hold other JSON files among its documents


def sniff(path: str) -> bool:
    """Tell whether one of the first entries of a file or folder has an image_path."""
    for number, (_, _, entry) in enumerate(_entries(path)):
        if isinstance(entry, dict) and "image_path" in entry:
            return True
        if number >= _SNIFFED_FILES:
            break
    return False


def read(path: str) -> Iterator[SourceDocument | Rejection]:
    """Yield every document; broken entries and annotations become rejections."""
    keys, source = KeyMaker(), source_name(path)
    for where, folder, entry in _entries(path):
        try:
            document, refused = _read_entry(entry, where, folder, source, keys)
        except EntryError as error:
            yield Rejection(where, error.reason, error.detail)
            continue
        yield from refused
        yield document


def _entries(path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (where, folder that image paths are relative to, entry)."""
    files = _annotation_files(path)
    for file in files:
        if file.endswith(".jsonl"):
            for where, entry in read_json_lines(file):
                yield where, parent(file), entry
            continue
        content, name = read_json_file(file), file.rsplit("/", 1)[-1]
        is_list = isinstance(content, list)
        for number, entry in enumerate(content if is_list else [content]):
            is_other = not (isinstance(entry, (EntryError, list)) or _is_document(entry))
            if len(files) > 1 and is_other:
                continue  # a JSON file of another purpose among the documents
            yield f"{name}[{number}]" if is_list else name, parent(file), entry


def _annotation_files(path: str) -> list[str]:
    if not is_folder(path):
        return [path] if path.endswith((".json", ".jsonl")) and exists(path) else []
    labels = join(path, LABELS_NAME)
    return [labels] if exists(labels) else list_files(path, "json")


def _is_document(entry: object) -> bool:
    return isinstance(entry, dict) and ("image_path" in entry or "annotations" in entry)


def _read_entry(
    entry: Any, where: str, folder: str, source: str, keys: KeyMaker
) -> tuple[SourceDocument, list[Rejection]]:
    if isinstance(entry, EntryError):
        raise entry
    if not isinstance(entry, dict):
        raise EntryError("the entry is not an object", type(entry).__name__)
    paths = _image_paths(entry.get("image_path"))
    annotations = entry.get("annotations", [])
    if not isinstance(annotations, list):
        raise EntryError("annotations is not a list", type(annotations).__name__)
    document = SourceDocument(
        key=keys.make(paths[0]),
        image_paths=tuple(join(folder, path) for path in paths),
        fields=_fields(entry.get("fields")),
        text=_optional_text(entry, "text"),
        messages=_messages(entry.get("messages")),
        split=split_name(entry.get("split", "train")),
        source=source,
        tags=_tags(entry),
        where=where,
        declared_size=_declared_size(entry) if len(paths) == 1 else None,
    )
    kept: list[Annotation] = []
    refused: list[Rejection] = []
    for number, annotation in enumerate(annotations):
        try:
            kept.append(_annotation(annotation, len(paths)))
        except EntryError as error:
            place = f"{where}, annotation {number}"
            refused.append(Rejection(place, error.reason, error.detail, document.key, "annotation"))
    return replace(document, annotations=tuple(kept)), refused


def _image_paths(value: Any) -> list[str]:
    paths: list[Any] = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise EntryError("image_path is missing or not a path", repr(value)[:80])
    return paths


def _annotation(value: Any, num_images: int) -> Annotation:
    if not isinstance(value, dict):
        raise EntryError("the annotation is not an object", repr(value)[:80])
    text, category, image = value.get("text"), value.get("category"), value.get("image", 0)
    if not isinstance(text, str):
        raise EntryError("the text of an annotation is missing or not a text", repr(text)[:80])
    if category is not None and not isinstance(category, str):
        raise EntryError("the category is not a text", repr(category)[:80])
    if not isinstance(image, int) or not 0 <= image < num_images:
        raise EntryError("the annotation names a page that does not exist", repr(image))
    return text_annotation(text, enclosing_box(value.get("bbox")), category or None, image)


def _fields(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise EntryError("fields is not an object", type(value).__name__)
    return {str(name): _field(str(name), content) for name, content in value.items()}


def _field(name: str, value: Any) -> str | list[str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise EntryError("a field is neither text, list of texts nor null", f"{name}: {value!r}"[:80])


def _messages(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(message, dict) and "role" in message and "content" in message
        for message in value
    ):
        raise EntryError("messages is not a list of role and content", repr(value)[:80])
    return tuple(value)


def _optional_text(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise EntryError(f"{name} is not a text", repr(value)[:80])
    return value


def _tags(entry: dict[str, Any]) -> dict[str, Any]:
    tags = entry.get("tags") or {}
    if not isinstance(tags, dict):
        raise EntryError("tags is not an object", repr(tags)[:80])
    return tags | ({"shop": entry["shop"]} if entry.get("shop") is not None else {})


def _declared_size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    if width is None and height is None:
        return None
    if not (isinstance(width, int) and isinstance(height, int)):
        raise EntryError("width and height are not whole numbers", f"{width!r}, {height!r}")
    return width, height
