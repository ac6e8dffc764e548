"""Where the rows of a document stand on its page: sizes, positions, rules and frames, in pixels.

Nothing is drawn here. Pages are 500-800 px wide and 700-1400 px high, text is 18-34 px.
"""

import random
from dataclasses import dataclass

from data_tools.synth.fonts import open_font
from data_tools.synth.grammar import Cell, Content, Row

PAGE_WIDTHS_PX = (500, 800)
PAGE_HEIGHTS_PX = (700, 1400)
TEXT_SIZES_PX = (18, 34)

_CELL_GAP_PX = 14  # least distance between neighbours in a row, frame included
_BOX_INSET_PX = 8  # from a frame to the text in it


@dataclass(frozen=True)
class PlacedText:
    """One piece of text: the pixel its left end and baseline stand on, and its size."""

    text: str
    x: int
    baseline: int
    size_px: int
    category: str | None


@dataclass(frozen=True)
class Stroke:
    """A straight line from (x1, y1) to (x2, y2), ends included."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True)
class Layout:
    """A page with everything in its place, texts in reading order."""

    width: int
    height: int
    font_path: str
    texts: tuple[PlacedText, ...]
    strokes: tuple[Stroke, ...]


def lay_out(content: Content, font_path: str, rng: random.Random) -> Layout:
    """Place a document on a page whose size, margins, text size and spacing are drawn.

    Text shrinks until rows fit the width and the page fits the height; a row that is too wide even
    at the smallest size is broken, one cell a line.
    """
    width = rng.randint(*PAGE_WIDTHS_PX)
    margin = rng.randint(24, 48)
    pitch = rng.uniform(1.55, 1.95)  # height of a row in text sizes
    smallest, largest = TEXT_SIZES_PX
    for size in range(rng.randint(20, 30), smallest - 1, -1):
        page = _Page(width, margin, size, pitch, font_path)
        for row in content.rows:
            page.add(row)
        if page.y + margin <= PAGE_HEIGHTS_PX[1]:
            break
    free = PAGE_HEIGHTS_PX[1] - (page.y + margin)
    height = max(PAGE_HEIGHTS_PX[0], page.y + margin + rng.randint(0, max(0, min(60, free))))
    return Layout(width, height, font_path, tuple(page.texts), tuple(page.strokes))


class _Page:
    """A page being filled from the top; `y` is where the next row begins."""

    def __init__(self, width: int, margin: int, size_px: int, pitch: float, font_path: str) -> None:
        self.left, self.right = margin, width - margin
        self.y = margin
        self.texts: list[PlacedText] = []
        self.strokes: list[Stroke] = []
        self._size_px, self._pitch, self._font_path = size_px, pitch, font_path

    def add(self, row: Row) -> None:
        """Place a row, smaller or broken if it is too wide."""
        smallest, largest = TEXT_SIZES_PX
        self.y += round(row.gap * self._size_px * self._pitch)
        wanted = min(largest, max(smallest, round(self._size_px * row.scale)))
        for size_px in range(wanted, smallest - 1, -1):
            starts = self._fit(row, size_px)
            if starts is not None:
                self._place(row, starts, size_px)
                return
        for cell in row.cells:
            lone = Row((Cell(cell.text, category=cell.category),), frame=row.frame)
            self._place(lone, [self.left + _inset(row)], smallest)

    def _fit(self, row: Row, size_px: int) -> list[int] | None:
        """Return the left ends of the cells, or None if they touch or leave their place."""
        font = open_font(self._font_path, size_px)
        is_boxed = row.frame == "box"
        free_from, starts = self.left + _inset(row), []
        for position, cell in enumerate(row.cells):
            length = int(font.getlength(cell.text)) + 1
            start = self._start(row, cell, length)
            if is_boxed and position > 0:
                divider = self._divider(cell)
                if free_from - _CELL_GAP_PX > divider - _BOX_INSET_PX:
                    return None
                free_from = divider + _BOX_INSET_PX
            if start < free_from or start + length > self.right - _inset(row):
                return None
            starts.append(start)
            free_from = start + length + _CELL_GAP_PX
        return starts

    def _start(self, row: Row, cell: Cell, length: int) -> int:
        if cell.align == "left":
            return round(self.left + cell.column * (self.right - self.left)) + _inset(row)
        anchor = self.left + cell.column * (self.right - self.left)
        if cell.align == "middle":
            return round(anchor - length / 2)
        return round(anchor - length) - _inset(row)

    def _divider(self, cell: Cell) -> int:
        return round(self.left + cell.divider * (self.right - self.left))

    def _place(self, row: Row, starts: list[int], size_px: int) -> None:
        ascent, descent = open_font(self._font_path, size_px).getmetrics()
        height = max(round(size_px * self._pitch), ascent + descent + 8)
        baseline = self.y + (height - ascent - descent) // 2 + ascent
        for cell, start in zip(row.cells, starts, strict=True):
            self.texts.append(PlacedText(cell.text, start, baseline, size_px, cell.category))
        bottom = self.y + height
        if row.frame != "none":
            self.strokes.append(Stroke(self.left, bottom, self.right, bottom))
        if row.frame == "box":
            self._add_box(row, bottom)
        self.y = bottom

    def _add_box(self, row: Row, bottom: int) -> None:
        self.strokes.append(Stroke(self.left, self.y, self.right, self.y))
        dividers = [self._divider(cell) for cell in row.cells[1:]]
        for x in (self.left, *dividers, self.right):
            self.strokes.append(Stroke(x, self.y, x, bottom))


def _inset(row: Row) -> int:
    return _BOX_INSET_PX if row.frame == "box" else 0
