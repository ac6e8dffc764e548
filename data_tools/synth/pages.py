"""Synthetic pages written as users write theirs: images and a labels.jsonl, one document a line."""

import json
import random
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from data_tools.jobs import run_jobs
from data_tools.output import claim_folder, exists, join, make_folder, write_file
from data_tools.synth.fonts import builtin_face, find_faces
from data_tools.synth.grammar import form, receipt
from data_tools.synth.layout import lay_out
from data_tools.synth.lines import RECORD_NAME
from data_tools.synth.render import draw_page

LABELS_NAME = "labels.jsonl"
PageKind = Literal["receipts", "forms", "mixed"]

_JPEG_QUALITY = 92
_PAGES_PER_JOB = 10


@dataclass(frozen=True)
class PageSettings:
    """What determines every page, apart from its number."""

    kind: PageKind
    seed: int
    is_inverted: bool = False


@dataclass(frozen=True)
class PageJob:
    """Some pages to draw into OUT/images, and the font files to draw from."""

    out: str
    numbers: tuple[int, ...]
    val_numbers: frozenset[int]
    font_paths: tuple[str, ...]
    settings: PageSettings


def write_pages(
    out: str,
    num: int,
    settings: PageSettings,
    font_folders: list[str],
    split_val: float,
    workers: int,
) -> bool:
    """Write `num` pages as OUT/images/*.jpg and OUT/labels.jsonl; tell whether there was any to do.

    Page i is a pure function of (seed, i) and of the faces; which pages are `val` is drawn from the
    seed and `num`. Without font folders Pillow's own face draws everything.
    """
    faces = find_faces(font_folders) if font_folders else [builtin_face()]
    names = [f"{face.family} {face.style}" for face in faces]
    claim_folder(
        out, RECORD_NAME, asdict(settings) | {"num": num, "split_val": split_val, "faces": names}
    )
    if exists(join(out, LABELS_NAME)):
        return False
    make_folder(join(out, "images"))
    split_rng = random.Random(f"{settings.seed}:split")
    val_numbers = frozenset(split_rng.sample(range(num), round(num * split_val)))
    jobs = [
        PageJob(
            out,
            tuple(range(first, min(first + _PAGES_PER_JOB, num))),
            val_numbers,
            tuple(face.path for face in faces),
            settings,
        )
        for first in range(0, num, _PAGES_PER_JOB)
    ]
    records = [record for part in run_jobs(draw_pages, jobs, workers, "pages") for record in part]
    records.sort(key=lambda record: record["image_path"])
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(join(out, LABELS_NAME), lines.encode("utf-8"))
    return True


def draw_pages(job: PageJob) -> list[dict[str, Any]]:
    """Draw and write the pages of a job; return their lines of labels.jsonl."""
    records = []
    for number in job.numbers:
        record, image = draw_document(number, job.font_paths, job.settings)
        record["split"] = "val" if number in job.val_numbers else "train"
        stream = BytesIO()
        image.save(stream, "JPEG", quality=_JPEG_QUALITY)
        write_file(join(job.out, record["image_path"]), stream.getvalue())
        records.append(record)
    return records


def draw_document(
    number: int, font_paths: tuple[str, ...], settings: PageSettings
) -> tuple[dict[str, Any], Image.Image]:
    """Return the annotation record of page `number`, without its split, and its grey image."""
    rng = random.Random(f"{settings.seed}:page:{number}")
    draw_form = rng.random() < 0.5 if settings.kind == "mixed" else settings.kind == "forms"
    content = form(rng) if draw_form else receipt(rng)
    layout = lay_out(content, rng.choice(font_paths), rng)
    page = draw_page(layout, settings.is_inverted, rng)
    prefix = "form" if draw_form else "receipt"
    record = {
        "image_path": f"images/{prefix}-{number:06d}.jpg",
        "annotations": [
            {"bbox": list(box), "text": text.text, "category": text.category}
            for text, box in zip(layout.texts, page.boxes, strict=True)
        ],
        "fields": content.fields,
        "width": layout.width,
        "height": layout.height,
    }
    return record, Image.fromarray(page.pixels)
