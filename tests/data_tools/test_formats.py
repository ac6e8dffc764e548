"""Annotation formats: what is read, what is refused and why, and which format is recognised."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import ConfigError
from data_tools.formats import FORMATS, Rejection, SourceDocument, detect, guide, maestro
from data_tools.formats.document import EntryError, KeyMaker, enclosing_box, split_name


def entry(image: str = "images/a.jpg", **changes: object) -> dict:
    annotation = {"bbox": [1, 2, 30, 20], "text": "TOTAL", "category": None}
    return {"image_path": image, "annotations": [annotation]} | changes


def write_lines(path: Path, entries: list[object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in entries]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def read_one(path: str) -> SourceDocument:
    (document,) = guide.read(path)
    assert isinstance(document, SourceDocument)
    return document


def test_guide_entry_becomes_a_document(tmp_path: Path) -> None:
    whole = entry(
        annotations=[
            {"bbox": [1.2, 2.0, 29.1, 19.9], "text": "9.99", "category": "total"},
            {"text": "no box"},
        ],
        fields={"total": "9.99", "date": None, "items": ["a", "b"], "count": 3},
        split="valid",
        width=100,
        height=50,
        shop="s7",
        tags={"scanner": "x"},
    )
    document = read_one(write_lines(tmp_path / "set" / "labels.jsonl", [whole]))
    assert document.key == "a" and document.source == "set" and document.split == "val"
    assert document.image_paths == (str(tmp_path / "set" / "images/a.jpg"),)
    assert document.annotations[0].bbox == (1, 2, 30, 20)
    assert document.annotations[0].category == "total"
    assert document.annotations[1].bbox is None
    assert document.fields == {"total": "9.99", "date": None, "items": ["a", "b"], "count": "3"}
    assert document.tags == {"shop": "s7", "scanner": "x"}
    assert document.declared_size == (100, 50) and document.where == "labels.jsonl:1"


def test_guide_is_read_from_lines_list_single_file_and_folder(tmp_path: Path) -> None:
    entries = [entry("a.jpg"), entry("b.jpg"), entry("c.jpg")]
    as_lines = write_lines(tmp_path / "lines" / "own.jsonl", list(entries))
    as_list = write_lines(tmp_path / "list.json", [entries])
    for name, single in zip("abc", entries, strict=True):
        write_lines(tmp_path / "files" / f"{name}.json", [single])
    write_lines(tmp_path / "files" / "settings.json", [{"colour": "red"}])
    write_lines(tmp_path / "labelled" / "labels.jsonl", list(entries))
    write_lines(tmp_path / "labelled" / "other.jsonl", [{"text": "not a document"}])
    for path in (as_lines, as_list, str(tmp_path / "files"), str(tmp_path / "labelled")):
        assert detect(path) == "guide"
        documents = list(guide.read(path))
        assert [getattr(document, "key", document) for document in documents] == ["a", "b", "c"]
    assert [d.where for d in guide.read(as_list)] == [f"list.json[{n}]" for n in range(3)]


def test_several_pages_carry_their_annotations(tmp_path: Path) -> None:
    annotations = [{"text": "second", "bbox": [0, 0, 5, 5], "image": 1}]
    pages = entry(annotations=annotations) | {"image_path": ["a.0.png", "https://x.org/b.png"]}
    document = read_one(write_lines(tmp_path / "x.jsonl", [pages]))
    assert document.image_paths == (str(tmp_path / "a.0.png"), "https://x.org/b.png")
    assert document.annotations[0].image == 1 and document.key == "a_0"


def test_illegible_text_keeps_its_place_with_weight_zero(tmp_path: Path) -> None:
    annotations = [{"text": text} for text in ("***", "CHICKEN ***", "2 * 3 **")]
    document = read_one(write_lines(tmp_path / "x.jsonl", [entry(annotations=annotations)]))
    assert [annotation.weight for annotation in document.annotations] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "the entry is not an object"),
        ({"annotations": []}, "image_path is missing"),
        ({"image_path": 3}, "image_path is missing"),
        ({"image_path": []}, "image_path is missing"),
        (entry(annotations={"a": 1}), "annotations is not a list"),
        (entry(fields=["total"]), "fields is not an object"),
        (entry(fields={"total": {"value": 1}}), "a field is neither text"),
        (entry(split="../up"), "the split is not a word"),
        (entry(width="wide", height=3), "width and height are not whole numbers"),
        (entry(messages=[{"role": "user"}]), "messages is not a list of role"),
        (entry(text=4), "text is not a text"),
        (entry(tags=[1]), "tags is not an object"),
    ],
)
def test_broken_entry_is_rejected_and_the_rest_is_read(
    tmp_path: Path, broken: object, reason: str
) -> None:
    path = write_lines(tmp_path / "labels.jsonl", [entry("a.jpg"), broken, entry("b.jpg")])
    first, rejection, last = guide.read(path)
    assert isinstance(first, SourceDocument) and isinstance(last, SourceDocument)
    assert isinstance(rejection, Rejection) and rejection.reason.startswith(reason)
    assert rejection.where == "labels.jsonl:2" and rejection.scope == "document"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("TOTAL", "the annotation is not an object"),
        ({"bbox": [0, 0, 1, 1]}, "the text of an annotation is missing"),
        ({"text": "a", "bbox": "0 0 1 1"}, "the box is not a list"),
        ({"text": "a", "bbox": [0, 0, 1]}, "the box is neither 4 nor 8"),
        ({"text": "a", "bbox": [0, 0, 1, None]}, "the box is neither 4 nor 8"),
        ({"text": "a", "bbox": [0, 0, 1, float("nan")]}, "the box is neither 4 nor 8"),
        ({"text": "a", "bbox": [0, 0, 1, float("inf")]}, "the box is neither 4 nor 8"),
        ({"text": "a", "category": 4}, "the category is not a text"),
        ({"text": "a", "image": 1}, "the annotation names a page"),
    ],
)
def test_broken_annotation_is_rejected_alone(tmp_path: Path, broken: object, reason: str) -> None:
    annotations = [{"text": "before"}, broken, {"text": "after"}]
    path = write_lines(tmp_path / "labels.jsonl", [entry(annotations=annotations)])
    rejection, document = guide.read(path)
    assert isinstance(rejection, Rejection) and isinstance(document, SourceDocument)
    assert [annotation.text for annotation in document.annotations] == ["before", "after"]
    assert rejection.reason.startswith(reason) and rejection.scope == "annotation"
    assert (rejection.key, rejection.where) == ("a", "labels.jsonl:1, annotation 1")


def test_keys_are_valid_unique_and_in_order() -> None:
    keys = KeyMaker()
    names = ["x/a.jpg", "y/a.png", "a-2.jpg", "a.b c.jpg", "发票 1.jpg", "...", "a.jpg", "a.jpg"]
    assert [keys.make(name) for name in names] == [
        "a",
        "a-2",
        "a-2-2",
        "a_b_c",
        "发票_1",
        "document",
        "a-3",
        "a-4",
    ]


@given(st.lists(st.text(max_size=6), max_size=20))
def test_any_file_name_gives_a_usable_key(names: list[str]) -> None:
    keys = KeyMaker()
    made = [keys.make(name) for name in names]
    assert len(set(made)) == len(made)
    assert all(key and "." not in key and "/" not in key for key in made)


@pytest.mark.parametrize(
    "quad",
    [
        [10.5, 20, 30, 21, 29, 40.2, 9.9, 39],
        [[10.5, 20], [30, 21], [29, 40.2], [9.9, 39]],
        [9.9, 20, 30, 40.2],
    ],
)
def test_box_encloses_quadrilaterals_and_fractions(quad: list) -> None:
    assert enclosing_box(quad) == (9, 20, 30, 41)


def test_reversed_box_is_left_to_be_found_empty() -> None:
    assert enclosing_box([30, 20, 10, 40]) == (30, 20, 10, 40)


def test_split_names_are_canonical() -> None:
    assert [split_name(name) for name in ("train", "Valid", "dev", "test")] == [
        "train",
        "val",
        "val",
        "test",
    ]
    with pytest.raises(EntryError):
        split_name("a-b")  # would not be told from the shard number


def test_maestro_lines_become_conversations(tmp_path: Path) -> None:
    line = {"image": "a.jpg", "prefix": "read", "suffix": "TOTAL 9.99"}
    write_lines(tmp_path / "train" / "annotations.jsonl", [line, line | {"prefix": ""}])
    write_lines(tmp_path / "valid" / "annotations.jsonl", [line, "{", line | {"suffix": ""}])
    assert detect(str(tmp_path)) == "maestro"
    train, bare, valid, not_json, empty = maestro.read(str(tmp_path))
    assert isinstance(train, SourceDocument) and isinstance(valid, SourceDocument)
    assert isinstance(bare, SourceDocument) and bare.messages is not None
    assert train.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "TOTAL 9.99"}]},
    )
    assert bare.messages[0]["content"] == [{"type": "image"}]
    assert (train.key, bare.key, valid.key) == ("a", "a-2", "a-3")
    assert (train.split, valid.split) == ("train", "val")
    assert valid.image_paths == (str(tmp_path / "valid" / "a.jpg"),)
    assert isinstance(not_json, Rejection) and not_json.reason == "not JSON"
    assert isinstance(empty, Rejection) and empty.reason == "suffix is missing or empty"
    assert empty.where == "valid/annotations.jsonl:3"


def test_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    write_lines(tmp_path / "labels.csv", ["a,b"])
    for path in (tmp_path, tmp_path / "labels.csv"):
        with pytest.raises(ConfigError, match="no annotation format.*guide: .*maestro: "):
            detect(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        detect(str(tmp_path / "absent"))


def test_two_fitting_formats_ask_for_a_choice(tmp_path: Path) -> None:
    write_lines(tmp_path / "labels.jsonl", [entry()])
    write_lines(tmp_path / "test" / "annotations.jsonl", ["{}"])
    with pytest.raises(ConfigError, match="guide and maestro; choose with --format"):
        detect(str(tmp_path))


@pytest.mark.parametrize("content", ["", "\x00\xff", "[", "[[]]", "3", '"x"', "null"])
def test_sniffing_and_reading_never_crash(tmp_path: Path, content: str) -> None:
    for name in ("x.json", "x.jsonl"):
        path = tmp_path / name
        path.write_bytes(content.encode("latin-1"))
        for format_ in FORMATS.values():
            assert not format_.sniff(str(path))
        assert all(isinstance(found, Rejection) for found in guide.read(str(path)))
