"""Character weights of the loss: golden values, worked by hand."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.examples.characters import (
    CharPrior,
    CharPriorSettings,
    count_characters,
    token_weights,
)
from data_tools.examples.encode import Encoder
from data_tools.examples.tasks import Span, Turn

# Sorted counts 1, 2, 5, 8, 16; 32 characters; the 16th is one of the sixteen "a": median 8 or 16?
COUNTS = {"z": 1, "é": 2, "发": 5, "b": 8, "a": 16}
MEDIAN = 8.0  # cumulative 1, 3, 8, 16, 32: half of the characters is reached with "b"


def rarity(count: int, exponent: float = 0.25) -> float:
    return min(max((MEDIAN / count) ** exponent, 0.5), 3.0)


def prior(
    rare: float = 0.25, critical: float = 0.5, mean: float = 1.0, **fields: float
) -> CharPrior:
    return CharPrior(CharPriorSettings(rare, critical, fields), COUNTS, mean)


def weights_of(span: Span, table: CharPrior) -> list[float]:
    return [weight for _, weight in table.character_weights(span)]


def byte_weights(spans: list[Span], table: CharPrior | None) -> list[float]:
    """Return weights where every byte is a token whose offsets are those of its character."""
    text = "".join(span.text for span in spans)
    offsets = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode("utf-8")]
    return token_weights(spans, offsets, table).tolist()


def test_rarity_is_a_clipped_power_of_the_median_over_the_count() -> None:
    expected = [rarity(16), rarity(8), rarity(1), rarity(1)]
    assert weights_of(Span("abzq"), prior()) == pytest.approx(expected)
    assert rarity(8) == 1.0 and rarity(16) == pytest.approx(0.5**0.25)
    steep = prior(rare=3.0)
    assert weights_of(Span("az"), steep) == [0.5, 3.0]


def test_parts_are_off_at_zero() -> None:
    assert weights_of(Span("az1"), prior(0, 0)) == [1.0, 1.0, 1.0]


def test_without_counts_every_character_is_alike() -> None:
    empty = CharPrior(CharPriorSettings(critical=0), {})
    assert weights_of(Span("ab"), empty) == [1.0, 1.0]


@pytest.mark.parametrize(
    "text, critical",
    [
        ("12.50", "12.50"),
        ("2019-03-01", "2019-03-01"),
        ("10:45", "10:45"),
        ("$ 5", "$5"),
        ("$5", "$5"),
        ("6%", "6%"),
        ("a.b, c-d", ""),
        ("1. Item", "1"),
        ("end.", ""),
        ("一二", ""),
    ],
)
def test_digits_and_the_signs_of_amounts_and_dates_are_critical(text: str, critical: str) -> None:
    weighted = prior(rare=0).character_weights(Span(text))
    assert "".join(c for c, weight in weighted if weight == 1.5) == critical
    assert all(weight in (1.0, 1.5) for _, weight in weighted)


def test_a_character_is_a_grapheme() -> None:
    family = "👩‍👩‍👧"
    weighted = prior(rare=0, critical=0).character_weights(Span(f"e\u0301{family}न\u093f"))
    assert [c for c, _ in weighted] == ["e\u0301", family, "न\u093f"]


def test_field_factor_and_clipping() -> None:
    table = prior(rare=0, total=2.0, tiny=0.01, huge=100.0)
    assert weights_of(Span("ab", "total"), table) == [2.0, 2.0]
    assert weights_of(Span("7", "total"), table) == [3.0]
    assert weights_of(Span("a", "tiny"), table) == [0.25]
    assert weights_of(Span("a", "huge"), table) == [4.0]
    assert weights_of(Span("a", "other"), table) == [1.0]


def test_markup_weighs_one_before_the_division_by_the_mean() -> None:
    table = prior(mean=2.0, total=3.0)
    spans = [Span('{"total": 12', "total", is_markup=True)]
    assert byte_weights(spans, table) == pytest.approx([0.5] * 12)


def test_illegible_text_weighs_nothing() -> None:
    spans = [Span("ab"), Span("***", weight=0.0), Span("\n")]
    assert byte_weights(spans, None) == [1, 1, 0, 0, 0, 1]
    assert byte_weights(spans, prior())[2:5] == [0, 0, 0]


def test_bytes_of_a_character_share_its_weight() -> None:
    found = byte_weights([Span("a发z")], prior())
    expected = [rarity(16), *[rarity(5)] * 3, rarity(1)]
    assert found == pytest.approx(expected)


def test_a_token_of_several_characters_has_the_mean_over_their_bytes() -> None:
    found = token_weights([Span("a发"), Span("z")], [(0, 2), (2, 3)], prior())
    expected = [(1 * rarity(16) + 3 * rarity(5)) / 4, rarity(1)]
    assert found.tolist() == pytest.approx(expected)
    assert found.dtype == np.float32


def test_a_token_over_a_border_of_spans_is_weighed_by_its_bytes() -> None:
    spans = [Span("ab", weight=0.0), Span("cdef")]
    assert token_weights(spans, [(1, 5)], None).tolist() == [0.75]


def test_combining_marks_count_as_their_character() -> None:
    table = CharPrior(CharPriorSettings(0.25, 0), COUNTS | {"e\u0301": 16})
    median = 16.0  # cumulative 1, 3, 8, 16, 32, 48: half of 48 is reached among the 16s
    expected = (median / 16) ** 0.25
    assert byte_weights([Span("e\u0301")], table) == pytest.approx([expected] * 3)


def test_emoji_sequences_are_one_character() -> None:
    family = "👩‍👩‍👧"
    found = byte_weights([Span(family)], prior())
    assert found == pytest.approx([rarity(1)] * len(family.encode()))


def test_no_tokens_no_weights() -> None:
    assert token_weights([], [], prior()).shape == (0,)


def test_characters_are_counted_outside_markup() -> None:
    spans = [Span("[", is_markup=True), Span("aa1e\u0301"), Span("a")]
    assert count_characters([spans, [Span("1")]]) == {"a": 3, "1": 2, "e\u0301": 1}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.builds(Span, texts, is_markup=st.booleans()), max_size=4))
def test_the_sum_over_bytes_is_kept(spans: list[Span]) -> None:
    """However a text is cut into tokens, bytes times weight add up to the same."""
    text = "".join(span.text for span in spans)
    byte_sum = sum(byte_weights(spans, prior()))
    cuts = [*range(0, len(text), 3), len(text)]
    tokens = list(zip(cuts[:-1], cuts[1:], strict=True))
    sizes = [len(text[a:b].encode()) for a, b in tokens]
    assert np.dot(token_weights(spans, tokens, prior()), sizes) == pytest.approx(byte_sum, rel=1e-5)


def conversations() -> list[tuple[Turn, ...]]:
    answers = ["Total 12.50", "发票 2019-03-01", "naïve e\u0301 👩‍👩‍👧", "龘靐 7%"]
    question = Turn("user", (Span("read"),))
    return [(question, Turn("assistant", (Span(answer),))) for answer in answers]


def test_mean_over_the_index_is_one(encoder: Encoder) -> None:
    counts = count_characters([turns[1].spans for turns in conversations()])
    raw = CharPrior(CharPriorSettings(), counts)
    encoder = Encoder(encoder.tokenizer, encoder.images, raw)
    mean = float(np.concatenate([encoder.answer_weights(c) for c in conversations()]).mean())
    assert not math.isclose(mean, 1.0, rel_tol=1e-3)
    encoder = Encoder(encoder.tokenizer, encoder.images, CharPrior(raw.settings, counts, mean))
    normalised = np.concatenate([encoder.answer_weights(c) for c in conversations()])
    assert float(normalised.mean(dtype=np.float64)) == pytest.approx(1.0, rel=1e-6)


def test_chinese_split_over_published_tokens(published_encoder: Encoder) -> None:
    """The published tokenizer cuts 龘 and 靐 into two tokens each and joins the word Total."""
    table = CharPrior(
        CharPriorSettings(0.25, 0), {"龘": 1, "T": 4, "o": 4, "t": 4, "a": 4, "l": 64}
    )
    encoder = Encoder(published_encoder.tokenizer, published_encoder.images, table)
    turns = (Turn("user", (Span("read"),)), Turn("assistant", (Span("龘靐Total"),)))
    found = encoder.answer_weights(turns)
    # 81 characters, cumulative 1, 5, 9, 13, 17, 81: the median is 64; unseen counts as once.
    once, four = min(64**0.25, 3), 16**0.25
    assert found.tolist() == pytest.approx([once] * 4 + [(4 * four + 1) / 5] + [1.0])


def test_pickled_tables_weigh_the_same() -> None:
    table = prior(total=2.0)
    weights_of(Span("abz"), table)
    assert weights_of(Span("abz"), pickle.loads(pickle.dumps(table))) == weights_of(
        Span("abz"), table
    )
