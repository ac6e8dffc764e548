"""How long every sample is for a tokenizer, a recipe and image settings: one cache file a shard.

Lengths carry a fingerprint of all that they depend on; a run with other settings makes its own.
A sample has length 0 for a template that it has no answer for. Samples that cannot be used at all
(an answer for none of the templates, an image of absurd shape) have a reason besides, and are left
out of the order.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import fsspec
import numpy as np
from safetensors.numpy import load, save
from tqdm import tqdm

from data_tools.errors import DataError
from data_tools.examples.encode import Encoder
from data_tools.examples.images import decode, num_visual_tokens
from data_tools.examples.tasks import COORDINATE_DIGITS, Recipe, ask
from data_tools.sample import Sample
from data_tools.stream.files import write_atomically
from data_tools.stream.index import ShardChangedError, ShardIndex, open_index

LENGTHS_VERSION = 3
CHUNK = 500  # samples of one unit of parallel work


@dataclass(frozen=True)
class Lengths:
    """Lengths of one shard's samples.

    Attributes:
        text: (templates, n) uint32, tokens without image pads; 0 where the template has no answer.
        targets: (templates, n) uint32, label tokens.
        visual: (n,) uint32, visual tokens of all images; a vision patch is a quarter of one.
        reasons: row -> why a sample can be used with no template.
    """

    text: np.ndarray
    targets: np.ndarray
    visual: np.ndarray
    reasons: dict[int, str]


def fingerprint(encoder: Encoder, recipe: Recipe) -> str:
    """Return a digest of all that lengths depend on, beside the shard itself."""
    images = encoder.images
    parts = {
        "version": LENGTHS_VERSION,
        "tokenizer": hashlib.sha256(
            encoder.tokenizer.backend_tokenizer.to_str().encode()
        ).hexdigest(),
        "chat_template": encoder.tokenizer.chat_template,
        "templates": [template.model_dump(mode="json") for template in recipe.templates],
        "min_pixels": images.min_pixels,
        "max_pixels": images.max_pixels,
        "transforms": [transform.model_dump(mode="json") for transform in images.transforms],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def make_lengths(
    shards: list[str], folder: str, images: Any, recipe: Recipe, *, num_workers: int
) -> None:
    """Compute and store the missing lengths of shards, in parallel, with a progress bar.

    Args:
        shards: paths or URLs.
        folder: the model folder whose tokenizer counts.
        images: the run's ImageSettings.
        recipe: the run's templates.
        num_workers: processes; 0 works in this one.
    """
    encoder = Encoder.from_folder(folder, images)
    mark = fingerprint(encoder, recipe)
    missing = [shard for shard in shards if not _exists(_cache_path(shard, mark))]
    if not missing:
        return
    indexes = [open_index(shard) for shard in missing]
    total = sum(len(index) for index in indexes)
    bar = tqdm(total=total, desc="measuring lengths", unit="sample", disable=None)
    jobs = _jobs(indexes)
    if num_workers and total > CHUNK:
        context = get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, context, _start, (folder, images, recipe))
        with pool:
            results = pool.map(_measure_chunk, *zip(*jobs, strict=True))
            _collect(indexes, jobs, results, mark, bar)
    else:
        _start(folder, images, recipe, encoder)
        results = (_measure_chunk(*job) for job in jobs)
        _collect(indexes, jobs, results, mark, bar)
    bar.close()


def read_lengths(index: ShardIndex, mark: str) -> Lengths:
    """Read the stored lengths of a shard for a fingerprint.

    Raises:
        ShardChangedError: if they were measured on another version of the shard.
    """
    path = _cache_path(index.path, mark)
    with fsspec.open(path, "rb") as file:
        columns = load(file.read())
    if bytes(columns["shard"]).decode() != index.identity:
        raise ShardChangedError(f"{path} was measured on another version of this shard; delete it")
    reasons = json.loads(bytes(columns["reasons"]))
    return Lengths(
        text=columns["text"],
        targets=columns["targets"],
        visual=columns["visual"],
        reasons={int(row): reason for row, reason in reasons.items()},
    )


def _jobs(indexes: list[ShardIndex]) -> list[tuple[str, int, int]]:
    return [
        (index.path, start, min(start + CHUNK, len(index)))
        for index in indexes
        for start in range(0, max(len(index), 1), CHUNK)
    ]


def _collect(
    indexes: list[ShardIndex],
    jobs: list[tuple[str, int, int]],
    results: Iterator[tuple[np.ndarray, dict[int, str]]],
    mark: str,
    bar: Any,
) -> None:
    """Put the measured chunks together and store a shard as soon as its last one is there."""
    ends = {index.path: len(index) for index in indexes}
    identities = {index.path: index.identity for index in indexes}
    parts: list[np.ndarray] = []
    reasons: dict[int, str] = {}
    for (shard, _, stop), (table, why) in zip(jobs, results, strict=True):
        parts.append(table)
        reasons |= why
        bar.update(table.shape[1])
        if stop == ends[shard]:
            table = np.concatenate(parts, axis=1)
            _store(_cache_path(shard, mark), identities[shard], table, reasons)
            parts, reasons = [], {}


def _store(path: str, identity: str, table: np.ndarray, reasons: dict[int, str]) -> None:
    templates = (len(table) - 1) // 2
    columns = {
        "text": np.ascontiguousarray(table[:templates]),
        "targets": np.ascontiguousarray(table[templates : 2 * templates]),
        "visual": np.ascontiguousarray(table[-1]),
        "reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8),
        "shard": np.frombuffer(identity.encode(), np.uint8),
    }
    write_atomically(path, save(columns))


_worker: dict[str, Any] = {}


def _start(folder: str, images: Any, recipe: Recipe, encoder: Encoder | None = None) -> None:
    _worker["encoder"] = encoder or Encoder.from_folder(folder, images)
    _worker["recipe"] = recipe
    _worker["index"] = None


def _measure_chunk(shard: str, start: int, stop: int) -> tuple[np.ndarray, dict[int, str]]:
    """Return ((2 * templates + 1, rows) uint32 text, target and visual tokens, reasons by row)."""
    if _worker["index"] is None or _worker["index"].path != shard:
        _worker["index"] = open_index(shard)
    index: ShardIndex = _worker["index"]
    encoder: Encoder = _worker["encoder"]
    recipe: Recipe = _worker["recipe"]
    table = np.zeros((2 * len(recipe.templates) + 1, stop - start), np.uint32)
    reasons: dict[int, str] = {}
    for row in range(start, stop):
        try:
            sample = index.read(row)
            sample.validate()
            table[:, row - start] = _measure(sample, encoder, recipe)
        except ShardChangedError:
            raise
        except DataError as error:
            reasons[row] = str(error)
    return table, reasons


def _measure(sample: Sample, encoder: Encoder, recipe: Recipe) -> list[int]:
    """Return a column of `_measure_chunk`; DataError if the sample can be used with no template."""
    sizes = []
    for number, page in enumerate(sample.images):
        if encoder.images.keeps_size:
            sizes.append(encoder.images.resized_size(page.height, page.width))
        else:
            image = decode(sample.image_bytes[number], f'sample "{sample.key}"')
            height, width, _ = encoder.images.prepare(image).shape
            sizes.append((height, width))
    visual = sum(num_visual_tokens(*size) for size in sizes)
    # No coordinate of an answer has more digits than the longest side.
    digits = max([COORDINATE_DIGITS, *(len(str(max(size))) for size in sizes)])
    counts, reasons = [], []
    for template in recipe.templates:
        try:
            counts.append(encoder.count(ask(sample, template, coordinate_digits=digits)))
        except DataError as error:
            counts.append((0, 0))
            reasons.append(error)
    if len(reasons) == len(counts):
        raise reasons[0]
    return [*(text for text, _ in counts), *(targets for _, targets in counts), visual]


def _cache_path(shard: str, mark: str) -> str:
    return f"{shard}.lengths-{mark}"


def _exists(path: str) -> bool:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(inner))
