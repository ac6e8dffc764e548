"""A placed page as a worn grey image, with the exact ink box of every text on it."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data_tools.sample import Box
from data_tools.synth.degrade import (
    INK_RANGE,
    PAPER_RANGE,
    add_noise,
    ink_mask,
    vary_blur,
    vary_stroke,
)
from data_tools.synth.fonts import open_font
from data_tools.synth.layout import Layout, PlacedText

BOX_SLACK_PX = 1  # around the ink, before blur
_STROKE_MARGIN_PX = 2


@dataclass(frozen=True)
class DrawnPage:
    """A page image, (height, width) uint8 grey, and one box a text, in the layout's order."""

    pixels: np.ndarray
    boxes: tuple[Box, ...]


def draw_page(layout: Layout, is_inverted: bool, rng: random.Random) -> DrawnPage:
    """Draw a page; `is_inverted` turns it to light text on dark ground at the very end."""
    paper, ink = rng.randint(*PAPER_RANGE), rng.randint(*INK_RANGE)
    image = Image.new("L", (layout.width, layout.height), paper)
    draw = ImageDraw.Draw(image)
    width = rng.randint(1, 2)
    for stroke in layout.strokes:
        draw.line((stroke.x1, stroke.y1, stroke.x2, stroke.y2), fill=ink, width=width)
    boxes = []
    for text in layout.texts:
        # Every text has its own shade of the ink, as ribbons and toners do.
        shade = min(INK_RANGE[1], max(INK_RANGE[0], ink + rng.randint(-20, 20)))
        boxes.append(_draw_text(image, text, layout.font_path, shade, rng))
    image = vary_blur(image, min(text.size_px for text in layout.texts), rng)
    pixels = add_noise(np.asarray(image, dtype=np.float32), rng).clip(0, 255).astype(np.uint8)
    return DrawnPage(255 - pixels if is_inverted else pixels, tuple(boxes))


def _draw_text(
    image: Image.Image, text: PlacedText, font_path: str, shade: int, rng: random.Random
) -> Box:
    """Draw one text and return its box: the ink and `BOX_SLACK_PX` around it."""
    font = open_font(font_path, text.size_px)
    left, top, _, _ = (int(edge) for edge in font.getbbox(text.text, anchor="ls"))
    mask = ink_mask(text.text, font, _STROKE_MARGIN_PX, _STROKE_MARGIN_PX)
    mask = vary_stroke(mask, text.size_px, rng)
    x, y = text.x + left - _STROKE_MARGIN_PX, text.baseline + top - _STROKE_MARGIN_PX
    image.paste(shade, (x, y), mask)
    ink_box = mask.getbbox()
    if ink_box is None:
        raise ValueError(f"no ink in {text.text!r} at {text.size_px} px")
    return (
        max(0, x + ink_box[0] - BOX_SLACK_PX),
        max(0, y + ink_box[1] - BOX_SLACK_PX),
        min(image.width, x + ink_box[2] + BOX_SLACK_PX),
        min(image.height, y + ink_box[3] + BOX_SLACK_PX),
    )
