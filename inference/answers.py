"""What a model answered, taken apart: lines with their boxes out of the text of an answer."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.examples.images import scale_box
from data_tools.sample import Box

_FAR_PX = 1e6
_OBJECT_START = re.compile(r"\{")


@dataclass(frozen=True)
class ReadLine:
    """A piece of text and where it stands: xyxy in pixels of the original page, half-open."""

    bbox: Box
    text: str
    image: int = 0


def parse_lines(
    answer: str, resized_wh: tuple[int, int], page_wh: tuple[int, int]
) -> list[ReadLine]:
    """Return the lines of an answer to a `lines` template, their boxes in pixels of the page.

    Whatever stands around the objects is ignored, so an answer that was cut off gives the lines
    before the cut. An object without text or with a box that is empty gives no line.

    Args:
        answer: `{"bbox_2d": [x1, y1, x2, y2], "text": ...}` objects, a JSON list in full.
        resized_wh: (width, height) in pixels of the page as the model saw it.
        page_wh: (width, height) in pixels of the page itself.
    """
    lines = []
    for record in _objects(answer):
        box, text = _box(record.get("bbox_2d")), record.get("text")
        if isinstance(text, str) and box is not None:
            lines.append(ReadLine(scale_box(box, resized_wh, page_wh), text))
    return lines


def _box(value: object) -> Box | None:
    """Return four numbers as a box, or None if they are none or the box is empty."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(v, (int, float)) and abs(v) < _FAR_PX for v in value):  # NaN is not
        return None
    x1, y1, x2, y2 = (round(v) for v in value)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _objects(text: str) -> Iterator[dict]:
    """Yield the outermost JSON objects of a text, in order."""
    decoder = json.JSONDecoder()
    end = 0
    for match in _OBJECT_START.finditer(text):
        if match.start() < end:
            continue
        try:
            record, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue  # cut off, or not the beginning of an object
        yield record
