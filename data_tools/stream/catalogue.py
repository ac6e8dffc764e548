"""All shards of a source joined into one memory-mapped file, made once and opened by every process.

Indexes and lengths lie beside each shard, so that a new shard is measured alone. A run joins those
of a source into a catalogue: the columns that plan and read, the samples that are used, and what
happens to those that are longer than a pack. Its rows are the sample ids of the plan.

A data set may grow: shards that were added since the last start join at the next epoch. Each such
generation is kept, with the digest of the shards up to it, since earlier epochs go on without them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import BadDataShareError, DataError
from data_tools.examples.encode import ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.stream.columns import create_columns, open_columns
from data_tools.stream.fit import PATCHES_PER_VISUAL_TOKEN, Budgets, Fit, Policy, Question, fit
from data_tools.stream.index import ShardIndex, open_index
from data_tools.stream.lengths import Lengths, read_lengths

CATALOGUE_VERSION = "1"
MAX_REASONS = 10_000  # texts kept; the rest of the samples that are left out is only counted
MIN_SAMPLES = 1000  # a share of damaged samples means nothing before this many samples
NEVER_ASKED = "has an answer only for templates of weight 0"
USED, DAMAGED, UNUSABLE, TOO_LONG, NOT_SELECTED = range(5)
WHY = ("used", "damaged", "unusable", "longer than a pack", "not in the selected lengths")


@dataclass(frozen=True)
class Selection:
    """Which samples of the shards are used, and how long ones are made to fit.

    Attributes:
        budgets: of a pack.
        min_chars: samples with less annotated text are left out.
        max_chars: and those with more; None: no limit.
        too_long: what may be done to a sample that exceeds the budgets, in order of preference.
        max_damaged_share: more damaged samples than this share stop the run.
    """

    budgets: Budgets
    min_chars: int = 0
    max_chars: int | None = None
    too_long: tuple[Policy, ...] = ("shrink",)
    max_damaged_share: float = 1.0


@dataclass(frozen=True)
class Generation:
    """Shards of a source from an epoch on: the first `num_shards` of the catalogue."""

    first_epoch: int
    num_shards: int
    digest: str


@dataclass(frozen=True)
class Joined:
    """What a source is made of before it is written: its shards, and what is used of them.

    Attributes:
        indexes: of the shards, in the order of the catalogue.
        lengths: of their samples.
        status: per shard (rows,) uint8, USED or why a sample is left out.
        answerable: per shard (templates, rows) bool.
        fits: (row over all shards, template) -> how a long sample is made to fit.
    """

    indexes: list[ShardIndex]
    lengths: list[Lengths]
    status: list[np.ndarray] = field(default_factory=list)
    answerable: list[np.ndarray] = field(default_factory=list)
    fits: dict[tuple[int, int], Fit] = field(default_factory=dict)

    @property
    def first_row(self) -> np.ndarray:
        """(shards + 1,) int64, the first row of each shard."""
        return np.cumsum([0, *(len(index) for index in self.indexes)])


def make_catalogue(
    path: Path,
    shards: list[str],
    mark: str,
    recipe: Recipe,
    images: ImageSettings,
    selection: Selection,
    *,
    next_epoch: int | None = None,
    index_dir: str | None = None,
) -> None:
    """Write the catalogue of a source whose lengths have been made; the same one is left alone.

    Args:
        path: of the catalogue.
        shards: paths or URLs.
        mark: fingerprint of the lengths.
        recipe: the run's questions.
        images: the run's page preparation.
        selection: which samples are used.
        next_epoch: of a run that has begun: the first epoch that new shards may join. None: the run
            has not begun, and its shards are whatever is there.
        index_dir: where the indexes and lengths lie, if not beside the shards.

    Raises:
        DataError: if nothing usable remains, or a shard of a run that has begun is gone.
        BadDataShareError: if more samples are damaged than `selection` allows.
    """
    indexes = {shard: open_index(shard, index_dir) for shard in shards}
    before = _history(path) if next_epoch is not None else []
    order, generations = _grow(before, indexes, next_epoch or 0)
    settings = _digest([mark, recipe.to_json(), repr(selection), index_dir])
    places = [_place(indexes[shard]) for shard in order]
    if _is_made(path, settings, places, generations):
        return
    joined = Joined(
        [indexes[shard] for shard in order],
        [read_lengths(indexes[shard], mark, index_dir) for shard in order],
    )
    _select(joined, recipe, images, selection)
    left_out = _left_out(joined)
    _check_shares(joined, left_out, selection)
    metadata = {
        "version": CATALOGUE_VERSION,
        "settings": settings,
        "shards": json.dumps(places),
        "generations": json.dumps([vars(generation) for generation in generations]),
        "recipe": json.dumps(recipe.to_json()),
        "left_out": json.dumps(left_out),
        "reasons": json.dumps(dict(_reasons(joined)), ensure_ascii=False),
        "duplicates": json.dumps(_duplicates(joined)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_columns(path, _specs(joined), metadata) as columns:
        _fill(columns, joined)


def _grow(
    before: list[tuple[str, str, list[Generation]]],
    indexes: dict[str, ShardIndex],
    next_epoch: int,
) -> tuple[list[str], list[Generation]]:
    """Return the shards in the catalogue's order, the known ones first, and the generations."""
    known = [shard for shard, _, _ in before]
    for shard, identity, _ in before:
        if shard not in indexes or indexes[shard].identity != identity:
            what = "has been changed" if shard in indexes else "is gone"
            raise DataError(
                f"{shard} {what} since the run began. Shards may be added to a run, not taken "
                "away: put it back, or take a fresh run.dir"
            )
    generations = list(before[0][2]) if before else []
    order = known + [shard for shard in indexes if shard not in set(known)]
    if len(order) > len(known):
        # One that has not begun yet stays in the list: a checkpoint may name its digest.
        first_epoch = max(next_epoch, generations[-1].first_epoch) if generations else 0
        # Cursors count the draws of epochs that grew, so what tells two of them apart is not the
        # shards alone but when each joined.
        joined = [[g.first_epoch, g.num_shards] for g in generations] + [[first_epoch, len(order)]]
        digest = _digest([joined, [indexes[shard].identity for shard in order]])
        generations.append(Generation(first_epoch, len(order), digest))
    return order, generations


def _history(path: Path) -> list[tuple[str, str, list[Generation]]]:
    """Return (shard, identity, generations) of the catalogue that is there, if there is one."""
    if not path.exists():
        return []
    _, metadata = open_columns(path)
    generations = [Generation(**record) for record in json.loads(metadata["generations"])]
    return [(shard, mark, generations) for shard, mark, *_ in json.loads(metadata["shards"])]


def _is_made(
    path: Path, settings: str, places: list[list[str]], generations: list[Generation]
) -> bool:
    if not path.exists():
        return False
    _, metadata = open_columns(path)
    return (
        metadata.get("version") == CATALOGUE_VERSION
        and metadata["settings"] == settings
        and json.loads(metadata["shards"]) == places
        and json.loads(metadata["generations"]) == [vars(g) for g in generations]
    )


def _place(index: ShardIndex) -> list[str]:
    """Return what the catalogue says of a shard (`source.ShardName`)."""
    return [index.path, index.identity, index.version, index.damage]


def _select(joined: Joined, recipe: Recipe, images: ImageSettings, selection: Selection) -> None:
    """Decide about every sample: used, with which templates, made to fit, or left out and why."""
    budgets = selection.budgets
    first_row = joined.first_row
    has_weight = np.asarray(recipe.weights)[:, None] > 0
    for number, (index, lengths) in enumerate(zip(joined.indexes, joined.lengths, strict=True)):
        visual = lengths.visual.astype(np.int64)
        answered = (lengths.text > 0) & has_weight
        fits_alone = (lengths.text + visual <= budgets.tokens) & (
            PATCHES_PER_VISUAL_TOKEN * visual <= budgets.patches
        )
        answerable = answered & fits_alone
        for template, row in np.argwhere(answered & ~fits_alone).tolist():
            found = fit(
                _question(index, lengths, template, row), budgets, images, selection.too_long
            )
            if found is not None:
                answerable[template, row] = True
                joined.fits[int(first_row[number]) + row, template] = found
        status = np.full(len(index), USED, np.uint8)
        chars = index.num_chars.astype(np.int64)
        limit = np.iinfo(np.int64).max if selection.max_chars is None else selection.max_chars
        status[(chars < selection.min_chars) | (chars > limit)] = NOT_SELECTED
        status[answered.any(axis=0) & ~answerable.any(axis=0)] = TOO_LONG
        status[~answered.any(axis=0)] = UNUSABLE
        status[list(index.reasons)] = DAMAGED
        joined.status.append(status)
        joined.answerable.append(answerable)


def _question(index: ShardIndex, lengths: Lengths, template: int, row: int) -> Question:
    pages = range(int(index.first_image[row]), int(index.first_image[row + 1]))
    return Question(
        int(lengths.text[template, row]),
        int(lengths.targets[template, row]),
        int(lengths.visual[row]),
        int(lengths.answers[row]),
        tuple((int(index.image_wh[i, 1]), int(index.image_wh[i, 0])) for i in pages),
    )


def _left_out(joined: Joined) -> dict[str, tuple[int, str]]:
    """Return why samples are not used -> (how many, the first one's key and reason)."""
    left_out: dict[str, tuple[int, str]] = {}
    for index, lengths, status in zip(joined.indexes, joined.lengths, joined.status, strict=True):
        for why in range(1, len(WHY)):
            rows = np.flatnonzero(status == why)
            if not len(rows):
                continue
            first = int(rows[0])
            reason = _reason(index, lengths, first, why)
            example = f"{index.keys[first]}: {reason}" if reason else index.keys[first]
            count, known = left_out.get(WHY[why], (0, example))
            left_out[WHY[why]] = (count + len(rows), known)
    return left_out


def _reasons(joined: Joined) -> Iterator[tuple[int, str]]:
    """Yield (sample id, reason) of samples that are left out for more than their length."""
    num_told = 0
    for start, index, lengths, status in zip(
        joined.first_row, joined.indexes, joined.lengths, joined.status, strict=False
    ):
        for row in np.flatnonzero((status == DAMAGED) | (status == UNUSABLE)).tolist():
            if num_told == MAX_REASONS:
                return
            num_told += 1
            yield int(start) + row, _reason(index, lengths, row, int(status[row]))


def _reason(index: ShardIndex, lengths: Lengths, row: int, why: int) -> str:
    if why == DAMAGED:
        return index.reasons[row]
    return lengths.reasons.get(row, NEVER_ASKED) if why == UNUSABLE else ""


def _check_shares(
    joined: Joined, left_out: dict[str, tuple[int, str]], selection: Selection
) -> None:
    total = sum(len(status) for status in joined.status)
    if not any((status == USED).any() for status in joined.status):
        place = joined.indexes[0].path if joined.indexes else "no shard"
        raise DataError(f"none of the {total} samples of {place} ... is usable: {left_out}")
    # A shard that is cut off has lost samples that nobody can count: at least one.
    cut = [index for index in joined.indexes if index.damage]
    count, first = left_out.get(WHY[DAMAGED], (0, ""))
    if (count + len(cut)) / max(total, MIN_SAMPLES) > selection.max_damaged_share:
        example = first or f"{cut[0].path}: {cut[0].damage}"
        raise BadDataShareError(
            f"{count} of {total} samples are damaged and {len(cut)} shards cut off, more than "
            f"data.max_hole_share = {selection.max_damaged_share}; the first: {example}. "
            "`python -m data_tools.check SHARDS` lists all of them"
        )


def _duplicates(joined: Joined) -> tuple[int, str]:
    """Return how many samples share their key with an earlier one, and the first such key."""
    if not joined.indexes:
        return 0, ""
    hashes = np.concatenate(
        [np.fromiter(map(hash, index.keys), np.int64, len(index)) for index in joined.indexes]
    )
    _, first = np.unique(hashes, return_index=True)
    count = len(hashes) - len(first)
    if not count:
        return 0, ""
    is_first = np.zeros(len(hashes), bool)
    is_first[first] = True
    row = int(np.argmin(is_first))
    shard = int(np.searchsorted(joined.first_row, row, side="right")) - 1
    return count, joined.indexes[shard].keys[row - int(joined.first_row[shard])]


def _specs(joined: Joined) -> dict[str, tuple[str, tuple[int, ...]]]:
    num_shards, num_rows = len(joined.indexes), int(joined.first_row[-1])
    num_images = sum(len(index.image_wh) for index in joined.indexes)
    num_used = sum(int((status == USED).sum()) for status in joined.status)
    templates = len(joined.lengths[0].text) if joined.lengths else 0
    num_fits = len({row for row, _ in joined.fits})
    return {
        "first_row": ("int64", (num_shards + 1,)),
        "first_used": ("int64", (num_shards + 1,)),
        "used": ("uint32", (num_used,)),
        "status": ("uint8", (num_rows,)),
        "offset": ("uint64", (num_rows,)),
        "size": ("uint32", (num_rows,)),
        "crc32": ("uint32", (num_rows,)),
        "kind": ("uint8", (num_rows,)),
        "json_start": ("uint32", (num_rows,)),
        "json_size": ("uint32", (num_rows,)),
        "first_image": ("int64", (num_rows + 1,)),
        "image_start": ("uint32", (num_images,)),
        "image_size": ("uint32", (num_images,)),
        "image_wh": ("uint32", (num_images, 2)),
        "key_end": ("uint64", (num_rows + 1,)),
        "keys": ("uint8", (sum(len(index.keys.blob) for index in joined.indexes),)),
        "text": ("uint32", (templates, num_rows)),
        "targets": ("uint32", (templates, num_rows)),
        "visual": ("uint32", (num_rows,)),
        "answerable": ("bool", (templates, num_rows)),
        "fit_row": ("uint32", (num_fits,)),
        "fit": ("uint32", (num_fits, templates, len(Fit._fields))),
    }


def _fill(columns: dict[str, np.ndarray], joined: Joined) -> None:
    row, image, used, key = 0, 0, 0, 0
    for number, (index, lengths) in enumerate(zip(joined.indexes, joined.lengths, strict=True)):
        status = joined.status[number]
        rows, images = slice(row, row + len(index)), slice(image, image + len(index.image_wh))
        for name in ("offset", "size", "crc32", "kind", "json_start", "json_size"):
            columns[name][rows] = getattr(index, name)
        for name in ("image_start", "image_size", "image_wh"):
            columns[name][images] = getattr(index, name)
        columns["first_image"][row + 1 : rows.stop + 1] = image + index.first_image[1:]
        blob = np.frombuffer(index.keys.blob, np.uint8)
        columns["keys"][key : key + len(blob)] = blob
        columns["key_end"][row + 1 : rows.stop + 1] = key + index.keys.ends
        for name in ("text", "targets"):
            columns[name][:, rows] = getattr(lengths, name)
        columns["visual"][rows] = lengths.visual
        columns["answerable"][:, rows] = joined.answerable[number]
        columns["status"][rows] = status
        chosen = np.flatnonzero(status == USED) + row
        columns["used"][used : used + len(chosen)] = chosen
        row, image, used, key = rows.stop, images.stop, used + len(chosen), key + len(blob)
        columns["first_row"][number + 1] = row
        columns["first_used"][number + 1] = used
    places = {r: i for i, r in enumerate(sorted({r for r, _ in joined.fits}))}
    columns["fit_row"][:] = list(places)
    for (fit_row, template), found in joined.fits.items():
        columns["fit"][places[fit_row], template] = found


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
