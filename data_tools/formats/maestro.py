"""The folder layout of maestro: train, valid and test, each with images and an annotations.jsonl.

Each line is `{"image": "a.jpg", "prefix": "question", "suffix": "answer"}`; the image lies beside
the annotations.jsonl. A line becomes a conversation: the user shows the image and says the prefix,
the assistant answers with the suffix.
"""

from collections.abc import Iterator
from typing import Any

from data_tools.formats.document import (
    EntryError,
    KeyMaker,
    Rejection,
    SourceDocument,
    is_folder,
    read_json_lines,
    source_name,
    split_name,
)
from data_tools.output import exists, join

DESCRIPTION = "a folder with train, valid or test, each with annotations.jsonl (image, suffix)"
SPLITS = ("train", "valid", "test")
ANNOTATIONS_NAME = "annotations.jsonl"


def sniff(path: str) -> bool:
    """Tell whether a split's folder has an annotations.jsonl."""
    return is_folder(path) and bool(_split_folders(path))


def read(path: str) -> Iterator[SourceDocument | Rejection]:
    """Yield every line of every split as a document; broken lines become rejections."""
    keys, source = KeyMaker(), source_name(path)
    for split in _split_folders(path):
        folder = join(path, split)
        for place, entry in read_json_lines(join(folder, ANNOTATIONS_NAME)):
            where = f"{split}/{place}"
            try:
                image, prefix, suffix = _parts(entry)
            except EntryError as error:
                yield Rejection(where, error.reason, error.detail)
                continue
            yield SourceDocument(
                key=keys.make(image),
                image_paths=(join(folder, image),),
                messages=conversation(prefix, suffix),
                split=split_name(split),
                source=source,
                where=where,
            )


def conversation(question: str, answer: str) -> tuple[dict[str, Any], ...]:
    """Return the two messages of a question about one image, in the chat template's shape."""
    asked: list[dict[str, Any]] = [{"type": "image"}]
    if question:
        asked.append({"type": "text", "text": question})
    return (
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )


def _split_folders(path: str) -> list[str]:
    return [split for split in SPLITS if exists(join(join(path, split), ANNOTATIONS_NAME))]


def _parts(entry: Any) -> tuple[str, str, str]:
    if isinstance(entry, EntryError):
        raise entry
    if not isinstance(entry, dict):
        raise EntryError("the entry is not an object", type(entry).__name__)
    image, suffix, prefix = entry.get("image"), entry.get("suffix"), entry.get("prefix", "")
    if not isinstance(image, str) or not image:
        raise EntryError("image is missing or not a path", repr(image)[:80])
    if not isinstance(suffix, str) or not suffix:
        raise EntryError("suffix is missing or empty", repr(suffix)[:80])
    if not isinstance(prefix, str):
        raise EntryError("prefix is not a text", repr(prefix)[:80])
    return image, prefix, suffix
