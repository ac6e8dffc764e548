"""How text is drawn and worn: stroke weight, blur, slant and noise, as the base model saw them.

All functions work on ink masks (grey images, 255 where there is ink) or on finished grey images,
and draw their choices from the generators they are given.
"""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PAPER_RANGE = (190, 255)  # grey of the background
INK_RANGE = (0, 90)  # grey of the ink
THIN_MIN_SIZE_PX = 26  # below it, thinned strokes vanish
THICK_MIN_SIZE_PX = 20  # below it, thickened strokes close the letters
BLUR_RANGE_PX = (0.4, 1.4)
BLUR_MAX_SHARE = 0.05  # of the text size: small text under a wide blur is no text any more

_THICKER = ImageFilter.MaxFilter(3)  # on a mask the ink is the bright part
_THINNER = ImageFilter.MinFilter(3)


def ink_mask(text: str, font: ImageFont.FreeTypeFont, margin_x: int, margin_y: int) -> Image.Image:
    """Draw text as a mask (grey, 255 where there is ink) with empty margins around the ink box."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    mask = Image.new("L", (right - left + 2 * margin_x, bottom - top + 2 * margin_y))
    ImageDraw.Draw(mask).text((margin_x - left, margin_y - top), text, fill=255, font=font)
    return mask


def vary_stroke(mask: Image.Image, size_px: int, rng: random.Random) -> Image.Image:
    """Thicken the strokes of 15 % of the masks and thin those of 10 %, by less than a pixel a side.

    The filtered mask is blended with the mask itself: a full pixel off either side would leave
    nothing of the strokes of a regular face.
    """
    draw = rng.random()
    if draw < 0.15 and size_px >= THICK_MIN_SIZE_PX:
        return Image.blend(mask, mask.filter(_THICKER), rng.uniform(0.4, 1.0))
    if 0.15 <= draw < 0.25 and size_px > THIN_MIN_SIZE_PX:
        return Image.blend(mask, mask.filter(_THINNER), rng.uniform(0.3, 0.6))
    return mask


def vary_slant(mask: Image.Image, rng: random.Random) -> Image.Image:
    """Stretch by x 0.85 to 1.15, rotate 30 % by up to 1 degree and shear 30 % by up to 0.15.

    The canvas is widened for the stretch; the caller leaves enough margin for rotation and shear.
    """
    stretch = rng.uniform(0.85, 1.15)
    slope = np.tan(np.radians(rng.uniform(-1.0, 1.0))) if rng.random() < 0.3 else 0.0
    shear = rng.uniform(-0.15, 0.15) if rng.random() < 0.3 else 0.0
    width, height = round(mask.width * stretch), mask.height
    centre_x, centre_y = width / 2, height / 2
    # Output pixel (x, y) takes the input at (a x + b y + c, d x + e y + f), both seen from the
    # centre. At one degree a rotation is a shear of the rows and of the columns.
    a, b, d, e = 1 / stretch, (shear - slope) / stretch, slope, 1.0
    c = mask.width / 2 - a * centre_x - b * centre_y
    f = height / 2 - d * centre_x - e * centre_y
    return mask.transform(
        (width, height),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        resample=Image.Resampling.BILINEAR,
    )


def vary_blur(image: Image.Image, size_px: int, rng: random.Random) -> Image.Image:
    """Blur 35 % of the images with a Gaussian of radius 0.4 to 1.4 px, less for small text."""
    if rng.random() < 0.35:
        radius = min(rng.uniform(*BLUR_RANGE_PX), BLUR_MAX_SHARE * size_px)
        return image.filter(ImageFilter.GaussianBlur(radius))
    return image


def add_noise(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Add Gaussian noise of sigma 2 to 18 to 40 % of the images.

    Args:
        pixels: (height, width) float32, grey 0 to 255.
        rng: decides whether and how much; it also seeds the noise itself.

    Returns:
        (height, width) float32, not clipped.
    """
    if rng.random() >= 0.4:
        return pixels
    generator = np.random.default_rng(rng.getrandbits(63))
    noise = generator.standard_normal(pixels.shape, dtype=np.float32)
    return pixels + noise * np.float32(rng.uniform(2.0, 18.0))
