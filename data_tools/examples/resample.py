"""Antialiased bicubic resizing of uint8 images: bit-equal to Pillow or to torch, and faster.

Both work in two passes, one axis each, and round to uint8 between them. A pass over the height is
the same for every column and channel, so each pass here runs over the rows of a plain matrix; a
pass over the width is one over the transposed image.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

PRECISION_BITS = 22  # of Pillow's integer coefficients (Resample.c)
LOW_BITS = 11  # of them in the lower half
MAX_TAPS = 32  # 255 * 2^11 * 32 = 2^24: sums stay exact in float32
ROWS_PER_BLOCK = 64  # a block's sums stay in the cache
MIN_PIXELS = 100_000  # below, Pillow's own loop has less overhead


def resize_exact(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize contiguous (H, W) or (H, W, 3) uint8, bit-equal to the installed Pillow's bicubic."""
    rows, columns = pixels.shape[:2]
    reduction = max(rows / height, columns / width)
    if height * width < MIN_PIXELS or 4 * reduction + 2 > MAX_TAPS or not _equals_pillow():
        return _resize_pillow(pixels, height, width)
    return _resize_integer(pixels, height, width)


def resize_fast(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize contiguous (H, W) or (H, W, 3) uint8, bit-equal to torch's uint8 bicubic."""
    if pixels.ndim == 3:
        return _interpolate(pixels, height, width)
    rows, columns = pixels.shape
    if columns != width:
        # The kernel takes the width first; four neighbours make one pixel of four channels.
        padded = cv2.copyMakeBorder(pixels, 0, -rows % 4, 0, 0, cv2.BORDER_CONSTANT)
        pixels = cv2.transpose(_interpolate_height(cv2.transpose(padded), width))[:rows]
    return _interpolate_height(pixels, height) if rows != height else pixels


def _resize_pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    page = Image.fromarray(pixels)
    return np.asarray(page.resize((width, height), Image.Resampling.BICUBIC))


def _resize_integer(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize by Pillow's arithmetic; of its passes the one over the height may come first."""
    rows, columns = pixels.shape[:2]
    # Inferred from Pillow 13.0.0 (891 random shapes); `_equals_pillow` looks at other versions.
    height_first = height < rows and rows - height > 2 * (columns - width)
    if height_first:
        pixels = _pass_height(pixels, height)
    if columns != width:
        pixels = cv2.transpose(_pass_height(cv2.transpose(pixels), width))
    if not height_first and rows != height:
        pixels = _pass_height(pixels, height)
    return pixels


@lru_cache(maxsize=1)
def _equals_pillow() -> bool:
    """Return whether the installed Pillow does the same: versions differ in the order of passes."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 80, 3)).astype(np.uint8)
    return all(
        np.array_equal(_resize_integer(noise, *size), _resize_pillow(noise, *size))
        for size in ((56, 84), (84, 56), (112, 112), (64, 64), (63, 64), (28, 28), (96, 56))
    )


class _Block(NamedTuple):
    """Some output rows of a pass: which input rows they need, and how they sum them.

    Attributes:
        out: output rows.
        rows: input rows.
        taps: (2 * taps,) int64, counted from the first of `rows`.
        offsets: (2 * len(out) + 1,) int64, borders of the sums; first the upper halves of the
            coefficients, then the lower ones.
        weights: (2 * taps,) float32, coefficients divided by 2^11.
    """

    out: slice
    rows: slice
    taps: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray


def _pass_height(pixels: np.ndarray, height: int) -> np.ndarray:
    """Resize (H, W, ...) uint8 to (height, W, ...) as one of Pillow's passes does.

    Pillow computes clip((2^21 + sum of pixel * k) >> 22) with integers k. Here the halves of
    k = 2^11 * upper + lower are summed apart, which is exact in float32, by the kernel of torch's
    weighted embedding bags, which sums weighted rows.
    """
    import torch
    from torch.nn.functional import embedding_bag

    matrix = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    resized = np.empty((height, matrix.shape[1]), np.uint8)
    for block in _blocks(len(matrix), height):
        sums = embedding_bag(
            torch.from_numpy(block.taps),
            torch.from_numpy(matrix[block.rows].astype(np.float32)),
            torch.from_numpy(block.offsets),
            mode="sum",
            per_sample_weights=torch.from_numpy(block.weights),
            include_last_offset=True,
        ).numpy()
        upper, lower = np.split(sums, 2)
        np.floor(lower, out=lower)
        # All are multiples of 2^-11; 2^-13 more rounds a half up, where cv2 rounds it to even.
        cv2.addWeighted(upper, 1, lower, 2**-11, 2**-13, resized[block.out], cv2.CV_8U)
    return resized.reshape(height, *pixels.shape[1:])


@lru_cache(maxsize=256)
def _blocks(size: int, new_size: int) -> tuple[_Block, ...]:
    first, taps, coefficients = _coefficients(size, new_size)
    upper = coefficients >> LOW_BITS
    halves = np.stack([upper, coefficients - (upper << LOW_BITS)]) / 2**LOW_BITS
    place = np.arange(coefficients.shape[1])
    blocks = []
    for start in range(0, new_size, ROWS_PER_BLOCK):
        out = slice(start, min(start + ROWS_PER_BLOCK, new_size))
        is_tap = place < taps[out, None]
        rows = slice(int(first[start]), int((first[out] + taps[out]).max()))
        index = (first[out, None] - rows.start + place)[is_tap]
        weights = np.concatenate([half[out][is_tap] for half in halves]).astype(np.float32)
        offsets = np.cumsum(np.concatenate([[0], taps[out], taps[out]]))
        blocks.append(_Block(out, rows, np.concatenate([index, index]), offsets, weights))
    return tuple(blocks)


def _coefficients(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first input rows (new,), numbers of taps (new,) and (new, most taps) coefficients.

    Source: `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c, operation by
    operation (bicubic, a = -0.5).
    """
    scale = size / new_size
    filter_scale = max(scale, 1.0)
    support = 2.0 * filter_scale
    centre = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    taps = np.minimum((centre + support + 0.5).astype(np.int64), size) - first
    place = np.arange(taps.max())
    x = np.abs((place + first[:, None] - centre[:, None] + 0.5) * (1.0 / filter_scale))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[place >= taps[:, None]] = 0.0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed one by one, as Pillow does
    rounded = np.trunc(np.copysign(0.5, weights) + weights * 2**PRECISION_BITS)
    return first, taps, rounded.astype(np.int64)


def _interpolate_height(gray: np.ndarray, height: int) -> np.ndarray:
    """Resize (H, W) uint8 to (height, W) with torch's kernel; W is a multiple of 4."""
    rows, columns = gray.shape
    packed = np.ascontiguousarray(gray).reshape(rows, columns // 4, 4)
    return _interpolate(packed, height, columns // 4).reshape(height, columns)


def _interpolate(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize contiguous (H, W, C) uint8, C <= 4, by torch's antialiased bicubic kernel."""
    import torch

    rows, columns, channels = pixels.shape
    if not pixels.flags.writeable:
        pixels = pixels.copy()  # torch warns of memory that it must not write to
    # Strides spelled out: with those of `[None]` the kernel does not see that the channels are
    # last, writes planes, and copying these back takes longer than the resize.
    strides = (pixels.size, 1, columns * channels, channels)
    image = torch.from_numpy(pixels).as_strided((1, channels, rows, columns), strides)
    resized = torch.nn.functional.interpolate(
        image, (height, width), mode="bicubic", antialias=True
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
