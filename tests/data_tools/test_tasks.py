"""Which question is asked, and what its answer is made of."""

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_tools.errors import ConfigError, DataError
from data_tools.examples.tasks import Recipe, Span, Turn, ask
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.templates import load_template
from tests.builders import make_sample

TEXT, LINES = load_template("text-en"), load_template("lines-en")
FIELDS, NUMBERED = load_template("receipt-fields-en"), load_template("invoice-fields-zh")

SAMPLE = Sample(
    key="doc",
    images=(PageImage("a.png", 100, 200), PageImage("b.png", 50, 60)),
    annotations=(
        Annotation("Total", (10, 20, 30, 40), category="name", line=0),
        Annotation('12"50', (40, 20, 90, 40), category="total", line=0),
        Annotation("***", (0, 60, 50, 80), line=1, weight=0.0),
        Annotation("unplaced", line=1),
        Annotation("back", (5, 6, 25, 30), image=1),
    ),
    fields={"total": '12"50', "company": "Ä", "date": None, "address": ["a", "b"]},
)


def answer_of(turns: tuple[Turn, ...]) -> str:
    return turns[-1].text


def test_choice_depends_on_seed_key_and_epoch_alone() -> None:
    recipe = Recipe((TEXT, LINES), (1.0, 1.0), seed=3)
    keys = [f"doc-{i}" for i in range(300)]
    first = [recipe.choose(key, 0) for key in keys]
    assert [
        Recipe((TEXT, LINES), (1.0, 1.0), seed=3).choose(key, 0) for key in reversed(keys)
    ] == first[::-1]
    assert [recipe.choose(key, 1) for key in keys] != first
    assert [Recipe((TEXT, LINES), (1.0, 1.0), seed=4).choose(key, 0) for key in keys] != first


def test_shares_follow_the_weights() -> None:
    recipe = Recipe((TEXT, LINES, FIELDS, NUMBERED), (5.0, 3.0, 0.0, 2.0))
    counts = Counter(recipe.choose(f"doc-{i}", epoch) for i in range(2000) for epoch in range(3))
    shares = [counts[i] / 6000 for i in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.0, 0.2], abs=0.02)


def test_only_what_a_sample_can_answer_is_chosen_and_the_shares_follow() -> None:
    recipe = Recipe((TEXT, LINES, FIELDS, NUMBERED), (5.0, 3.0, 0.0, 2.0), seed=1)
    keys = [f"doc-{i}" for i in range(6000)]
    chosen = [recipe.choose(key, 0, (False, True, True, True)) for key in keys]
    shares = [chosen.count(i) / len(keys) for i in range(4)]
    assert shares == pytest.approx([0, 0.6, 0, 0.4], abs=0.02)
    assert chosen == [recipe.choose(key, 0, (False, True, True, True)) for key in keys]
    assert {recipe.choose(key, 0, (False, False, True, True)) for key in keys} == {3}
    assert [recipe.choose(key, 1, (True,) * 4) for key in keys[:99]] == [
        recipe.choose(key, 1) for key in keys[:99]
    ]


def test_expected_shares_are_those_of_the_choice() -> None:
    recipe = Recipe((TEXT, LINES, NUMBERED), (5.0, 3.0, 2.0))
    answerable = np.asarray([[True, False, True], [True, True, False], [True, True, False]])
    assert recipe.shares(answerable) == pytest.approx(
        np.asarray([[0.5, 0, 1], [0.3, 0.6, 0], [0.2, 0.4, 0]])
    )


@pytest.mark.parametrize(
    "count, weights", [(2, (1.0,)), (1, (1.0, 1.0)), (0, ()), (2, (1.0, -1.0)), (1, (0.0,))]
)
def test_recipes_need_a_weight_for_each_template(count: int, weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="one weight of at least 0 for each template"):
        Recipe((TEXT,) * count, weights)


def test_text_joins_pieces_of_a_line_by_blanks_and_lines_by_breaks() -> None:
    question, answer = ask(SAMPLE, TEXT)
    assert question == Turn("user", (Span(TEXT.prompt),), num_images=2)
    assert answer.text == 'Total 12"50\n*** unplaced\nback'
    weights = {span.text: span.weight for span in answer.spans}
    assert weights["***"] == 0.0 and weights["back"] == 1.0
    assert [s.category for s in answer.spans if s.category] == ["name", "total"]


def test_a_given_text_wins_over_annotations() -> None:
    assert answer_of(ask(dataclasses.replace(SAMPLE, text="as read"), TEXT)) == "as read"


def test_lines_carry_pixels_of_the_resized_pages() -> None:
    turns = ask(SAMPLE, LINES, [(200, 300), (50, 120)])
    assert json.loads(answer_of(turns)) == [
        {"bbox_2d": [20, 30, 60, 60], "text": "Total"},
        {"bbox_2d": [80, 30, 180, 60], "text": '12"50'},
        {"bbox_2d": [0, 90, 100, 120], "text": "***"},
        {"bbox_2d": [5, 12, 25, 60], "text": "back"},
    ]
    texts = [(s.text, s.category, s.weight) for s in turns[1].spans if not s.is_markup]
    assert texts == [
        ("Total", "name", 1),
        ('12\\"50', "total", 1),
        ("***", None, 0),
        ("back", None, 1),
    ]


def test_lines_are_counted_with_the_longest_coordinates() -> None:
    counted = json.loads(answer_of(ask(SAMPLE, LINES)))
    assert all(line["bbox_2d"] == [9999] * 4 for line in counted)
    longer = json.loads(answer_of(ask(SAMPLE, LINES, coordinate_digits=5)))
    assert all(line["bbox_2d"] == [99999] * 4 for line in longer)


@pytest.mark.parametrize("template", [FIELDS, NUMBERED], ids=["json", "numbered"])
def test_fields_are_the_answer_of_the_template_in_pieces(template: Any) -> None:
    keys = [field.key for field in template.fields]
    values = ['Ä"\\', None, ["a", 'b"'], [], "two\nlines"]
    fields = {key: values[i % len(values)] for i, key in enumerate(keys)}
    turns = ask(dataclasses.replace(SAMPLE, fields=fields), template)
    assert answer_of(turns) == template.answer(fields)
    for span in turns[1].spans:
        assert span.is_markup == (span.category is None)
        assert span.is_markup or span.category in keys
    markup = "".join(span.text for span in turns[1].spans if span.is_markup)
    assert all(field.name in markup for field in template.fields)
    assert "two" not in markup and "Ä" not in markup


@pytest.mark.parametrize("template", [TEXT, LINES, FIELDS])
def test_nothing_to_answer_with_is_a_data_error(template: Any) -> None:
    with pytest.raises(DataError, match=f'sample "k": nothing to answer "{template.name}"'):
        ask(Sample("k", ()), template)


def conversation(*messages: dict[str, Any], images: int = 1) -> tuple[Turn, ...]:
    sample = dataclasses.replace(make_sample(0, num_images=images), messages=messages)
    return ask(sample, LINES)


IMAGE = {"type": "image"}


def test_messages_win_over_the_template() -> None:
    turns = conversation(
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "total?"}]},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    )
    assert [(t.role, t.text, t.num_images) for t in turns] == [
        ("system", "be brief", 0),
        ("user", "total?", 1),
        ("assistant", "12", 0),
        ("user", "sure?", 0),
        ("assistant", "yes", 0),
    ]
    assert turns[1].message["content"] == [IMAGE, {"type": "text", "text": "total?"}]
    assert turns[4].message["content"] == "yes"


def test_images_between_texts_stay_where_they_stand() -> None:
    content = [
        {"type": "text", "text": "first "},
        IMAGE,
        {"type": "text", "text": "second "},
        IMAGE,
    ]
    turns = conversation(
        {"role": "user", "content": content}, {"role": "assistant", "content": "a"}, images=2
    )
    assert turns[0].message == {"role": "user", "content": content}
    assert turns[0].text == "first second " and turns[0].num_images == 2


def test_turns_behind_the_last_answer_are_left_out() -> None:
    question = {"role": "user", "content": [IMAGE]}
    answer = {"role": "assistant", "content": "a"}
    assert len(conversation(question, answer, {"role": "user", "content": "thanks"})) == 2
    with pytest.raises(DataError, match="show 1 images up to the last answer, the sample holds 2"):
        conversation(question, answer, question, images=2)


@pytest.mark.parametrize(
    "messages, complaint",
    [
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "show 0 images",
        ),
        ([{"role": "user", "content": [IMAGE]}], "no answer"),
        ([{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": ""}], "no answer"),
        ([{"role": "user"}], "malformed messages"),
        ([{"content": "x"}], "malformed messages"),
        ([{"role": "user", "content": None}], "malformed messages"),
        ([{"role": "user", "content": [{"text": "x"}]}], "malformed messages"),
        ([{"role": "user", "content": [{"type": "text"}]}], "malformed messages"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "malformed messages"),
        (["hello"], "malformed messages"),
    ],
)
def test_unusable_messages_are_data_errors(messages: list[Any], complaint: str) -> None:
    with pytest.raises(DataError, match=f'sample "doc-0000": .*{complaint}'):
        conversation(*messages)
