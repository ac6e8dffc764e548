"""Named image transforms: line strips of one row of tokens, contrast, strokes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError

from data_tools.examples.images import FACTOR_PX
from data_tools.examples.preprocess import (
    Contrast,
    LineStrip,
    StrokeDilation,
    apply_transforms,
    dominant_band,
    ink_mask,
    load_transforms,
    straighten,
)


def line_crop(text: str, *, width: int = 400, height: int = 40, slope: float = 0.0) -> np.ndarray:
    """Return a (height, width, 3) crop of one printed line, sheared by `slope` (dy per dx)."""
    page = Image.new("L", (width, height), 255)
    font = ImageFont.load_default(16)
    ImageDraw.Draw(page).text((8, height / 2), text, fill=0, font=font, anchor="lm")
    coefficients = (1, 0, 0, -slope, 1, slope * width / 2)
    page = page.transform(
        page.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=255
    )
    return np.repeat(np.asarray(page)[:, :, None], 3, axis=2)


def skew_of(gray: np.ndarray) -> float:
    """Return the slope of the line through a crop's ink."""
    rows, columns = np.nonzero(gray < 128)
    return float(np.polyfit(columns, rows, 1)[0])


pages = hnp.arrays(np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 200), st.just(3)))


@given(pages)
@settings(max_examples=60, deadline=None)
def test_a_strip_is_one_row_of_tokens_whatever_the_page(page: np.ndarray) -> None:
    strip = LineStrip()(page)
    assert strip.dtype == np.uint8 and strip.ndim == 3 and strip.shape[2] == 3
    assert strip.shape[0] == FACTOR_PX and strip.shape[1] % FACTOR_PX == 0
    assert FACTOR_PX <= strip.shape[1] <= 120 * FACTOR_PX


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_even_page_gives_a_strip_too(level: int) -> None:
    assert LineStrip()(np.full((20, 100, 3), level, np.uint8)).shape == (28, 280, 3)


def test_width_follows_the_shape_of_the_ink_and_the_stretch() -> None:
    crop = np.full((40, 400, 3), 255, np.uint8)
    crop[10:30, 50:250] = 0
    # The band is 22 x 205 px: a row more on both sides, two columns left, three right.
    assert LineStrip()(crop).shape == (28, 28 * round(204 / 22 * 2), 3)
    assert LineStrip(stretch=1.0)(crop).shape == (28, 28 * round(204 / 22), 3)
    assert LineStrip(max_tokens=5)(crop).shape == (28, 140, 3)
    assert LineStrip(height=56)(crop).shape[0] == 56
    whole = LineStrip(ink_band=False)(crop)
    assert whole.shape == (28, 28 * 20, 3)


@pytest.mark.parametrize("slope", [-0.06, -0.03, 0.03, 0.06])
def test_a_skewed_line_is_straightened(slope: float) -> None:
    crop = line_crop("THE QUICK BROWN FOX JUMPS OVER IT", height=60, slope=slope)[:, :, 0]
    assert abs(skew_of(crop) - slope) < 0.012
    assert abs(skew_of(straighten(crop))) < 0.012


def test_a_straight_line_is_left_alone() -> None:
    crop = line_crop("THE QUICK BROWN FOX JUMPS OVER IT")[:, :, 0]
    assert np.array_equal(straighten(crop), crop)


def test_neighbouring_lines_are_left_out() -> None:
    alone = line_crop("TOTAL 12.50", height=40)[:, :, 0]
    crowded = alone.copy()
    crowded[:4, 20:60] = 0  # feet of the line above
    crowded[-4:, 20:90] = 0
    assert np.array_equal(dominant_band(crowded), dominant_band(alone))
    assert dominant_band(alone).shape[0] < 20


def test_dots_and_accents_belong_to_the_band_below() -> None:
    crop = np.full((40, 200), 255, np.uint8)
    crop[15:30, 20:180] = 0
    crop[10:13, 60:90] = 0  # a gap of two rows
    assert dominant_band(crop).shape[0] == 20 + 2


@pytest.mark.parametrize("is_dark", [False, True])
def test_ink_is_found_on_light_and_dark_pages(is_dark: bool) -> None:
    crop = line_crop("TOTAL 12.50")[:, :, 0]
    ink = ink_mask(crop)
    assert 0.01 < ink.mean() < 0.3
    if is_dark:
        assert np.array_equal(ink_mask(255 - crop), ink)
        light, dark = dominant_band(crop), dominant_band(255 - crop)
        assert np.array_equal(light, 255 - dark)


def test_contrast_stretches_faded_prints() -> None:
    faded = (line_crop("faded print " * 3) // 4 + 120).astype(np.uint8)
    assert int(np.ptp(faded)) < 70
    strong = Contrast(low_percentile=0.5)(faded)
    assert strong.min() == 0 and strong.max() == 255 and strong.shape == faded.shape
    even = np.full((9, 9, 3), 77, np.uint8)
    assert np.array_equal(Contrast()(even), even)


@pytest.mark.parametrize("is_dark", [False, True])
def test_dilation_grows_strokes_not_the_page(is_dark: bool) -> None:
    page = np.full((21, 21, 3), 255, np.uint8)
    page[10, 5:16] = 0
    page = 255 - page if is_dark else page
    grown = StrokeDilation(size_px=3)(page)
    ink = (grown[:, :, 0] > 128) if is_dark else (grown[:, :, 0] < 128)
    assert ink.sum() == 3 * 13


def test_transforms_run_in_their_order() -> None:
    page = line_crop("ABC")
    both = apply_transforms(page, (Contrast(), LineStrip()))
    assert np.array_equal(both, LineStrip()(Contrast()(page)))
    assert apply_transforms(page, ()) is page


def test_settings_survive_dump_and_load() -> None:
    transforms = (LineStrip(stretch=1.5, deskew=False), Contrast(), StrokeDilation(size_px=5))
    records = [transform.model_dump(mode="json") for transform in transforms]
    assert load_transforms(records) == transforms
    assert [transform.keeps_size for transform in load_transforms(records)] == [False, True, True]
    assert load_transforms([{"name": "line_strip"}]) == (LineStrip(),)


@pytest.mark.parametrize(
    "record",
    [
        {"name": "sharpen"},
        {"name": "line_strip", "height": 30},
        {"name": "line_strip", "keeps_size": True},
        {"name": "contrast", "low": 1},
        {},
    ],
)
def test_wrong_settings_are_refused(record: dict) -> None:
    with pytest.raises(ValidationError):
        load_transforms([record])
