"""End-to-end accuracy of boxed lines: found (IoU >= 0.5) and read exactly."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from train.metrics.fields import Scores
from train.metrics.intervals import Interval, bootstrap_ratio
from train.metrics.normalize import DEFAULT_OPTIONS, NormalizeOptions, normalize

IOU_THRESHOLD = 0.5

Box = tuple[float, float, float, float]
Line = tuple[Box, str]


@dataclass(frozen=True)
class LineReport:
    """What `line_report` found: lines found by their box alone, and found and read exactly."""

    options: NormalizeOptions
    num_documents: int
    detection: Scores
    end_to_end: Scores
    f1: Interval


def line_report(
    reference_lines: Sequence[Sequence[Line]],
    predicted_lines: Sequence[Sequence[Line]],
    *,
    groups: Sequence[Hashable] | None = None,
    options: NormalizeOptions = DEFAULT_OPTIONS,
    seed: int = 0,
) -> LineReport:
    """Compare predicted with reference lines, document by document.

    Args:
        reference_lines: per document, (box, text) of each line; boxes xyxy in pixels.
        predicted_lines: the same as predicted, in the same pixels.
        groups: (documents,) unit of the bootstrap; None: each document by itself.
        options: normalisation of the texts.
        seed: of the bootstrap.

    Raises:
        ValueError: if the lengths differ or there is no document.
    """
    found, right, sizes = [], [], []
    for reference, predicted in zip(reference_lines, predicted_lines, strict=True):
        pairs = match_boxes([box for box, _ in reference], [box for box, _ in predicted])
        found.append(len(pairs))
        right.append(
            sum(
                normalize(reference[i][1], options) == normalize(predicted[j][1], options)
                for i, j in pairs
            )
        )
        sizes.append((len(predicted), len(reference)))
    num_predicted = sum(size[0] for size in sizes)
    num_reference = sum(size[1] for size in sizes)
    twice_right = [2 * count for count in right]
    both = [sum(size) for size in sizes]
    return LineReport(
        options=options,
        num_documents=len(sizes),
        detection=Scores.of(sum(found), num_predicted, num_reference),
        end_to_end=Scores.of(sum(right), num_predicted, num_reference),
        f1=bootstrap_ratio(twice_right, both, groups=groups, seed=seed),
    )


def match_boxes(
    reference: Sequence[Box], predicted: Sequence[Box], threshold: float = IOU_THRESHOLD
) -> list[tuple[int, int]]:
    """Return (reference, predicted) index pairs of the assignment with the largest sum of IoU.

    Pairs below the threshold never match. Each box is used once.
    """
    if not reference or not predicted:
        return []
    table = iou_table(np.asarray(reference, float), np.asarray(predicted, float))
    table = np.where(table >= threshold, table, 0.0)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if table[i, j] > 0]


def iou_table(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (N, M) intersection over union of boxes (N, 4) and (M, 4), xyxy; 0 if both empty."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=-1)  # (N, M)
    areas = [
        np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=-1) for boxes in (first, second)
    ]
    union = areas[0][:, None] + areas[1][None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
