"""Single text lines for training a reader from nothing: drawn, worn, cropped, written as shards.

Line number i is a pure function of (seed, i) and of the faces; neither the number of workers nor an
interruption changes it. Lines up to the share for validation are `train`, the rest `val`.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from data_tools.errors import ConfigError
from data_tools.jobs import run_jobs
from data_tools.output import claim_folder, exists, join, write_shard
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.synth.degrade import (
    INK_RANGE,
    PAPER_RANGE,
    add_noise,
    ink_mask,
    vary_blur,
    vary_slant,
    vary_stroke,
)
from data_tools.synth.fonts import Face, divide_faces, find_faces, open_font
from data_tools.synth.phrases import line_text

LINES_PER_SHARD = 20_000
RECORD_NAME = "synth.json"
MAX_ATTEMPTS = 20

_SIZES_PX = range(16, 42, 2)  # few sizes, so that a worker's opened fonts are reused
_INK_THRESHOLD = 48  # of 255, where a tight crop takes the ink to begin
_PNG_LEVEL = 1


@dataclass(frozen=True)
class LineSettings:
    """What determines every line, apart from its number.

    Attributes:
        seed: seed of all draws.
        max_chars: most characters a line has.
        upper: write the labels in upper case whatever is printed, as SROIE does, and print 60 % of
            the lines in upper case.
        inverted: light text on dark ground.
    """

    seed: int
    max_chars: int = 40
    upper: bool = False
    inverted: bool = False


@dataclass(frozen=True)
class ShardJob:
    """One shard of lines: numbers `start` to `stop` in the given faces."""

    path: str
    start: int
    stop: int
    faces: tuple[Face, ...]
    settings: LineSettings


def draw_line(number: int, faces: tuple[Face, ...], settings: LineSettings) -> Sample:
    """Return line `number` as a sample whose one annotation covers the whole crop."""
    rng = random.Random(f"{settings.seed}:line:{number}")
    for _ in range(MAX_ATTEMPTS):
        text = line_text(rng, settings.max_chars)
        label = text.upper() if settings.upper else text
        printed = label if rng.random() < 0.6 else text
        crop = _draw_crop(printed, rng.choice(faces), settings, rng)
        if crop is not None:
            return _to_sample(f"line-{number:09d}", label, crop)
    raise ConfigError(
        f"line {number}: {MAX_ATTEMPTS} drawings without ink; check the faces given with --fonts"
    )


def write_lines(
    out: str,
    num: int,
    settings: LineSettings,
    font_folders: list[str],
    heldout: list[str],
    split_val: float,
    workers: int,
    lines_per_shard: int = LINES_PER_SHARD,
) -> tuple[int, int]:
    """Write `num` lines as OUT/train-000000.tar, ... and OUT/val-000000.tar, ...

    Shards that exist are skipped. With `heldout`, those families are drawn in `val` only, and `val`
    is drawn in nothing else.

    Returns:
        (number of shards written now, number of all shards).
    """
    train_faces, val_faces = divide_faces(find_faces(font_folders), heldout)
    record = {
        "kind": "lines",
        "num": num,
        "split_val": split_val,
        "lines_per_shard": lines_per_shard,
        "train_faces": [f"{face.family} {face.style}" for face in train_faces],
        "val_faces": [f"{face.family} {face.style}" for face in val_faces],
    }
    claim_folder(out, RECORD_NAME, record | asdict(settings))
    num_val = round(num * split_val)
    jobs = []
    for split, start, stop, faces in (
        ("train", 0, num - num_val, train_faces),
        ("val", num - num_val, num, val_faces),
    ):
        for number, first in enumerate(range(start, stop, lines_per_shard)):
            path = join(out, f"{split}-{number:06d}.tar")
            last = min(first + lines_per_shard, stop)
            jobs.append(ShardJob(path, first, last, tuple(faces), settings))
    missing = [job for job in jobs if not exists(job.path)]
    for _ in run_jobs(write_line_shard, missing, workers, "line shards"):
        pass
    return len(missing), len(jobs)


def write_line_shard(job: ShardJob) -> int:
    """Draw and write the lines of one shard; return their number."""
    return write_shard(job.path, _draw_lines(job))


def _draw_lines(job: ShardJob) -> Iterator[Sample]:
    for number in range(job.start, job.stop):
        yield draw_line(number, job.faces, job.settings)


def _draw_crop(
    text: str, face: Face, settings: LineSettings, rng: random.Random
) -> np.ndarray | None:
    """Return the crop, (height, width) uint8 grey, or None if no ink is left of it."""
    size_px = rng.choice(_SIZES_PX)
    font = open_font(face.path, size_px)
    left, _, right, _ = font.getbbox(text)
    # One degree over half the width, and 0.15 of shear over half the height, on either side.
    mask = ink_mask(text, font, 5 + round(0.12 * size_px), 5 + round(0.01 * (right - left)))
    mask = vary_stroke(vary_slant(mask, rng), size_px, rng)
    ink_box = mask.point(lambda value: 255 * (value > _INK_THRESHOLD)).getbbox()
    if ink_box is None:
        return None
    mask = vary_blur(mask, size_px, rng)
    left, top, right, bottom = ink_box
    mask = mask.crop(
        (
            max(0, left - rng.randint(0, 3)),
            max(0, top - rng.randint(0, 2)),
            min(mask.width, right + rng.randint(0, 3)),
            min(mask.height, bottom + rng.randint(0, 2)),
        )
    )
    paper, ink = rng.randint(*PAPER_RANGE), rng.randint(*INK_RANGE)
    coverage = np.asarray(mask, dtype=np.float32) * np.float32((ink - paper) / 255)
    pixels = add_noise(coverage + np.float32(paper), rng).clip(0, 255).astype(np.uint8)
    return 255 - pixels if settings.inverted else pixels


def _to_sample(key: str, text: str, pixels: np.ndarray) -> Sample:
    height, width = pixels.shape
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=_PNG_LEVEL)
    return Sample(
        key=key,
        images=(PageImage(f"{key}.png", width, height),),
        annotations=(Annotation(text, (0, 0, width, height)),),
        source="synth",
        image_bytes=(stream.getvalue(),),
    )
