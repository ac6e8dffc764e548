"""Pages with their boxes and texts drawn beside them, for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.examples.images import scale_box
from data_tools.sample import Annotation, Box, PageImage, Sample

MAX_SIDE_PX = 2000  # of the page as it is drawn; larger ones are shrunk, small ones enlarged
MIN_SIDE_PX = 700
MAX_ENLARGEMENT = 4
PANEL_PX = 560
MARGIN_PX = 12
FONT_PX, SMALL_FONT_PX = 16, 13
LINE_PX, HEAD_LINE_PX = 21, 22
BOX_PX = 2
COLOURS = ("#d1495b", "#00798c", "#b7791f", "#66a182", "#8d5a97", "#2e4057", "#c06c2b")
PLAIN_COLOUR = "#3f7cac"  # of texts without a category
BACKGROUND, INK, FAINT = "white", "#222222", "#777777"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Fonts:
    """A face in the two sizes that are drawn."""

    normal: Font
    small: Font

    @classmethod
    def load(cls, path: str | None) -> "Fonts":
        """Load a font file, or Pillow's own face (Latin only).

        Raises:
            OSError: if the file is no font.
        """
        if path is None:
            return cls(ImageFont.load_default(FONT_PX), ImageFont.load_default(SMALL_FONT_PX))
        return cls(ImageFont.truetype(path, FONT_PX), ImageFont.truetype(path, SMALL_FONT_PX))


def draw_sample_page(
    sample: Sample, number: int, image: np.ndarray, head: Sequence[str], fonts: Fonts, boxes: bool
) -> Image.Image:
    """Draw a page as the model sees it, boxes and reading order on it, texts beside it.

    Args:
        sample: its annotations stand in reading order, boxes in pixels of the stored page.
        number: of the page.
        image: (H, W, 3) uint8, prepared.
        head: lines above the page.
        fonts: to write with.
        boxes: whether the boxes lie on the prepared image, apart from its scale.
    """
    zoom = _zoom(image.shape[0], image.shape[1])
    page = Image.fromarray(image)
    if zoom != 1:
        size = (round(page.width * zoom), round(page.height * zoom))
        page = page.resize(size, Image.Resampling.LANCZOS if zoom < 1 else Image.Resampling.NEAREST)
    texts = [(n, a) for n, a in enumerate(sample.annotations, start=1) if a.image == number]
    colours = _colours(sample.annotations)
    if boxes:
        for order, annotation in texts:
            if annotation.bbox is not None:
                box = scale_box(annotation.bbox, _size(sample.images[number]), page.size)
                _draw_box(page, box, str(order), colours[annotation.category], fonts.small)
    rows = _panel_rows(sample, texts, fonts.normal)
    top = MARGIN_PX + HEAD_LINE_PX * len(head)
    height = top + max(page.height, LINE_PX * len(rows)) + MARGIN_PX
    sheet = Image.new("RGB", (page.width + PANEL_PX + 3 * MARGIN_PX, height), BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    for line, words in enumerate(head):
        place = (MARGIN_PX, MARGIN_PX // 2 + HEAD_LINE_PX * line)
        canvas.text(place, words, INK if line == 0 else FAINT, font=fonts.normal)
    sheet.paste(page, (MARGIN_PX, top))
    canvas.rectangle(
        (MARGIN_PX - 1, top - 1, MARGIN_PX + page.width, top + page.height), outline="#bbbbbb"
    )
    left = page.width + 2 * MARGIN_PX
    for line, (label, text, category) in enumerate(rows):
        y = top + LINE_PX * line
        canvas.text((left, y), label, colours.get(category, FAINT), font=fonts.small)
        canvas.text((left + 34, y), text, INK if label else FAINT, font=fonts.normal)
    return sheet


def _draw_box(page: Image.Image, box: Box, order: str, colour: str, font: Font) -> None:
    canvas = ImageDraw.Draw(page)
    canvas.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour, width=BOX_PX)
    left, top, right, bottom = canvas.textbbox((0, 0), order, font=font)
    # Left of the box, so that it hides no text of its own; above it at the edge of the page.
    x, y = box[0] - (right - left) - 5, (box[1] + box[3] - top - bottom) // 2
    if x < 0:
        x, y = box[0] + 2, max(0, box[1] - bottom - 2)
    canvas.rectangle((x + left - 2, y + top - 2, x + right + 2, y + bottom + 2), fill=colour)
    canvas.text((x, y), order, "white", font=font)


def _panel_rows(
    sample: Sample, texts: Sequence[tuple[int, Annotation]], font: Font
) -> list[tuple[str, str, str | None]]:
    """Return (order, text, category) of each line of the panel; long texts are cut."""
    rows: list[tuple[str, str, str | None]] = []
    for order, annotation in texts:
        category = f"  [{annotation.category}]" if annotation.category else ""
        weight = "  (weight 0)" if annotation.weight == 0 else ""
        text = _cut(annotation.text.replace("\n", " / "), category + weight, font)
        rows.append((str(order), text, annotation.category))
    if sample.text is not None and not texts:
        lines = sample.text.splitlines() or [""]
        rows += [(str(n), _cut(line, "", font), None) for n, line in enumerate(lines, start=1)]
    if sample.fields:
        rows.append(("", "", None))
        rows += [("", _cut(f"{k} = {v}", "", font), k) for k, v in sample.fields.items()]
    return rows


def _cut(text: str, tail: str, font: Font) -> str:
    """Return the text with its tail, shortened to the width of the panel."""
    room = PANEL_PX - 34
    if font.getlength(text + tail) <= room:
        return text + tail
    while text and font.getlength(f"{text}…{tail}") > room:
        text = text[: -max(1, len(text) // 20)]
    return f"{text}…{tail}"


def _colours(annotations: Sequence[Annotation]) -> dict[str | None, str]:
    """Return category -> colour, by the order in which categories first appear."""
    names = [a.category for a in annotations if a.category is not None]
    named = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    return {None: PLAIN_COLOUR} | named


def _zoom(height: int, width: int) -> float:
    longest = max(height, width)
    if longest > MAX_SIDE_PX:
        return MAX_SIDE_PX / longest
    return float(min(MAX_ENLARGEMENT, max(1, MIN_SIDE_PX // longest)))


def _size(page: PageImage) -> tuple[int, int]:
    return page.width, page.height
