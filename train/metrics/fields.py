"""Field metrics: precision, recall and F1 of (name, value) pairs, typed values, ANLS, accuracy.

A predicted pair is right if the reference holds that name with the equal normalised value, each
reference value used once, so lists are multisets. An absent name (missing, null, empty) does not
count on either side. ANLS of a value is s = 1 - NL if NL < 0.5 else 0, with NL = edit distance /
length of the longer one (Biten et al., 2019); values of a list are assigned to one another so that
the sum of s is largest and divided by the longer list's length.
"""

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from train.metrics.align import edit_distance
from train.metrics.intervals import Interval, bootstrap_ratio, ratio
from train.metrics.normalize import (
    DEFAULT_OPTIONS,
    NormalizeOptions,
    graphemes,
    normalize,
    typed_value,
)
from train.metrics.trees import tree_edit_accuracy

Fields = Mapping[str, Any]
_ANLS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Scores:
    """Precision, recall and F1 with the counts behind them; of nothing at all each is 0."""

    precision: float
    recall: float
    f1: float
    right: int
    predicted: int
    reference: int

    @classmethod
    def of(cls, right: int, predicted: int, reference: int) -> "Scores":
        """Compute the three figures from the counts."""
        return cls(
            precision=ratio(right, predicted),
            recall=ratio(right, reference),
            f1=ratio(2 * right, predicted + reference),
            right=right,
            predicted=predicted,
            reference=reference,
        )


@dataclass(frozen=True)
class FieldScores:
    """Scores of one field over all documents."""

    strict: Scores
    typed: Scores
    anls: float


@dataclass(frozen=True)
class FieldReport:
    """What `field_report` found; `dataclasses.asdict` of it is plain JSON.

    Attributes:
        options: normalisation of values.
        num_documents: documents compared.
        num_unreadable: predictions that were no valid JSON object (None).
        strict: micro scores of equal normalised values.
        typed: micro scores with amounts and dates compared by meaning.
        f1: strict F1 with its interval.
        anls: mean over all fields of the references.
        tree_edit_accuracy: mean over documents (`trees.tree_edit_accuracy`).
        e2e_accuracy: share of documents with every field right and none invented, with interval.
        e2e_accuracy_typed: the same with typed values.
        per_field: name -> scores.
    """

    options: NormalizeOptions
    num_documents: int
    num_unreadable: int
    strict: Scores
    typed: Scores
    f1: Interval
    anls: float
    tree_edit_accuracy: float
    e2e_accuracy: Interval
    e2e_accuracy_typed: Interval
    per_field: dict[str, FieldScores]


def field_report(
    reference_fields: Sequence[Fields],
    predicted_fields: Sequence[Fields | None],
    *,
    groups: Sequence[Hashable] | None = None,
    options: NormalizeOptions = DEFAULT_OPTIONS,
    day_first: bool = True,
    seed: int = 0,
) -> FieldReport:
    """Compare predicted with reference fields, document by document.

    Args:
        reference_fields: (documents,) name -> text, list of texts or None.
        predicted_fields: (documents,) the same; None: the output was no JSON object.
        groups: (documents,) unit of the bootstrap; None: each document by itself.
        options: normalisation of values on both sides.
        day_first: how the typed comparison reads 02/01/2019.
        seed: of the bootstrap.

    Raises:
        ValueError: if the lengths differ or there is no document.
    """
    if len(reference_fields) != len(predicted_fields):
        raise ValueError(
            f"{len(reference_fields)} references but {len(predicted_fields)} predictions"
        )
    pairs = [
        (_values(reference), _values(predicted or {}))
        for reference, predicted in zip(reference_fields, predicted_fields, strict=True)
    ]
    strict = _Matches(pairs, lambda text: normalize(text, options))
    typed = _Matches(pairs, lambda text: typed_value(text, options, day_first=day_first))
    anls = _anls_by_name(pairs, options)
    all_anls = [score for scores in anls.values() for score in scores]
    trees = [
        tree_edit_accuracy(reference, predicted or {}, options)
        for reference, predicted in zip(reference_fields, predicted_fields, strict=True)
    ]
    counts = np.array(strict.per_document).reshape(-1, 3)
    sizes = counts[:, 1] + counts[:, 2]
    ones = np.ones(len(pairs))
    return FieldReport(
        options=options,
        num_documents=len(pairs),
        num_unreadable=sum(predicted is None for predicted in predicted_fields),
        strict=strict.scores(),
        typed=typed.scores(),
        f1=bootstrap_ratio(2 * counts[:, 0], sizes, groups=groups, seed=seed),
        anls=float(np.mean(all_anls)) if all_anls else 0.0,
        tree_edit_accuracy=float(np.mean(trees)),
        e2e_accuracy=bootstrap_ratio(strict.all_right(), ones, groups=groups, seed=seed),
        e2e_accuracy_typed=bootstrap_ratio(typed.all_right(), ones, groups=groups, seed=seed),
        per_field={
            name: FieldScores(
                strict.scores(name), typed.scores(name), float(np.mean(anls.get(name, [0.0])))
            )
            for name in sorted(strict.by_name)
        },
    )


def anls_score(
    reference: str, hypothesis: str, options: NormalizeOptions = DEFAULT_OPTIONS
) -> float:
    """Return the normalised Levenshtein similarity of two values, 0 below one half."""
    first = graphemes(normalize(reference, options))
    second = graphemes(normalize(hypothesis, options))
    distance = ratio(edit_distance(first, second), max(len(first), len(second)))
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0


class _Matches:
    """Right, predicted and reference values, per document and per name, under one normalisation."""

    def __init__(
        self,
        pairs: Sequence[tuple[dict[str, list[str]], dict[str, list[str]]]],
        key: Callable[[str], str],
    ) -> None:
        self.per_document: list[tuple[int, int, int]] = []
        self.by_name: dict[str, list[int]] = {}
        for reference, predicted in pairs:
            total = [0, 0, 0]
            for name in sorted(reference.keys() | predicted.keys()):
                expected = Counter(map(key, reference.get(name, [])))
                found = Counter(map(key, predicted.get(name, [])))
                counts = ((expected & found).total(), found.total(), expected.total())
                per_name = self.by_name.setdefault(name, [0, 0, 0])
                for position, count in enumerate(counts):
                    total[position] += count
                    per_name[position] += count
            self.per_document.append((total[0], total[1], total[2]))

    def scores(self, name: str | None = None) -> Scores:
        """Return the micro scores over all names, or over one."""
        if name is not None:
            right, predicted, reference = self.by_name[name]
            return Scores.of(right, predicted, reference)
        return Scores.of(*(sum(document[i] for document in self.per_document) for i in range(3)))

    def all_right(self) -> list[int]:
        """Return 1 for each document whose values all match and that invents none, else 0."""
        return [int(right == found == expected) for right, found, expected in self.per_document]


def _anls_by_name(
    pairs: Sequence[tuple[dict[str, list[str]], dict[str, list[str]]]], options: NormalizeOptions
) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for reference, predicted in pairs:
        for name, expected in reference.items():
            score = _anls_of_lists(expected, predicted.get(name, []), options)
            scores.setdefault(name, []).append(score)
    return scores


def _anls_of_lists(expected: list[str], found: list[str], options: NormalizeOptions) -> float:
    if not found:
        return 0.0
    table = np.array([[anls_score(e, f, options) for f in found] for e in expected])
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum()) / max(len(expected), len(found))


def _values(fields: Fields) -> dict[str, list[str]]:
    """Return name -> texts without what counts as absent."""
    texts = {name: _texts(value) for name, value in fields.items()}
    return {name: values for name, values in texts.items() if values}


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if value is None:
        return []
    if not isinstance(value, str):  # a number or an object that the model wrote unquoted
        value = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return [value] if value.strip() else []
