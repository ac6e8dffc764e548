"""Named image transforms that training and inference share: they travel in config and export.

A transform maps one (H, W, 3) uint8 page to another. Transforms that keep the size may be used on
pages with boxes; `line_strip` changes it and is for crops of one text line.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from data_tools.examples.images import FACTOR_PX

SLOPES = np.linspace(-0.08, 0.08, 17)
MIN_SLOPE = 0.008
UPRIGHT_BONUS = 1.06  # straight lines win ties
BAND_THRESHOLD = 0.04
MAX_JOINED_GAP_PX = 3  # dots and accents belong to the band below them
MIN_BAND_PX = 6


class Transform(BaseModel, ABC):
    """A named image transform; its fields are its settings, as they stand in YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    keeps_size: ClassVar[bool] = True
    name: str

    @abstractmethod
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Transform a (H, W, 3) uint8 image."""


class LineStrip(Transform):
    """Crop of one line -> strip of exactly one row of visual tokens.

    The skew is removed, the dominant ink band cut out, and the band resized to `height` px; the
    width is `stretch` tokens per unit of aspect ratio, so that a token holds about one character.
    The width never depends on the text.
    """

    keeps_size: ClassVar[bool] = False
    name: Literal["line_strip"] = "line_strip"
    height: int = Field(default=28, multiple_of=FACTOR_PX)
    stretch: float = Field(default=2.0, gt=0)
    deskew: bool = True
    ink_band: bool = True
    max_tokens: int = Field(default=120, gt=0)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return (height, 28 * tokens, 3) uint8, gray on three channels."""
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if self.deskew and gray.shape[1] >= 2.5 * gray.shape[0]:
            gray = straighten(gray)
        if self.ink_band:
            gray = dominant_band(gray)
        tokens = round(gray.shape[1] / gray.shape[0] * self.stretch)
        size = (FACTOR_PX * min(max(tokens, 1), self.max_tokens), self.height)
        strip = np.asarray(Image.fromarray(gray).resize(size, Image.Resampling.BILINEAR))
        return np.repeat(strip[:, :, None], 3, axis=2)


class Contrast(Transform):
    """Stretch gray levels so that the given percentiles become black and white (faded prints)."""

    name: Literal["contrast"] = "contrast"
    low_percentile: float = Field(default=1.0, ge=0, lt=50)
    high_percentile: float = Field(default=99.0, gt=50, le=100)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the image with its levels stretched; an even image stays as it is."""
        low, high = np.percentile(image, [self.low_percentile, self.high_percentile])
        if high - low < 1:
            return image
        return ((image - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


class StrokeDilation(Transform):
    """Thicken thin pen strokes by a square structuring element (handwriting)."""

    name: Literal["stroke_dilation"] = "stroke_dilation"
    size_px: int = Field(default=3, ge=2, le=15)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the image with dark strokes grown (light ones on a dark page)."""
        kernel = np.ones((self.size_px, self.size_px), np.uint8)
        is_dark_page = np.median(image) < 128
        grow = cv2.dilate if is_dark_page else cv2.erode
        return np.asarray(grow(image, kernel))


AnyTransform = Annotated[LineStrip | Contrast | StrokeDilation, Field(discriminator="name")]
_ADAPTER: TypeAdapter[tuple[AnyTransform, ...]] = TypeAdapter(tuple[AnyTransform, ...])


def load_transforms(records: list[dict]) -> tuple[Transform, ...]:
    """Build transforms from their YAML or JSON form; pydantic's ValidationError if one is wrong."""
    return _ADAPTER.validate_python(records)


def apply_transforms(image: np.ndarray, transforms: tuple[Transform, ...]) -> np.ndarray:
    """Apply the transforms to a (H, W, 3) uint8 image, in their order."""
    for transform in transforms:
        image = transform(image)
    return image


def ink_mask(gray: np.ndarray) -> np.ndarray:
    """Return the boolean (H, W) mask of ink by Otsu's threshold; ink is the rarer side."""
    threshold, _ = cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    dark = gray <= threshold
    return ~dark if dark.mean() > 0.5 else dark


def straighten(gray: np.ndarray) -> np.ndarray:
    """Remove a line's skew by a vertical shear, found by the sharpest row profile of its ink."""
    rows, columns = np.nonzero(ink_mask(gray))
    if len(rows) == 0:
        return gray
    height, width = gray.shape
    reach = int(np.ceil(np.abs(SLOPES).max() * width / 2)) + 1
    scores = []
    for slope in SLOPES:
        # An extended range: clipping would pile ink up on the border rows and win by it.
        sheared = np.rint(rows - slope * (columns - width / 2)).astype(int) + reach
        profile = np.bincount(sheared, minlength=height + 2 * reach).astype(np.float64)
        scores.append((profile**2).sum() * (UPRIGHT_BONUS if slope == 0 else 1.0))
    slope = float(SLOPES[int(np.argmax(scores))])
    if abs(slope) < MIN_SLOPE:
        return gray
    matrix = np.array([[1, 0, 0], [slope, 1, -slope * width / 2]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(gray, matrix, (width, height), flags=flags, borderMode=1))


def dominant_band(gray: np.ndarray) -> np.ndarray:
    """Cut out the row band that holds most ink, and the ink's columns in it.

    Neighbouring lines that reach into the crop are left out. The whole crop is returned when the
    band is under 6 px high.
    """
    mask = ink_mask(gray)
    profile = mask.sum(axis=1)
    inked = profile >= max(1, BAND_THRESHOLD * profile.max())
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inked, [False]]).astype(np.int8)))
    runs = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if not runs:
        return gray
    top, bottom = _grow(runs, max(runs, key=lambda run: int(profile[run[0] : run[1]].sum())), gray)
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    if bottom - top < MIN_BAND_PX or len(columns) < 2:
        return gray
    left, right = max(0, columns[0] - 2), min(gray.shape[1], columns[-1] + 3)
    return gray[max(0, top - 1) : bottom + 1, left:right]


def _grow(runs: list[tuple[int, int]], band: tuple[int, int], gray: np.ndarray) -> tuple[int, int]:
    """Join the runs next to the band across small gaps, unless they touch the crop's border."""
    top, bottom = band
    for start, end in reversed([run for run in runs if run[1] <= top]):
        if top - end > MAX_JOINED_GAP_PX or start == 0:
            break
        top = start
    for start, end in [run for run in runs if run[0] >= bottom]:
        if start - bottom > MAX_JOINED_GAP_PX or end == gray.shape[0]:
            break
        bottom = end
    return top, bottom
