"""Metrics: hand-worked cases, properties, and the paths that a report depends on."""

import json
import subprocess
import sys
import unicodedata
from dataclasses import asdict

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics import (
    NormalizeOptions,
    anls_score,
    bootstrap_ratio,
    confusions,
    count_errors,
    edit_distance,
    edits,
    error_at_coverage,
    expected_calibration_error,
    field_report,
    graphemes,
    line_report,
    match_boxes,
    normalize,
    paired_difference,
    relative_error_reduction,
    text_report,
    tree_edit_accuracy,
    typed_value,
    words,
)

TEXTS = st.text(alphabet="ab1 .,é\u0301発票カ\u3000\u00a0\n", max_size=12)
SYMBOLS = st.lists(st.sampled_from("abc"), max_size=7)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "cer", "wer"),
    [
        ("abc", "abc", 0, 0),
        ("abc", "axc", 1 / 3, 1),
        ("abc", "", 1, 1),
        ("", "ab", 1, 1),
        ("", "", 0, 0),
        ("kitten sitting", "sitting kitten", 6 / 14, 1),
        ("发票号码", "发票号吗", 1 / 4, 1 / 4),
        ("e\u0301", "\u00e9", 0, 0),
        ("TOTAL 12.50", "TOTAL 12,50", 1 / 11, 1 / 2),
        ("a  b", "a b", 0, 0),
        ("a\u3000b\nc", "a b c", 0, 0),
        ("a", "abcd", 3, 1),
    ],
)
def test_hand_worked_error_rates_of_one_document(reference, hypothesis, cer, wer):
    counts = count_errors(reference, hypothesis)
    assert (counts.cer, counts.wer) == (pytest.approx(cer), pytest.approx(wer))


def test_empty_reference_counts_its_characters_in_the_micro_figure_and_one_in_the_macro():
    report = text_report(["", "abcd"], ["ab", "abcd"])
    assert (report.cer.errors, report.cer.length) == (2, 4)
    assert report.cer.micro.value == 0.5
    assert (report.cer.macro, report.cer.median) == (0.5, 0.5)
    assert text_report([""], ["ab"]).cer.errors == 2


def test_micro_macro_and_median_differ_as_defined():
    report = text_report(["aaaaaaaaaa", "b", "c"], ["aaaaaaaaaa", "x", "c"])
    assert report.cer.micro.value == pytest.approx(1 / 12)
    assert report.cer.macro == pytest.approx(1 / 3)
    assert report.cer.median == 0
    assert report.character_accuracy == pytest.approx(11 / 12)
    assert report.exact_match.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("  A\u00a0 b\t\nC ", NormalizeOptions(), "A b C"),
        ("Straße", NormalizeOptions(casefold=True), "strasse"),
        ("a - b, (c)!", NormalizeOptions(no_punct=True), "a b c"),
        ("ＴＯＴＡＬ：１２", NormalizeOptions(fold_width=True), "TOTAL:12"),
        ("ＴＯＴＡＬ", NormalizeOptions(), "ＴＯＴＡＬ"),
    ],
)
def test_normalisation_drops_only_what_an_option_names(text, options, expected):
    assert normalize(text, options) == expected


@given(TEXTS, st.builds(NormalizeOptions, st.booleans(), st.booleans(), st.booleans()))
def test_normalising_twice_changes_nothing(text, options):
    once = normalize(text, options)
    assert normalize(once, options) == once


def test_words_split_at_spaces_and_at_every_ideograph_and_kana():
    assert words("发票 No.12 カタ total") == ["发", "票", "No.12", "カ", "タ", "total"]
    assert graphemes("e\u0301👨‍👩‍👧x") == ["e\u0301", "👨‍👩‍👧", "x"]


@given(TEXTS, TEXTS)
def test_cer_is_zero_exactly_when_the_normalised_texts_are_equal(first, second):
    counts = count_errors(first, second)
    assert (counts.character_errors == 0) == (normalize(first) == normalize(second))
    assert counts.exact == (counts.character_errors == 0)


@given(SYMBOLS, SYMBOLS, SYMBOLS)
def test_edit_distance_is_a_metric(first, second, third):
    assert edit_distance(first, second) == edit_distance(second, first)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(
        second, third
    )


@given(st.lists(st.tuples(st.text("abc ", min_size=1, max_size=6), st.text("abc ", max_size=6))))
def test_error_rates_agree_with_jiwer_on_plain_text(pairs):
    pairs = [(normalize(r), normalize(h)) for r, h in pairs if r.strip()]
    if not pairs:
        return
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    report = text_report(references, hypotheses)
    assert report.cer.micro.value == pytest.approx(jiwer.cer(references, hypotheses))
    assert report.wer.micro.value == pytest.approx(jiwer.wer(references, hypotheses))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("ab", "ba", [("a", "b"), ("b", "a")]),  # not insert + delete
        ("aa", "a", [("a", "")]),
        ("aab", "ab", [("a", "")]),
        ("", "ab", [("", "a"), ("", "b")]),
        ("kitten", "sitting", [("k", "s"), ("e", "i"), ("", "g")]),
        ("abc", "xc", [("a", "x"), ("b", "")]),  # substitutes first, then deletes
    ],
)
def test_alignment_breaks_ties_by_substituting_then_deleting_then_inserting(
    reference, hypothesis, expected
):
    assert edits(reference, hypothesis) == expected


def reference_edits(first, second):
    """Slow definition: the first path in the order keep/substitute, delete, insert."""
    best = {}

    def cost(i, j):
        if (i, j) not in best:
            options = []
            if i < len(first) and j < len(second):
                options.append(cost(i + 1, j + 1) + (first[i] != second[j]))
            if i < len(first):
                options.append(cost(i + 1, j) + 1)
            if j < len(second):
                options.append(cost(i, j + 1) + 1)
            best[i, j] = min(options, default=0)
        return best[i, j]

    path, i, j = [], 0, 0
    while i < len(first) or j < len(second):
        here = cost(i, j)
        both = i < len(first) and j < len(second)
        if both and cost(i + 1, j + 1) + (first[i] != second[j]) == here:
            path += [(first[i], second[j])] if first[i] != second[j] else []
            i, j = i + 1, j + 1
        elif i < len(first) and cost(i + 1, j) + 1 == here:
            path.append((first[i], ""))
            i += 1
        else:
            path.append(("", second[j]))
            j += 1
    return path


@given(SYMBOLS, SYMBOLS)
def test_banded_alignment_equals_the_full_table(first, second):
    path = edits(first, second)
    assert path == reference_edits(first, second)
    assert len(path) == edit_distance(first, second)


def test_alignment_of_a_whole_page_is_fast_enough_to_run_on_every_page():
    page = "".join(np.random.default_rng(0).choice(list("abcdef "), 4000))
    assert len(edits(page, page[:2000] + "X" + page[2010:])) == 10


def test_confusions_are_counted_and_ordered_by_count_then_symbol():
    found = confusions(["0O0", "ab", "x"], ["OOO", "a", "xy"])
    assert [(c.reference, c.hypothesis, c.count) for c in found] == [
        ("0", "O", 2),
        ("", "y", 1),
        ("b", "", 1),
    ]


def test_report_is_plain_json_and_repeatable_and_records_its_options():
    options = NormalizeOptions(casefold=True)
    first = text_report(["Ab", "cd"], ["ab", "xd"], groups=["p", "p"], options=options)
    assert json.loads(json.dumps(asdict(first)))["options"]["casefold"] is True
    assert first == text_report(["Ab", "cd"], ["ab", "xd"], groups=["p", "p"], options=options)
    assert first.num_groups == 1
    assert first.cer.micro.low == first.cer.micro.high  # one group: nothing to resample


def test_reports_refuse_texts_that_do_not_pair_up():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        text_report(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one document"):
        text_report([], [])
    with pytest.raises(ValueError, match="1 references but 0 predictions"):
        field_report([{}], [])


# Fields


def test_hand_worked_field_scores():
    report = field_report(
        [{"total": "12.50", "date": "2019-01-02"}],
        [{"total": "12.50", "date": "2019-01-03", "company": "X"}],
    )
    assert report.strict.precision == pytest.approx(1 / 3)
    assert report.strict.recall == pytest.approx(1 / 2)
    assert report.strict.f1 == pytest.approx(0.4)
    assert report.f1.value == pytest.approx(0.4)
    assert report.e2e_accuracy.value == 0
    assert report.per_field["total"].strict.f1 == 1
    assert report.per_field["company"].strict.predicted == 1


def test_absent_names_do_not_count_and_unreadable_output_is_no_prediction():
    report = field_report([{"a": None, "b": "", "c": "x"}, {"c": "y"}], [{"a": None}, None])
    assert (report.strict.predicted, report.strict.reference) == (0, 2)
    assert report.num_unreadable == 1
    assert set(report.per_field) == {"c"}


def test_lists_are_multisets():
    report = field_report([{"item": ["a", "a", "b"]}], [{"item": ["b", "a", "a", "c", "b"]}])
    assert (report.strict.right, report.strict.predicted, report.strict.reference) == (3, 5, 3)


def test_document_is_right_only_with_every_field_right_and_none_invented():
    reference = [{"a": "1", "b": "2"}] * 3
    predicted = [{"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "2", "c": "3"}]
    assert field_report(reference, predicted).e2e_accuracy.value == pytest.approx(1 / 3)


def test_typed_scores_stand_beside_the_strict_ones():
    report = field_report(
        [{"total": "RM 1,234.50", "date": "02/01/2019"}],
        [{"total": "1234.5", "date": "2 Jan 2019"}],
    )
    assert report.strict.f1 == 0
    assert report.typed.f1 == 1
    assert (report.e2e_accuracy.value, report.e2e_accuracy_typed.value) == (0, 1)
    json.dumps(asdict(report))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234.50", "amount:1234.5"),
        ("1.234,50", "amount:1234.5"),
        ("12,50", "amount:12.5"),
        ("1,234", "amount:1234"),
        ("1.234", "amount:1.234"),
        ("1,234,567", "amount:1234567"),
        ("$ -9.00", "amount:-9"),
        ("-RM9.00", "amount:-9"),
        ("￥１２", "amount:12"),
        ("100", "amount:100"),
        ("0.00", "amount:0"),
        ("0012", "0012"),
        ("12,34,5", "12,34,5"),
        ("INV-12", "INV-12"),
        ("2019-01-02", "date:2019-01-02"),
        ("2019/1/2", "date:2019-01-02"),
        ("2019年1月2日", "date:2019-01-02"),
        ("02/01/2019", "date:2019-01-02"),
        ("01/25/2019", "date:2019-01-25"),
        ("25.01.19", "date:2019-01-25"),
        ("02-JAN-2019", "date:2019-01-02"),
        ("September 3, 2019", "date:2019-09-03"),
        ("31/02/2019", "31/02/2019"),
    ],
)
def test_typed_values(text, expected):
    assert typed_value(text) == expected


def test_month_first_dates_are_an_option():
    assert typed_value("02/01/2019", day_first=False) == "date:2019-02-01"


def test_anls_is_zero_from_half_the_characters_wrong():
    assert anls_score("abcd", "abcx") == pytest.approx(0.75)
    assert anls_score("abcd", "abxx") == 0
    report = field_report([{"a": "abcd", "l": ["abcd", "wxyz"]}], [{"l": ["wxyz", "abcx", "q"]}])
    assert report.per_field["a"].anls == 0
    assert report.per_field["l"].anls == pytest.approx(1.75 / 3)
    assert report.anls == pytest.approx(1.75 / 6)


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_anls_is_symmetric_and_one_only_for_equal_values(first, second):
    assert anls_score(first, second) == anls_score(second, first)
    assert (anls_score(first, second) == 1) == (first == second)


def test_tree_edit_accuracy_of_nested_output():
    reference = {"menu": [{"nm": "tea", "price": "2"}, {"nm": "bun", "price": "1"}], "total": "3"}
    assert tree_edit_accuracy(reference, reference) == 1
    assert tree_edit_accuracy(reference, {}) == 0
    # Nodes of the reference: menu, 2 objects, 4 keys with 4 texts, total and its text = 13.
    wrong = {"menu": [{"nm": "tea", "price": "2"}, {"nm": "bin", "price": "1"}], "total": "3"}
    assert tree_edit_accuracy(reference, wrong) == pytest.approx(1 - 1 / 13)
    half = {"menu": reference["menu"]}
    assert tree_edit_accuracy(reference, half) == pytest.approx(1 - 2 / 13)
    assert tree_edit_accuracy({}, {"a": "b"}) == 0
    assert tree_edit_accuracy({"a": "x y"}, {"a": " x  y"}) == 1


# Lines


def test_boxed_line_is_right_only_if_found_and_read():
    reference = [[((0, 0, 100, 10), "one"), ((0, 20, 100, 30), "two")]]
    predicted = [[((0, 1, 100, 11), "one"), ((0, 20, 100, 30), "tow"), ((0, 50, 9, 60), "x")]]
    report = line_report(reference, predicted)
    assert (report.detection.right, report.end_to_end.right) == (2, 1)
    assert report.end_to_end.precision == pytest.approx(1 / 3)
    assert report.end_to_end.recall == pytest.approx(1 / 2)
    assert report.f1.value == pytest.approx(0.4)


def test_boxes_are_assigned_for_the_largest_sum_not_greedily():
    # Greedy takes (0, 0) at IoU 0.82 and strands the second pair; the best sum is 0.67 + 0.67.
    reference = [(0, 0, 100, 10), (0, 0, 100, 12)]
    predicted = [(0, 0, 100, 11), (0, 0, 100, 7)]
    assert match_boxes(reference, predicted) == [(0, 1), (1, 0)]
    assert match_boxes([(0, 0, 10, 10)], [(0, 0, 10, 4.9)]) == []
    assert match_boxes([], predicted) == []


# Intervals


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 60))
def test_interval_contains_the_point_estimate_of_independent_documents(seed, number):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(50, 100, number)
    errors = generator.binomial(lengths, 0.1)
    interval = bootstrap_ratio(errors, lengths, seed=seed, resamples=400)
    assert interval.low <= interval.value <= interval.high
    assert interval.value == pytest.approx(errors.sum() / lengths.sum())


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hits = generator.random(60) < 0.3
        interval = bootstrap_ratio(hits, np.ones(60), resamples=300)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 1.0


def test_grouped_interval_is_wider_when_a_group_shares_its_errors():
    errors = np.repeat([0, 10, 0, 10, 0, 10, 0, 10], 10)
    lengths = np.full(80, 100)
    single = bootstrap_ratio(errors, lengths)
    grouped = bootstrap_ratio(errors, lengths, groups=list(np.repeat(np.arange(8), 10)))
    assert grouped.value == single.value
    assert grouped.high - grouped.low > 2 * (single.high - single.low)


def test_paired_difference_sees_what_unpaired_intervals_hide():
    generator = np.random.default_rng(2)
    lengths = np.full(100, 100)
    hard = generator.integers(0, 60, 100)
    better, worse = hard, hard + generator.integers(0, 3, 100)
    difference = paired_difference(better, worse, lengths)
    assert difference.excludes_zero and difference.high < 0
    first, second = bootstrap_ratio(better, lengths), bootstrap_ratio(worse, lengths)
    assert first.high > second.low  # the intervals overlap
    swapped = paired_difference(worse, better, lengths)
    assert swapped.value == pytest.approx(-difference.value)
    assert swapped.low == pytest.approx(-difference.high)


def test_relative_error_reduction():
    reduction = relative_error_reduction([1, 1, 1, 1], [2, 2, 2, 2])
    assert (reduction.value, reduction.low, reduction.high) == (0.5, 0.5, 0.5)


def test_same_seed_same_interval_and_the_default_is_two_thousand_resamples_at_95_percent():
    first = bootstrap_ratio([1, 0, 3, 2], [9, 8, 9, 7], seed=3)
    assert first == bootstrap_ratio([1, 0, 3, 2], [9, 8, 9, 7], seed=3)
    assert first != bootstrap_ratio([1, 0, 3, 2], [9, 8, 9, 7], seed=4)
    assert (first.resamples, first.level) == (2000, 0.95)


# Confidence


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    assert expected_calibration_error([0.8] * 10, [True] * 8 + [False] * 2, num_bins=1) == (
        pytest.approx(0)
    )
    assert expected_calibration_error([1.0] * 10, [False] * 10) == pytest.approx(1)


def test_error_rate_of_the_most_confident_share():
    confidences = [0.9] * 9 + [0.1]
    kept = error_at_coverage(confidences, [True] * 9 + [False], coverages=(0.9, 1.0))
    assert kept == {0.9: 0.0, 1.0: pytest.approx(0.1)}
    with pytest.raises(ValueError, match="coverages"):
        error_at_coverage([0.5], [True], coverages=(0,))


def test_metrics_import_no_torch():
    code = "import sys, train.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(TEXTS)
def test_composed_and_decomposed_forms_are_equal(text):
    assert count_errors(unicodedata.normalize("NFD", text), text).character_errors == 0
