"""Samples longer than a pack: smaller pages, answers in parts, or left out; never a cut image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.examples.encode import CONTEXT, FULL_SCALE, ImageSettings, part_of_answer
from data_tools.examples.images import num_visual_tokens
from data_tools.examples.preprocess import LineStrip
from data_tools.stream.fit import (
    MIN_SCALE,
    Budgets,
    Fit,
    Question,
    fit,
    window_tokens,
)

IMAGES = ImageSettings(784, 4096 * 784)


def question(text: int, targets: int, *sizes: tuple[int, int], num_answers: int = 1) -> Question:
    visual = sum(num_visual_tokens(*IMAGES.resized_size(*size)) for size in sizes)
    return Question(text, targets, visual, num_answers, sizes)


@given(
    st.integers(20, 3000),
    st.lists(st.tuples(st.integers(200, 2500), st.integers(200, 2500)), min_size=1, max_size=3),
    st.integers(1000, 6000),
    st.integers(1000, 30_000),
)
def test_shrunk_pages_fit_both_budgets_and_stay_legible(
    text: int, sizes: list[tuple[int, int]], tokens: int, patches: int
) -> None:
    asked, budgets = question(text, text // 2, *sizes), Budgets(tokens, patches)
    found = fit(asked, budgets, IMAGES, ["shrink"])
    smallest = sum(
        num_visual_tokens(*IMAGES.resized_size(*size, scale=MIN_SCALE)) for size in sizes
    )
    if found is None:
        assert not budgets.hold(text, smallest)
    else:
        assert found.windows == 1 and MIN_SCALE <= found.scale <= FULL_SCALE
        resized = [IMAGES.resized_size(*size, scale=found.scale) for size in sizes]
        assert found.visual == sum(num_visual_tokens(*size) for size in resized)
        assert budgets.hold(text, found.visual)


@given(st.integers(1, 20_000), st.integers(5, 300), st.integers(600, 3000))
def test_parts_of_an_answer_cover_it_once_and_fit(targets: int, head: int, tokens: int) -> None:
    asked, budgets = question(head + targets, targets, (280, 280)), Budgets(tokens, 4 * tokens)
    found = fit(asked, budgets, IMAGES, ["split"])
    assert found == Fit(FULL_SCALE, found.windows, 100) if found else head + 100 > tokens - 320
    if found is None:
        return
    parts = [part_of_answer(targets, window, found.windows) for window in range(found.windows)]
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == targets
    for window, (start, stop) in enumerate(parts):
        size = window_tokens(head + targets, targets, 100, window, found.windows)
        assert size == head + 100 + min(CONTEXT, start) + stop - start <= tokens


def test_the_first_policy_that_serves_is_taken() -> None:
    long_page = question(500, 400, (2000, 1500))
    budgets = Budgets(3000, 12_000)
    assert not budgets.hold(long_page.text, long_page.visual)
    shrunk = fit(long_page, budgets, IMAGES, ["shrink", "split"])
    assert shrunk is not None and shrunk.windows == 1 and MIN_SCALE < shrunk.scale < 900
    long_text = question(9000, 8900, (560, 560))
    split = fit(long_text, budgets, IMAGES, ["shrink", "split"])
    assert split is not None and split.scale == FULL_SCALE and split.windows == 4
    assert fit(long_text, budgets, IMAGES, ["shrink"]) is None
    assert fit(long_page, budgets, IMAGES, []) is None


@pytest.mark.parametrize(
    ("asked", "images"),
    [
        (question(9000, 8900, (560, 560), num_answers=2), IMAGES),
        (question(9000, 8900, (3000, 2000)), IMAGES),
        (question(2900, 20, (1400, 1400)), ImageSettings(784, 10**6, (LineStrip(),))),
    ],
    ids=["a dialogue", "no room beside the page", "strips have the size of their transform"],
)
def test_what_can_neither_be_shrunk_nor_split_is_left_out(
    asked: Question, images: ImageSettings
) -> None:
    policies = ["shrink", "split"] if images is IMAGES else ["shrink"]
    assert fit(asked, Budgets(3000, 12_000), images, policies) is None
