"""The sample contract: what is written is what is read, breaches are named."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.sample import Annotation, PageImage, Sample, member_names
from tests.builders import make_sample

RECORD: dict[str, Any] = {
    "version": 1,
    "source": "s",
    "images": [{"file": "a.jpg", "width": 10, "height": 20}],
    "annotations": [{"image": 0, "bbox": [0, 0, 5, 5], "text": "x", "category": None}],
    "fields": {},
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    count = draw(st.integers(0, 3))
    pages = tuple(PageImage(f"p{i}.png", draw(st.integers(2, 99)), 9) for i in range(count))
    annotations = []
    for _ in range(draw(st.integers(0, 3))):
        image = draw(st.integers(0, max(0, count - 1)))
        x = draw(st.integers(0, pages[image].width - 2)) if pages else 0
        box = (x, 1, x + 1, 9) if count and draw(st.booleans()) else None
        line = draw(st.none() | st.integers(0, 9))
        annotations.append(
            Annotation(
                draw(texts),
                box,
                image,
                draw(st.none() | texts),
                line,
                draw(st.sampled_from([0.0, 1.0])),
            )
        )
    return Sample(
        key="k",
        images=pages,
        annotations=tuple(annotations),
        fields=draw(st.dictionaries(texts, st.none() | texts | st.lists(texts), max_size=3)),
        text=draw(st.none() | texts),
        tags=draw(st.dictionaries(texts, texts, max_size=2)),
        source=draw(texts),
        image_bytes=tuple(b"%d" % i for i in range(count)),
    )


@given(samples())
def test_members_hold_the_whole_sample(sample: Sample) -> None:
    members = sample.to_members()
    *images, record = members.values()
    assert list(members)[-1] == "k.json"
    assert sample.problems() == []
    assert Sample.from_json("k", json.loads(record), tuple(images)) == sample


def test_images_are_named_by_number_only_where_there_are_several() -> None:
    assert member_names("k", ["x.JPG"]) == ["k.jpg"]
    assert member_names("k", ["a.png", "b.v2.tif"]) == ["k.0.png", "k.1.tif"]
    assert list(make_sample(0, num_images=2).to_members()) == [
        "doc-0000.0.png",
        "doc-0000.1.png",
        "doc-0000.json",
    ]


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (5, 0, 4, 5), (-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 21), (0, 7, 5, 7)]
)
def test_a_box_must_be_inside_the_page_and_not_empty(box: tuple[int, int, int, int]) -> None:
    sample = Sample("k", (PageImage("a", 10, 20),), (Annotation("x", box),))
    with pytest.raises(DataError, match=r'sample "k": box 0 .* empty or leaves the page'):
        sample.validate()


def test_the_last_column_and_row_are_inside() -> None:
    Sample("k", (PageImage("a", 10, 20),), (Annotation("x", (9, 19, 10, 20)),)).validate()


@pytest.mark.parametrize("key", ["", "a.b"])
def test_bad_keys_are_named(key: str) -> None:
    with pytest.raises(DataError, match="key must be non-empty"):
        Sample(key, ()).validate()


@pytest.mark.parametrize(
    "sample, problem",
    [
        (Sample("k", (PageImage("a", 0, 5),)), "image 0 has size 0 x 5"),
        (Sample("k", (), (Annotation("x", image=1),)), "names image 1 of 0"),
        (Sample("k", (PageImage("a", 1, 1),), (Annotation("x", image=-1),)), "names image -1 of 1"),
        (Sample("k", (), (Annotation("x", (0, 0, 1, 1)),)), "has a box but the sample has no"),
        (Sample("k", (), fields={"a": 3}), 'field "a" must be a text'),
        (Sample("k", (), fields={"a": ["x", None]}), 'field "a" must be a text'),
    ],
)
def test_breaches_are_described(sample: Sample, problem: str) -> None:
    assert [problem in found for found in sample.problems()] == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"images": None},
        {"images": [{"file": "a", "width": 3}]},
        {"images": [{"file": "a", "width": "wide", "height": 1}]},
        {"images": [{"file": "a", "width": float("inf"), "height": 1}]},
        {"annotations": ["x"]},
        {"annotations": [{"text": "x"}]},
        {"annotations": [{"text": "x", "bbox": [1, 2, 3]}]},
        {"annotations": [{"text": "x", "bbox": [1, 2, 3, float("nan")]}]},
        {"fields": 3},
        {"messages": 3},
    ],
)
def test_malformed_records_are_data_errors_that_name_the_key(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match='sample "k": malformed JSON member'):
        Sample.from_json("k", RECORD | change)


def test_another_version_is_refused() -> None:
    with pytest.raises(DataError, match="version 2, expected 1; build the shards again"):
        Sample.from_json("k", RECORD | {"version": 2})
