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

import numpy as np
from safetensors.numpy import load, save
from tqdm import tqdm

from data_tools.errors import DataError
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.images import decode, num_visual_tokens
from data_tools.examples.tasks import COORDINATE_DIGITS, Recipe, ask
from data_tools.sample import Sample
from data_tools.stream.files import write_atomically
from data_tools.stream.index import (
    ShardChangedError,
    ShardIndex,
    beside,
    index_shards,
    open_index,
)
from data_tools.stream.remote import call, exists

LENGTHS_VERSION = 4
CHUNK = 500  # samples of one unit of parallel work
READ_TOGETHER = 32  # samples whose bytes are asked for at once


@dataclass(frozen=True)
class Lengths:
    """Lengths of one shard's samples.

    Attributes:
        text: (templates, n) uint32, tokens without image pads; 0 where the template has no answer.
        targets: (templates, n) uint32, label tokens.
        visual: (n,) uint32, visual tokens of all images; a vision patch is a quarter of one.
        answers: (n,) uint32, turns of the assistant.
        reasons: row -> why a sample can be used with no template.
    """

    text: np.ndarray
    targets: np.ndarray
    visual: np.ndarray
    answers: np.ndarray
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
    shards: list[str],
    folder: str,
    images: ImageSettings,
    recipe: Recipe,
    *,
    num_workers: int,
    index_dir: str | None = None,
) -> None:
    """Compute and store the missing lengths of shards, in parallel, with a progress bar.

    Args:
        shards: paths or URLs.
        folder: the model folder whose tokenizer counts.
        images: the run's page preparation.
        recipe: the run's templates.
        num_workers: processes; 0 works in this one.
        index_dir: where indexes and lengths lie, if not beside the shards.
    """
    encoder = Encoder.from_folder(folder, images)
    mark = fingerprint(encoder, recipe)
    missing = [shard for shard in shards if not exists(_cache_path(shard, mark, index_dir))]
    if not missing:
        return
    index_shards(missing, workers=max(num_workers, 1), index_dir=index_dir)
    indexes = [open_index(shard, index_dir) for shard in missing]
    total = sum(len(index) for index in indexes)
    bar = tqdm(total=total, desc="measuring lengths", unit="sample", disable=None)
    jobs = _jobs(indexes)
    place = (mark, index_dir)
    if num_workers and total > CHUNK:
        context = get_context("spawn")
        settings = (folder, images, recipe, index_dir)
        with ProcessPoolExecutor(num_workers, context, _start, settings) as pool:
            results = pool.map(_measure_chunk, *zip(*jobs, strict=True))
            _collect(indexes, jobs, results, place, bar)
    else:
        _start(folder, images, recipe, index_dir, encoder)
        results = (_measure_chunk(*job) for job in jobs)
        _collect(indexes, jobs, results, place, bar)
    bar.close()


def read_lengths(index: ShardIndex, mark: str, index_dir: str | None = None) -> Lengths:
    """Read the stored lengths of a shard for a fingerprint.

    Raises:
        ShardChangedError: if they were measured on another version of the shard.
    """
    path = _cache_path(index.path, mark, index_dir)
    columns = load(call(path, lambda filesystem, inner: filesystem.cat_file(inner)))
    if bytes(columns.pop("shard")).decode() != index.identity:
        raise ShardChangedError(f"{path} was measured on another version of this shard; delete it")
    reasons = json.loads(bytes(columns.pop("reasons")))
    return Lengths(reasons={int(row): reason for row, reason in reasons.items()}, **columns)


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
    place: tuple[str, str | None],
    bar: Any,
) -> None:
    """Put the measured chunks together and store a shard as soon as its last one is there."""
    by_path = {index.path: index for index in indexes}
    parts: list[np.ndarray] = []
    reasons: dict[int, str] = {}
    for (shard, _, stop), (table, why) in zip(jobs, results, strict=True):
        parts.append(table)
        reasons |= why
        bar.update(table.shape[1])
        if stop == len(by_path[shard]):
            table = np.concatenate(parts, axis=1)
            _store(_cache_path(shard, *place), by_path[shard].identity, table, reasons)
            parts, reasons = [], {}


def _store(path: str, identity: str, table: np.ndarray, reasons: dict[int, str]) -> None:
    templates = (len(table) - 2) // 2
    columns = {
        "text": np.ascontiguousarray(table[:templates]),
        "targets": np.ascontiguousarray(table[templates : 2 * templates]),
        "visual": np.ascontiguousarray(table[-2]),
        "answers": np.ascontiguousarray(table[-1]),
        "reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8),
        "shard": np.frombuffer(identity.encode(), np.uint8),
    }
    write_atomically(path, save(columns))


@dataclass
class _Worker:
    """What a process that measures keeps from one chunk to the next."""

    encoder: Encoder
    recipe: Recipe
    index_dir: str | None
    index: ShardIndex | None = None


_worker: list[_Worker] = []


def _start(
    folder: str,
    images: ImageSettings,
    recipe: Recipe,
    index_dir: str | None,
    encoder: Encoder | None = None,
) -> None:
    _worker[:] = [_Worker(encoder or Encoder.from_folder(folder, images), recipe, index_dir)]


def _measure_chunk(shard: str, start: int, stop: int) -> tuple[np.ndarray, dict[int, str]]:
    """Return ((2 * templates + 2, rows) uint32, reasons by row).

    The table's rows are text tokens and target tokens of each template, visual tokens, answers.
    """
    worker = _worker[0]
    if worker.index is None or worker.index.path != shard:
        worker.index = open_index(shard, worker.index_dir)
    table = np.zeros((2 * len(worker.recipe.templates) + 2, stop - start), np.uint32)
    reasons: dict[int, str] = {}
    rows = [row for row in range(start, stop) if row not in worker.index.reasons]
    for block in range(0, len(rows), READ_TOGETHER):
        some = rows[block : block + READ_TOGETHER]
        for row, sample in zip(some, _samples(worker, some), strict=True):
            try:
                if isinstance(sample, DataError):
                    raise sample
                sample.validate()
                table[:, row - start] = _measure(sample, worker.encoder, worker.recipe)
            except DataError as error:
                reasons[row] = str(error)
    return table, reasons


def _samples(worker: _Worker, rows: list[int]) -> list[Sample | DataError]:
    """Return the samples of some rows, without images where sizes follow from the record."""
    assert worker.index is not None
    if worker.encoder.images.keeps_size:
        return worker.index.read_records(rows)
    return worker.index.read_many(rows)


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
    num_answers = _num_answers(sample)
    return [*(text for text, _ in counts), *(n for _, n in counts), visual, num_answers]


def _num_answers(sample: Sample) -> int:
    messages = sample.messages or [{"role": "assistant"}]
    return sum(message.get("role") == "assistant" for message in messages)


def _cache_path(shard: str, mark: str, index_dir: str | None) -> str:
    return beside(shard, f".lengths-{mark}", index_dir)
