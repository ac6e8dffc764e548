"""Lines out of an answer: whatever the model wrote, and boxes on the original page."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.examples.images import scale_box
from inference.answers import ReadLine, parse_lines

SAME = (200, 100)


def lines_of(answer):
    return parse_lines(answer, SAME, SAME)


def test_answer_as_it_was_trained():
    answer = (
        '[\n{"bbox_2d": [1, 2, 30, 40], "text": "a \\"b\\""},\n'
        '{"bbox_2d": [5, 50, 60, 70], "text": "发票"}\n]'
    )
    assert lines_of(answer) == [
        ReadLine((1, 2, 30, 40), 'a "b"'),
        ReadLine((5, 50, 60, 70), "发票"),
    ]


def test_answer_that_was_cut_off_gives_the_lines_before_the_cut():
    answer = '```json\n[{"bbox_2d": [1, 2, 30, 40], "text": "a"}, {"bbox_2d": [5, 50, 6'
    assert lines_of(answer) == [ReadLine((1, 2, 30, 40), "a")]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no JSON { at all",
        '{"text": "no box"}',
        '{"bbox_2d": [1, 2, 3], "text": "three"}',
        '{"bbox_2d": [30, 2, 3, 40], "text": "reversed"}',
        '{"bbox_2d": [NaN, 2, 30, 40], "text": "x"}',
        '{"bbox_2d": [1, 2, 30, Infinity], "text": "x"}',
        '{"bbox_2d": ["1", 2, 30, 40], "text": "x"}',
        '{"bbox_2d": [1, 2, 30, 40], "text": 5}',
        "{" * 2000,
    ],
)
def test_what_is_no_line_gives_none(answer):
    assert lines_of(answer) == []


def test_boxes_are_clipped_to_the_page():
    assert lines_of('{"bbox_2d": [150, -5, 900, 90], "text": "x"}')[0].bbox == (150, 0, 200, 90)


BOXES = st.tuples(
    st.integers(0, 500), st.integers(0, 400), st.integers(20, 300), st.integers(20, 300)
).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@given(BOXES)
def test_box_survives_resize_and_back_within_a_pixel_of_the_coarser_image(box):
    page_wh, resized_wh = (800, 700), (392, 336)
    answer = json.dumps({"bbox_2d": scale_box(box, page_wh, resized_wh), "text": "x"})
    back = parse_lines(answer, resized_wh, page_wh)[0].bbox
    assert all(abs(a - b) <= 800 / 392 + 1 for a, b in zip(back, box, strict=True))
