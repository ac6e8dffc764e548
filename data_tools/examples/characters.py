"""Character weights: how much the loss minds each character of an answer (`char_prior`).

A token's weight is the mean, over its bytes, of the weight of the character that each byte belongs
to; a character is an extended grapheme cluster. Weights are divided by their mean over all label
tokens of the training index, so that learning rates keep their meaning and a sample's weight does
not depend on its neighbours.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import regex

from data_tools.examples.tasks import Span

GRAPHEME = regex.compile(r"\X")
# Digits, separators and signs inside amounts, dates and codes.
CRITICAL = regex.compile(r"\p{N}|(?<=\p{N})[.,:/\-](?=\p{N})|[\p{Sc}%](?=\s?\p{N})|(?<=\p{N})%")

RARITY_RANGE = (0.5, 3.0)
WEIGHT_RANGE = (0.25, 4.0)


@dataclass(frozen=True)
class CharPriorSettings:
    """The parts of `char_prior`, each switched off by 0 (or an empty table).

    Attributes:
        rarity: exponent a of (f_med / f(c)) ** a.
        critical: gain g of digits and separators inside amounts, dates and codes.
        fields: factor by annotation category.
    """

    rarity: float = 0.25
    critical: float = 0.5
    fields: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CharPrior:
    """Character weights with the tables that a training index gave them.

    Attributes:
        settings: which parts are on.
        counts: grapheme -> how often it stands in the training labels.
        mean: mean token weight over the training index, by which every weight is divided.
    """

    settings: CharPriorSettings
    counts: dict[str, int]
    mean: float = 1.0

    def character_weights(self, span: Span) -> list[tuple[str, float]]:
        """Return (grapheme, weight before normalisation) for a span, in reading order."""
        if span.is_markup:
            return [(grapheme, 1.0) for grapheme in GRAPHEME.findall(span.text)]
        critical = {match.start() for match in CRITICAL.finditer(span.text)}
        factor = self.settings.fields.get(span.category or "", 1.0)
        weighted = []
        for match in GRAPHEME.finditer(span.text):
            weight = self._rarity(match.group()) * factor
            if match.start() in critical:
                weight *= 1 + self.settings.critical
            weighted.append((match.group(), float(np.clip(weight, *WEIGHT_RANGE))))
        return weighted

    def _rarity(self, grapheme: str) -> float:
        count = self.counts.get(grapheme, 1)
        ratio = (self._median_count / count) ** self.settings.rarity
        return float(np.clip(ratio, *RARITY_RANGE))

    @property
    def _median_count(self) -> float:
        """The token-weighted median: half of all characters are at most this frequent."""
        cached = self.__dict__.get("_median")
        if cached is None:
            ordered = np.sort(np.fromiter(self.counts.values(), np.int64))
            half = np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)
            cached = float(ordered[half]) if len(ordered) else 1.0
            object.__setattr__(self, "_median", cached)
        return cached


def count_characters(answers: Iterable[Sequence[Span]]) -> dict[str, int]:
    """Count the graphemes of answers, markup left out."""
    counts: Counter[str] = Counter()
    for spans in answers:
        for span in spans:
            if not span.is_markup:
                counts.update(GRAPHEME.findall(span.text))
    return dict(counts)


def token_weights(
    spans: Sequence[Span], offsets: Sequence[tuple[int, int]], prior: CharPrior | None
) -> np.ndarray:
    """Return the loss weight of each token of an answer.

    Args:
        spans: the answer, in pieces.
        offsets: (start, end) in characters (code points) of the whole answer, for each token.
        prior: None weighs every character alike; a span's own weight always counts.

    Returns:
        (tokens,) float32.
    """
    weights, sizes = [], []
    for span in spans:
        weighted = [(span.text, 1.0)] if prior is None else prior.character_weights(span)
        for piece, weight in weighted:
            weights += [weight * span.weight] * len(piece)
            sizes += [len(character.encode("utf-8", "surrogatepass")) for character in piece]
    size = np.concatenate([[0.0], np.cumsum(np.asarray(sizes, np.float64))])
    total = np.concatenate([[0.0], np.cumsum(np.asarray(weights) * np.asarray(sizes))])
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mean = (total[ends] - total[starts]) / np.maximum(size[ends] - size[starts], 1)
    return (mean / (prior.mean if prior else 1.0)).astype(np.float32)
