"""Bootstrap intervals of ratios of sums, over documents or groups of documents.

All headline figures here are ratios of sums over documents (CER: errors / characters; F1: twice the
hits / predicted + reference), so a resample is a vector of counts and a figure is two products.
Documents are resampled, never lines or characters, which are not independent; with groups (shops,
writers) whole groups are.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000
LEVEL = 0.95

_CHUNK_CELLS = 4_000_000  # cells of one block of resampling counts: 32 MB

Values = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class Interval:
    """A point estimate with its percentile bootstrap interval."""

    value: float
    low: float
    high: float
    level: float = LEVEL
    resamples: int = RESAMPLES

    @property
    def excludes_zero(self) -> bool:
        """Whether a paired difference may be called one: 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def ratio(numerator: float, denominator: float) -> float:
    """Return numerator / denominator; over nothing: 0 for nothing, else 1."""
    if denominator == 0:
        return 0.0 if numerator == 0 else 1.0
    return float(numerator) / float(denominator)


def bootstrap_ratio(
    numerators: Values,
    denominators: Values,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Return sum(numerators) / sum(denominators) and its interval.

    Args:
        numerators: (documents,) for instance errors.
        denominators: (documents,) for instance reference characters.
        groups: (documents,) group of each document; None: each is a group of its own.
        seed: of the resampling.
        resamples: number of resamples.
        level: share of the resamples inside the interval.

    Raises:
        ValueError: if the lengths differ or there is no document.
    """
    sums = _group_sums([numerators, denominators], groups)
    draws = np.concatenate([_ratios(*block) for block in _resample(sums, seed, resamples)])
    point = ratio(float(sums[0].sum()), float(sums[1].sum()))
    return _interval(point, draws, level)


def paired_difference(
    numerators_a: Values,
    numerators_b: Values,
    denominators: Values,
    *,
    denominators_b: Values | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Return ratio of system A minus ratio of system B on the same documents, resampled together.

    "A is better" may be said only if the interval excludes 0. Arguments as in `bootstrap_ratio`;
    `denominators_b` where they differ between the systems (field F1).
    """
    other = denominators if denominators_b is None else denominators_b
    sums = _group_sums([numerators_a, numerators_b, denominators, other], groups)
    draws = [_ratios(a, da) - _ratios(b, db) for a, b, da, db in _resample(sums, seed, resamples)]
    totals = [float(column.sum()) for column in sums]
    point = ratio(totals[0], totals[2]) - ratio(totals[1], totals[3])
    return _interval(point, np.concatenate(draws), level)


def relative_error_reduction(
    errors_a: Values,
    errors_b: Values,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Return 1 - CER_a / CER_b of two systems on the same documents (the lengths cancel)."""
    sums = _group_sums([errors_a, errors_b], groups)
    draws = np.concatenate([1 - _ratios(*block) for block in _resample(sums, seed, resamples)])
    point = 1 - ratio(float(sums[0].sum()), float(sums[1].sum()))
    return _interval(point, draws, level)


def _group_sums(columns: list[Values], groups: Sequence[Hashable] | None) -> list[np.ndarray]:
    """Sum each (documents,) column within its groups, in order of first appearance."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    number = len(arrays[0])
    if number == 0:
        raise ValueError("a bootstrap needs at least one document")
    lengths = [len(array) for array in arrays] + ([] if groups is None else [len(groups)])
    if any(length != number for length in lengths):
        raise ValueError(f"a bootstrap needs columns of one length, got {lengths}")
    if groups is None:
        return arrays
    order: dict[Hashable, int] = {}
    index = [order.setdefault(group, len(order)) for group in groups]
    return [np.bincount(index, weights=array) for array in arrays]


def _resample(
    columns: list[np.ndarray], seed: int, resamples: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the sum of every column in blocks of resamples, the same draws for all columns."""
    generator = np.random.default_rng(seed)
    number = len(columns[0])
    shares = np.full(number, 1 / number)
    block = max(1, _CHUNK_CELLS // number)
    for start in range(0, resamples, block):
        counts = generator.multinomial(number, shares, size=min(block, resamples - start))
        yield tuple(counts @ column for column in columns)


def _ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    empty = denominators == 0
    safe = np.where(empty, 1.0, denominators)
    return np.where(empty, (numerators != 0).astype(np.float64), numerators / safe)


def _interval(point: float, draws: np.ndarray, level: float) -> Interval:
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(point, float(low), float(high), level, len(draws))
