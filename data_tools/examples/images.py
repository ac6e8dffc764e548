"""Decode, orient and resize page images exactly as Qwen2.5-VL's own processor does.

The rule of the Hugging Face image processor (`smart_resize`, patch 14, merge 2): both sides are
multiples of 28 px, the area lies in [min_pixels, max_pixels], the aspect ratio is kept. What the
processor does not do is done here first: EXIF orientation, 16-bit grey scaled instead of clipped,
transparency composited on white.

Scans are mostly grey. A grey page is decoded once: its three equal channels are a view on one
(stride 0), and the resize, which treats channels alike, works on that one.
"""

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_tools.errors import DataError
from data_tools.examples.resample import resize_exact, resize_fast
from data_tools.sample import Box

PATCH_PX = 14
FACTOR_PX = 28  # patch 14 * spatial merge 2
MAX_IMAGE_PIXELS = 100_000_000
MAX_ASPECT = 200
ORIENTATION = 0x0112  # EXIF tag

PixelMode = Literal["exact", "fast"]


def decode(data: bytes, name: str = "image") -> np.ndarray:
    """Decode an encoded image into (height, width, 3) uint8 RGB, oriented by its EXIF tag.

    The channels of a grey image are read-only views on one; `contiguous` makes them three.

    Raises:
        DataError: if the bytes are no image, are cut off, or the image is absurdly large.
    """
    with _open_image(data, name, "cannot be decoded") as image:
        pixels = _decode_jpeg(data, image)
        if pixels is None:
            pixels = np.asarray(_flatten(image))
    if pixels.ndim == 2:
        pixels = np.broadcast_to(pixels[:, :, None], (*pixels.shape, 3))
    return pixels


def contiguous(image: np.ndarray) -> np.ndarray:
    """Return a (H, W, 3) uint8 image whose channels lie side by side in memory."""
    if _is_gray(image):
        return np.asarray(cv2.cvtColor(image[:, :, 0], cv2.COLOR_GRAY2RGB))
    return np.ascontiguousarray(image)


def oriented_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """Return (width, height) in pixels after EXIF orientation, reading only the header.

    Raises:
        DataError: if there is no image header or the size is absurd.
    """
    with _open_image(data, name, "no readable image header") as image:
        width, height = image.size
        is_turned = _is_turned(data, image)
    return (height, width) if is_turned else (width, height)


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) that the vision encoder will see.

    Source: `smart_resize` of transformers' Qwen2-VL image processor (5.23), Python's banker's
    rounding included.

    Raises:
        DataError: if a side is not positive or the aspect ratio exceeds 200.
    """
    if min(height, width) < 1:
        raise DataError(f"an image of {width} x {height} px has no pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise DataError(f"aspect ratio of {width} x {height} px exceeds {MAX_ASPECT}")
    new_height = round(height / FACTOR_PX) * FACTOR_PX
    new_width = round(width / FACTOR_PX) * FACTOR_PX
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(FACTOR_PX, math.floor(height / scale / FACTOR_PX) * FACTOR_PX)
        new_width = max(FACTOR_PX, math.floor(width / scale / FACTOR_PX) * FACTOR_PX)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / FACTOR_PX) * FACTOR_PX
        new_width = math.ceil(width * scale / FACTOR_PX) * FACTOR_PX
    return new_height, new_width


def resize(image: np.ndarray, height: int, width: int, mode: PixelMode = "exact") -> np.ndarray:
    """Resize (H, W, 3) uint8 by antialiased bicubic interpolation.

    Args:
        image: from `decode`, or any other.
        height: wanted, in pixels.
        width: wanted, in pixels.
        mode: "exact" is bit-equal to Pillow and so to the PIL image processor of transformers,
            "fast" to torch's uint8 kernel and so to the torchvision one.
    """
    if image.shape[:2] == (height, width):
        return contiguous(image)
    gray = _is_gray(image)
    pixels = np.ascontiguousarray(image[:, :, 0] if gray else image)
    resized = (resize_exact if mode == "exact" else resize_fast)(pixels, height, width)
    return np.asarray(cv2.cvtColor(resized, cv2.COLOR_GRAY2RGB)) if gray else resized


def num_visual_tokens(height: int, width: int) -> int:
    """Return the tokens that the language model receives for a resized image (2x2 merge)."""
    return (height // FACTOR_PX) * (width // FACTOR_PX)


def scale_box(box: Box, from_wh: tuple[int, int], to_wh: tuple[int, int]) -> Box:
    """Move a half-open xyxy box from one image size to another, clipped, never empty.

    Args:
        box: (x1, y1, x2, y2) in pixels of an image of size `from_wh`.
        from_wh: (width, height) in pixels.
        to_wh: (width, height) in pixels.
    """
    scale_x, scale_y = to_wh[0] / from_wh[0], to_wh[1] / from_wh[1]
    x1 = min(max(0, round(box[0] * scale_x)), to_wh[0] - 1)
    y1 = min(max(0, round(box[1] * scale_y)), to_wh[1] - 1)
    x2 = min(max(x1 + 1, round(box[2] * scale_x)), to_wh[0])
    y2 = min(max(y1 + 1, round(box[3] * scale_y)), to_wh[1])
    return x1, y1, x2, y2


def _is_gray(image: np.ndarray) -> bool:
    """Return whether the channels are views on one (`decode`)."""
    return image.strides[2] == 0


@contextmanager
def _open_image(data: bytes, name: str, complaint: str) -> Iterator[Image.Image]:
    """Open an image of allowed size; whatever its bytes make Pillow raise becomes a DataError."""
    with warnings.catch_warnings():
        # The limit is ours, the same for header and pixels.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(name, *image.size)
                yield image
        except DataError:
            raise
        except MemoryError:
            raise  # says something of this machine, not of the bytes
        except UnidentifiedImageError as error:
            # Pillow's message holds a memory address, a reason must be the same everywhere.
            raise DataError(f"{name}: {complaint} (no known image format)") from error
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise DataError(f"{name}: {complaint} ({error or type(error).__name__})") from error


def _is_turned(data: bytes, image: Image.Image) -> bool:
    """Return whether orientation swaps width and height, without decoding pixels."""
    if image.format == "TIFF":
        return False  # Pillow states the oriented size already
    if image.format == "PNG" and not _has_late_metadata(data):
        # PngImageFile.getexif decodes all pixels in search of what could stand behind them.
        return Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
    return image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)


def _has_late_metadata(png: bytes) -> bool:
    """Return whether a chunk behind the pixels of a PNG may hold its orientation."""
    place, is_behind_pixels = 8, False
    while place + 8 <= len(png):
        size, kind = struct.unpack_from(">I4s", png, place)
        is_behind_pixels = is_behind_pixels or kind == b"IDAT"
        if is_behind_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        place += 12 + size
    return False


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """Decode a plain JPEG with simplejpeg (bit-equal to Pillow, faster); None for anything else.

    Returns:
        (H, W, 3) uint8, or (H, W) of a grey one.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    is_gray = image.mode == "L"
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY" if is_gray else "RGB")
    pixels = pixels[:, :, 0] if is_gray else pixels
    orientation = image.getexif().get(ORIENTATION, 1)
    if orientation == 1:
        return pixels
    oriented = Image.fromarray(pixels)
    oriented.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(oriented))


def _flatten(image: Image.Image) -> Image.Image:
    """Return the upright image as RGB, or as L if it is grey without transparency."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} px; expected 1 to {MAX_IMAGE_PIXELS // 10**6} megapixels"
        )
