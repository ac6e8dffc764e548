"""Text metrics: CER, WER, character accuracy, exact match and confusions, with intervals.

Definitions (edits cost 1 each; a character is an extended grapheme cluster):
    CER micro = sum of errors / sum of reference characters (the headline; it may exceed 1)
    CER macro = mean over documents; a document without reference counts 0 if its hypothesis is
                empty too, else 1 (in the micro figure its characters are errors)
    WER       = the same over words (`normalize.words`)
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from train.metrics.align import edit_distance, edits
from train.metrics.intervals import Interval, bootstrap_ratio, ratio
from train.metrics.normalize import (
    DEFAULT_OPTIONS,
    NormalizeOptions,
    graphemes,
    normalize,
    words,
)

TOP_CONFUSIONS = 50


@dataclass(frozen=True)
class ErrorCounts:
    """Edits of one document and the length of its reference, in characters and in words."""

    character_errors: int
    characters: int
    word_errors: int
    words: int
    exact: bool

    @property
    def cer(self) -> float:
        """Character error rate; 1 if there are errors but no reference."""
        return ratio(self.character_errors, self.characters)

    @property
    def wer(self) -> float:
        """Word error rate; 1 if there are errors but no reference."""
        return ratio(self.word_errors, self.words)


@dataclass(frozen=True)
class ErrorRate:
    """An error rate over documents; `micro` carries the bootstrap interval."""

    micro: Interval
    macro: float
    median: float
    errors: int
    length: int


@dataclass(frozen=True)
class Confusion:
    """An edit and how often it occurred; an empty side means nothing (ε)."""

    reference: str
    hypothesis: str
    count: int


@dataclass(frozen=True)
class TextReport:
    """What `text_report` found; `dataclasses.asdict` of it is plain JSON."""

    options: NormalizeOptions
    num_documents: int
    num_groups: int
    seed: int
    cer: ErrorRate
    wer: ErrorRate
    character_accuracy: float
    exact_match: Interval
    confusions: tuple[Confusion, ...]


def count_errors(
    reference: str, hypothesis: str, options: NormalizeOptions = DEFAULT_OPTIONS
) -> ErrorCounts:
    """Return the edit counts of one document."""
    reference, hypothesis = normalize(reference, options), normalize(hypothesis, options)
    characters, reference_words = graphemes(reference), words(reference)
    return ErrorCounts(
        character_errors=edit_distance(characters, graphemes(hypothesis)),
        characters=len(characters),
        word_errors=edit_distance(reference_words, words(hypothesis)),
        words=len(reference_words),
        exact=reference == hypothesis,
    )


def confusions(
    references: Sequence[str],
    hypotheses: Sequence[str],
    options: NormalizeOptions = DEFAULT_OPTIONS,
    *,
    top: int | None = TOP_CONFUSIONS,
) -> tuple[Confusion, ...]:
    """Return the most frequent character edits, by falling count, ties in code point order."""
    counts: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        counts.update(
            edits(
                graphemes(normalize(reference, options)), graphemes(normalize(hypothesis, options))
            )
        )
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Confusion(ref, hyp, count) for (ref, hyp), count in ordered[:top])


def text_report(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    options: NormalizeOptions = DEFAULT_OPTIONS,
    seed: int = 0,
    top_confusions: int = TOP_CONFUSIONS,
) -> TextReport:
    """Compare hypotheses with references, document by document.

    Args:
        references: (documents,) what stands there.
        hypotheses: (documents,) what was read.
        groups: (documents,) unit of the bootstrap (document of a line, shop, writer); None: each
            text by itself.
        options: normalisation of both sides; recorded in the report.
        seed: of the bootstrap.
        top_confusions: how many confusions to keep.

    Raises:
        ValueError: if the lengths differ or there is no document.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    counts = [
        count_errors(reference, hypothesis, options)
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    cer = _error_rate(
        [c.character_errors for c in counts],
        [c.characters for c in counts],
        [c.cer for c in counts],
        groups,
        seed,
    )
    wer = _error_rate(
        [c.word_errors for c in counts],
        [c.words for c in counts],
        [c.wer for c in counts],
        groups,
        seed,
    )
    exact = [int(c.exact) for c in counts]
    return TextReport(
        options=options,
        num_documents=len(counts),
        num_groups=len(counts) if groups is None else len(set(groups)),
        seed=seed,
        cer=cer,
        wer=wer,
        character_accuracy=1 - cer.micro.value,
        exact_match=bootstrap_ratio(exact, np.ones(len(exact)), groups=groups, seed=seed),
        confusions=confusions(references, hypotheses, options, top=top_confusions),
    )


def _error_rate(
    errors: list[int],
    lengths: list[int],
    rates: list[float],
    groups: Sequence[Hashable] | None,
    seed: int,
) -> ErrorRate:
    return ErrorRate(
        micro=bootstrap_ratio(errors, lengths, groups=groups, seed=seed),
        macro=float(np.mean(rates)),
        median=float(np.median(rates)),
        errors=sum(errors),
        length=sum(lengths),
    )
