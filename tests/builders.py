"""Small synthetic samples, shards and run configurations for tests."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from data_tools.sample import Annotation, PageImage, Sample
from tests.harness_settings import FOUR_ZERO_SETTINGS

WORDS = ("TOTAL", "CASH", "12.50", "GST 6%", "INVOICE", "2019-03-01", "THANK YOU", "é 发票", "x")


def encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def draw_page(width: int, height: int, texts: list[str]) -> np.ndarray:
    """Return a (height, width, 3) uint8 page with one text a row."""
    page = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(16)
    for row, text in enumerate(texts):
        ImageDraw.Draw(page).text((4, 4 + 24 * row), text, fill="black", font=font)
    return np.asarray(page)


def make_sample(number: int, *, num_images: int = 1, num_lines: int = 2, seed: int = 0) -> Sample:
    """Return a document whose size and text depend on (seed, number)."""
    draw = np.random.default_rng((seed, number))
    texts = [WORDS[draw.integers(len(WORDS))] for _ in range(num_lines)]
    width, height = (int(draw.integers(2, 5)) * 28 for _ in range(2))
    page = draw_page(width, height, texts)
    annotations = tuple(
        Annotation(text, (2, 20 * row, width - 2, min(height, 20 * row + 20)), image=0)
        for row, text in enumerate(texts)
        if num_images and 20 * row + 1 < height
    ) or tuple(Annotation(text) for text in texts)
    return Sample(
        key=f"doc-{number:04d}",
        images=tuple(PageImage("page.png", width, height) for _ in range(num_images)),
        annotations=annotations,
        fields={"total": "12.50", "company": texts[0]},
        image_bytes=tuple(encode_png(page) for _ in range(num_images)),
        source="test",
    )


def write_shard(path: Path, samples: list[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for name, data in sample.to_members().items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int], *, first: int = 0, **options: Any) -> list[str]:
    """Write shards of the given sizes with documents numbered through; return their paths."""
    paths = []
    for number, size in enumerate(sizes):
        samples = [make_sample(first + i, **options) for i in range(size)]
        paths.append(str(write_shard(folder / f"train-{number:06d}.tar", samples)))
        first += size
    return paths


def run_record(folder: Path, model: Path, shards: list[str], **changes: Any) -> dict[str, Any]:
    """Return the configuration of a small stage; `changes` are `section=dict(...)`."""
    validation = Path(shards[0]).with_name("val-000000.tar")
    if Path(shards[0]).exists() and not validation.exists():
        shutil.copy(shards[0], validation)
    record: dict[str, Any] = {
        "run": {"dir": str(folder), "seed": 0},
        "model": {"path": str(model)},
        "data": {
            "train": [{"shards": f"{Path(shards[0]).parent}/train-*.tar"}],
            "validation": [str(validation)],
            "min_pixels": 784,
            "token_budget": 96,
            "packs_per_step": 4,
            "num_workers": 0,
            "index_workers": 0,
        },
        "task": {"templates": [{"name": "text-plain"}]},
        "stage": {"number": 2, "epochs": 50, "max_steps": 4},
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "parallel": {"precision": "fp32", "recompute": False, "zero": FOUR_ZERO_SETTINGS},
        "checkpoint": {"every_steps": 1000, "keep_last": 2},
        "evaluation": {"every_steps": 1000, "num_samples": 3, "max_new_tokens": 4},
        "monitor": {"log_every": 1},
    }
    for section, change in changes.items():
        record[section] = record.get(section, {}) | change
    return record


def write_run(path: Path, record: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, allow_unicode=True), encoding="utf-8")
    return path
