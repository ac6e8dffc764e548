"""Is a confidence worth anything: calibration error, and the error rate of what is kept."""

from collections.abc import Sequence

import numpy as np

NUM_BINS = 10
COVERAGES = (0.90, 0.95, 0.99)


def expected_calibration_error(
    confidences: Sequence[float], right: Sequence[bool], *, num_bins: int = NUM_BINS
) -> float:
    """Return the mean |accuracy - confidence| over bins of equal count, weighted by their count.

    Args:
        confidences: (items,) in [0, 1].
        right: (items,) whether each was right.
        num_bins: number of bins; fewer where there are fewer items.

    Raises:
        ValueError: if the lengths differ or there is no item.
    """
    scores, hits = _sorted(confidences, right, descending=False)
    bins = np.array_split(np.arange(len(scores)), min(num_bins, len(scores)))
    gaps = [abs(hits[b].mean() - scores[b].mean()) * len(b) for b in bins]
    return float(sum(gaps) / len(scores))


def error_at_coverage(
    confidences: Sequence[float],
    right: Sequence[bool],
    *,
    coverages: Sequence[float] = COVERAGES,
) -> dict[float, float]:
    """Return coverage -> error rate of the most confident items that make up this share.

    Raises:
        ValueError: if the lengths differ, there is no item, or a coverage is not in (0, 1].
    """
    _, hits = _sorted(confidences, right, descending=True)
    if not all(0 < coverage <= 1 for coverage in coverages):
        raise ValueError(f"coverages must lie in (0, 1], got {list(coverages)}")
    kept = {coverage: max(1, round(coverage * len(hits))) for coverage in coverages}
    return {coverage: float(1 - hits[:count].mean()) for coverage, count in kept.items()}


def _sorted(
    confidences: Sequence[float], right: Sequence[bool], *, descending: bool
) -> tuple[np.ndarray, np.ndarray]:
    if len(confidences) != len(right) or not len(right):
        raise ValueError(f"{len(confidences)} confidences for {len(right)} items")
    scores, hits = np.asarray(confidences, float), np.asarray(right, float)
    order = np.argsort(-scores if descending else scores, kind="stable")
    return scores[order], hits[order]
