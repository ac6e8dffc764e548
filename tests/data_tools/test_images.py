"""Decoding, orientation and resizing: exact, and safe against any bytes."""

import io
import random
import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hub_resize

from data_tools.errors import DataError
from data_tools.examples import resample
from data_tools.examples.images import (
    contiguous,
    decode,
    num_visual_tokens,
    oriented_size,
    resize,
    scale_box,
    smart_resize,
)

ORIENTATIONS = range(1, 9)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def encode(
    image: Image.Image | np.ndarray, kind: str, orientation: int = 0, **options: Any
) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def store_turned(page: Image.Image, orientation: int) -> Image.Image:
    """Return the pixels that a camera held this way would store of an upright page."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return page.transpose(undo[orientation]) if orientation in undo else page


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_pages_come_out_upright(kind: str, orientation: int) -> None:
    page = noise(33, 47)
    stored = store_turned(Image.fromarray(page), orientation)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored, kind, orientation, **options)
    assert np.array_equal(decode(data), page)
    assert oriented_size(data) == (47, 33)


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, 9])
def test_jpegs_come_out_upright_and_equal_to_pillow(orientation: int) -> None:
    for subsampling, quality in product([0, 1, 2], [30, 95]):
        data = encode(noise(33, 47), "JPEG", orientation, subsampling=subsampling, quality=quality)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.array_equal(decode(data), expected)
        assert oriented_size(data) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("mode, options", [("L", {}), ("RGB", {"progressive": True}), ("CMYK", {})])
def test_other_jpegs_equal_pillow(mode: str, options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(noise(40, 30)).convert(mode), "JPEG", **options)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, turned = encode(noise(20, 30), "PNG"), encode(noise(20, 30), "PNG", 6)
    broken = plain[: plain.index(b"IDAT") + 20]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert oriented_size(plain) == (30, 20)
    assert oriented_size(turned) == (20, 30)
    assert oriented_size(broken) == (30, 20)


def test_orientation_behind_the_pixels_of_a_png_counts() -> None:
    plain = encode(noise(20, 30), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    end = plain.index(b"IEND") - 4
    late = plain[:end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + plain[end:]
    assert decode(late).shape == (30, 20, 3)
    assert oriented_size(late) == (20, 30)


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(levels), "PNG"))
    assert np.array_equal(pixels, np.repeat((levels >> 8).astype(np.uint8)[:, :, None], 3, 2))


def test_transparency_becomes_white() -> None:
    pixels = noise(8, 8, 4)
    pixels[:4, :, 3], pixels[4:, :, 3] = 0, 255
    pixels[:4, :, :3] = 0
    found = decode(encode(pixels, "PNG"))
    assert (found[:4] == 255).all() and np.array_equal(found[4:], pixels[4:, :, :3])
    gray = Image.fromarray(pixels).convert("LA")
    assert (decode(encode(gray, "PNG"))[:4] == 255).all()


def test_transparent_palette_entries_become_white() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((1, 1), 1)
    found = decode(encode(image, "PNG", transparency=0))
    assert (found[0] == 255).all() and found[1, 1].tolist() == [200, 10, 10]


def jpeg_of_claimed_size(height: int, width: int) -> bytes:
    data = bytearray(encode(noise(16, 16), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of_claimed_size(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", b"")
        + png_chunk(b"IEND", b"")
    )


JPEG = encode(noise(64, 64), "JPEG", quality=95)
BROKEN = {
    "nothing": b"",
    "html": b"<html>not found</html>",
    "cut in the header": JPEG[:20],
    "cut after 200 bytes": JPEG[:200],
    "cut in half": JPEG[: len(JPEG) // 2],
    "end marker missing": JPEG[:-2],
    "cut png": encode(noise(64, 64), "PNG")[:3000],
    "huge png": png_of_claimed_size(14_000, 14_000),
    "large png": png_of_claimed_size(10_001, 10_001),
    "huge jpeg": jpeg_of_claimed_size(60_000, 60_000),
    "jpeg without height": jpeg_of_claimed_size(0, 16),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bytes_are_a_data_error_that_names_the_image(name: str) -> None:
    with pytest.raises(DataError, match='sample "k", image 0: ') as caught:
        decode(BROKEN[name], 'sample "k", image 0')
    assert " at 0x" not in str(caught.value), "a reason is the same in every process"


@pytest.mark.parametrize("name", ["nothing", "html", "huge png", "large png", "huge jpeg"])
def test_sizes_of_broken_headers_are_refused_too(name: str) -> None:
    with pytest.raises(DataError, match="page 3: "):
        oriented_size(BROKEN[name], "page 3")


def test_header_and_pixels_have_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from 89 megapixels on and refuses from 179 on; our limit lies between."""
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    data = encode(noise(30, 50), "PNG")
    assert oriented_size(data) == (50, 30)
    assert decode(data).shape == (30, 50, 3)
    monkeypatch.setattr("data_tools.examples.images.MAX_IMAGE_PIXELS", 1400)
    for read in (oriented_size, decode):
        with pytest.raises(DataError, match="50 x 30 px"):
            read(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_raise_nothing_else() -> None:
    draw = random.Random(0)
    seeds = [
        JPEG,
        encode(noise(9, 9), "JPEG", 6),
        encode(noise(9, 9), "PNG", 6),
        encode(noise(9, 9), "WEBP", 6),
        encode(noise(9, 9), "TIFF", 6),
        encode(Image.fromarray(noise(9, 9)).convert("P"), "PNG"),
    ]
    readable = 0
    for _ in range(600):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(min(len(data), draw.choice([60, 200, 5000])))] = draw.randrange(256)
        try:
            size = oriented_size(bytes(data))
            height, width, channels = decode(bytes(data)).shape
        except DataError:
            continue
        readable += 1
        assert (width, height) == size and channels == 3
    assert readable > 20


def test_smart_resize_equals_the_hub() -> None:
    draw = random.Random(0)
    for _ in range(1500):
        height, width = draw.randint(1, 3000), draw.randint(1, 3000)
        low, high = draw.choice([(784, 10**6), (3136, 12_845_056), (256 * 784, 1280 * 784)])
        try:
            expected = hub_resize(height, width, 28, low, high)
        except ValueError:
            with pytest.raises(DataError, match="aspect ratio"):
                smart_resize(height, width, min_pixels=low, max_pixels=high)
            continue
        assert smart_resize(height, width, min_pixels=low, max_pixels=high) == expected


def test_extreme_shapes() -> None:
    limits = {"min_pixels": 3136, "max_pixels": 10**6}
    assert smart_resize(1, 200, **limits) == (28, 812)
    assert decode(encode(noise(1, 20_000), "PNG")).shape == (1, 20_000, 3)
    with pytest.raises(DataError, match="20000 x 1 px exceeds 200"):
        smart_resize(1, 20_000, **limits)
    with pytest.raises(DataError, match="0 x 5 px has no pixels"):
        smart_resize(5, 0, **limits)


def test_resize_equals_pillow_and_copies_nothing_it_need_not_change() -> None:
    image = noise(50, 90)
    expected = Image.fromarray(image).resize((84, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(image, 56, 84), np.asarray(expected))
    assert resize(image, 50, 90) is image


GRAY_FILES = {
    "jpeg": ("L", "JPEG", {}),
    "turned jpeg": ("L", "JPEG", {"orientation": 6}),
    "png": ("L", "PNG", {}),
    "fax": ("1", "TIFF", {}),
}


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", GRAY_FILES)
def test_a_gray_page_is_one_channel_and_resizes_as_three_do(name: str, mode: Any) -> None:
    colours, kind, options = GRAY_FILES[name]
    data = encode(Image.fromarray(noise(610, 333)).convert(colours), kind, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    page, expected = decode(data), np.array(upright.convert("RGB"))
    assert page.strides[2] == 0 and np.array_equal(page, expected)
    assert contiguous(page).flags.c_contiguous and np.array_equal(contiguous(page), expected)
    for size in [(560, 280), (280, 560), (588, 1008), page.shape[:2]]:
        found = resize(page, *size, mode)
        assert found.flags.c_contiguous and np.array_equal(found, resize(expected, *size, mode))


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def torch_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """As the torchvision processor calls it: planes, one after the other in memory."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    resized = torch.nn.functional.interpolate(
        planes, (height, width), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


lengths = st.integers(2, 700)
cells = st.integers(1, 24)


@settings(deadline=None, max_examples=60)
@given(lengths, lengths, cells, cells, st.booleans())
def test_both_modes_equal_their_references(
    height: int, width: int, rows: int, columns: int, is_hard: bool
) -> None:
    """Ink without grey overshoots at every edge, so that clipping counts between the passes."""
    page = noise(height, width, seed=height)
    page = (page & 1) * np.uint8(255) if is_hard else page
    size = (28 * rows, 28 * columns)
    gray = np.broadcast_to(page[:, :, :1], page.shape)
    assert np.array_equal(resize(page, *size), pillow(page, *size))
    assert np.array_equal(resize(gray, *size), pillow(contiguous(gray), *size))
    assert np.array_equal(resize(page, *size, "fast"), torch_bicubic(page, *size))
    assert np.array_equal(resize(gray, *size, "fast"), torch_bicubic(contiguous(gray), *size))
    if 4 * max(height / size[0], width / size[1]) + 2 <= resample.MAX_TAPS:
        assert np.array_equal(resample._resize_integer(page, *size), pillow(page, *size))


@pytest.mark.parametrize("shape", [(900, 400), (400, 900), (500, 510), (300, 1200)])
@pytest.mark.parametrize("size", [(448, 392), (392, 448), (308, 1204), (896, 392)])
def test_the_order_of_the_passes_is_pillows(shape: tuple[int, int], size: tuple[int, int]) -> None:
    page = noise(*shape)
    assert np.array_equal(resample.resize_exact(page, *size), pillow(page, *size))


def test_a_pillow_that_resizes_otherwise_is_used_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact means equal to the installed Pillow, whatever it does."""
    resample._equals_pillow.cache_clear()
    resample._blocks.cache_clear()
    monkeypatch.setattr(resample, "PRECISION_BITS", 14)
    try:
        assert not resample._equals_pillow()
        page = noise(700, 500)
        assert np.array_equal(resample.resize_exact(page, 560, 420), pillow(page, 560, 420))
    finally:
        monkeypatch.undo()
        resample._equals_pillow.cache_clear()
        resample._blocks.cache_clear()
    assert resample._equals_pillow()


def test_visual_tokens_are_cells_of_28_px() -> None:
    assert num_visual_tokens(56, 84) == 6


sides = st.integers(8, 3000)


@given(sides, sides, st.sampled_from([784, 200_000, 12_845_056]), st.data())
def test_boxes_map_back_within_a_pixel_or_a_resized_pixel(
    width: int, height: int, max_pixels: int, data: st.DataObject
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    new_height, new_width = smart_resize(height, width, min_pixels=784, max_pixels=max_pixels)
    x1 = data.draw(st.integers(0, width - 1))
    y1 = data.draw(st.integers(0, height - 1))
    box = (x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height)))
    moved = scale_box(box, (width, height), (new_width, new_height))
    assert 0 <= moved[0] < moved[2] <= new_width and 0 <= moved[1] < moved[3] <= new_height
    back = scale_box(moved, (new_width, new_height), (width, height))
    for axis, cell in enumerate((width / new_width, height / new_height)):
        # A box under a cell in size still gets a whole one, so its far edge may move further.
        is_tiny = box[axis + 2] - box[axis] < cell
        assert abs(back[axis] - box[axis]) <= max(1.0, cell)
        assert abs(back[axis + 2] - box[axis + 2]) <= max(1.0, 2 * cell if is_tiny else cell)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", [(400, 300), (60, 1000), (900, 40), (20, 30), (64, 64)])
@pytest.mark.parametrize("max_pixels", [20_000, 10**7])
def test_a_box_on_the_resized_page_covers_the_same_ink(
    orientation: int, shape: tuple[int, int], max_pixels: int
) -> None:
    height, width = shape
    page = np.full((height, width, 3), 255, np.uint8)
    box = (
        width // 5,
        height // 4,
        width // 5 + max(6, width // 3),
        height // 4 + max(6, height // 3),
    )
    page[box[1] : box[3], box[0] : box[2]] = 0
    stored = store_turned(Image.fromarray(page), orientation)
    pixels = decode(encode(stored, "PNG", orientation))
    new_height, new_width = smart_resize(height, width, min_pixels=784, max_pixels=max_pixels)
    resized = resize(pixels, new_height, new_width)
    x1, y1, x2, y2 = scale_box(box, (width, height), (new_width, new_height))
    ink = resized[:, :, 0] < 128
    rows, columns = np.nonzero(ink)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.asarray(found) - (x1, y1, x2, y2)).max() <= 1
    assert ink[y1:y2, x1:x2].sum() >= 0.9 * ink.sum()
