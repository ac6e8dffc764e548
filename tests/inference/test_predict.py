"""Predict: images, folders and annotation files in, JSON lines out, one bad file at its place."""

import json

import pytest

from data_tools.errors import ConfigError
from inference import predict
from inference.progress import Progress
from tests.inference.oracle import know_answers, page, png


@pytest.fixture
def pages(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"page-{number}.png").write_bytes(png(page(number)))
    return tmp_path


def run(capsys, *arguments):
    code = predict.main([*map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_images_and_folders_are_read_in_order(page_folder, pages, monkeypatch, capsys):
    know_answers(monkeypatch, {1: "one", 2: "two", 3: "three"})
    code, records, _ = run(capsys, page_folder, pages / "page-2.png", pages)
    assert code == 0
    assert [(r["file"].rsplit("/", 1)[-1], r["text"]) for r in records] == [
        ("page-2.png", "two"),
        ("page-1.png", "one"),
        ("page-2.png", "two"),
        ("page-3.png", "three"),
    ]


def test_bad_image_is_reported_at_its_place_and_ends_with_65(
    page_folder, pages, monkeypatch, capsys
):
    know_answers(monkeypatch, {1: "one", 3: "three"})
    (pages / "page-2.png").write_bytes(b"not an image")
    code, records, errors = run(capsys, page_folder, pages, "--batch-size", 1)
    assert code == 65
    assert [record.get("text") for record in records] == ["one", None, "three"]
    assert "page-2.png" in records[1]["error"]
    assert "3 documents, 1 could not be read" in errors


def write_labels(folder):
    entries = [
        {
            "image_path": "page-1.png",
            "annotations": [
                {"bbox": [10, 10, 50, 20], "text": "x"},
                {"bbox": [10, 40, 50, 60], "text": "y"},
            ],
        },
        {"image_path": "page-2.png", "annotations": [{"bbox": [0, 0, 112, 30], "text": "z"}]},
        {"image_path": "gone.png", "annotations": [{"bbox": [0, 0, 5, 5], "text": "z"}]},
    ]
    labels = folder / "labels.jsonl"
    labels.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return labels


@pytest.mark.parametrize("by_folder", [False, True])
def test_line_reader_reads_the_boxes_of_an_annotation_file(
    line_folder, pages, monkeypatch, capsys, by_folder
):
    know_answers(monkeypatch, {1: "one", 2: "two"})
    labels = write_labels(pages)
    out = pages / "new" / "out.jsonl"
    code, _, _ = run(capsys, line_folder, pages if by_folder else labels, "--out", out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 65
    assert records[0]["text"] == "one\none"
    assert records[0]["lines"] == [
        {"bbox": [10, 10, 50, 20], "text": "one"},
        {"bbox": [10, 40, 50, 60], "text": "one"},
    ]
    assert records[1]["lines"] == [{"bbox": [0, 0, 112, 30], "text": "two"}]
    assert "gone.png" in records[2]["error"]


def test_page_reader_reads_boxes_only_when_asked(page_folder, pages, monkeypatch, capsys):
    know_answers(monkeypatch, {1: "one", 2: "two"})
    labels = write_labels(pages)
    _, whole, _ = run(capsys, page_folder, labels)
    _, boxes, _ = run(capsys, page_folder, labels, "--boxes")
    assert whole[0]["text"] == "one" and "lines" not in whole[0]
    assert boxes[0]["text"] == "one\none" and len(boxes[0]["lines"]) == 2


def test_answer_that_was_cut_off_says_so(page_folder, pages, monkeypatch, capsys):
    know_answers(monkeypatch, {1: "a long text"})
    _, records, _ = run(capsys, page_folder, pages / "page-1.png", "--max-new-tokens", 4)
    assert records == [{"file": str(pages / "page-1.png"), "text": "a lo", "finished": False}]


def test_fields_stand_in_the_result(page_folder, pages, monkeypatch, capsys):
    know_answers(monkeypatch, {1: '{"total": "3"}'})
    options = ("--template", "receipt-fields-en")
    _, records, _ = run(capsys, page_folder, pages / "page-1.png", *options)
    assert records[0]["fields"] == {"total": "3"}


def test_paths_that_hold_nothing_are_refused(page_folder, tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        predict.main([str(page_folder), str(tmp_path / "none.png")])
    with pytest.raises(ConfigError, match="holds neither an image"):
        predict.main([str(page_folder), str(tmp_path)])
    with pytest.raises(ConfigError, match="--batch-size 0"):
        predict.main([str(page_folder), str(tmp_path), "--batch-size", "0"])


def test_the_real_model_reads_something(page_folder, pages, capsys):
    code, records, _ = run(capsys, page_folder, pages, "--max-new-tokens", 3)
    assert code == 0 and len(records) == 3


def test_progress_in_a_log_is_a_line_now_and_then(capsys):
    for interval_s, expected in ((0.0, ["pages: 2 of 5", "pages: 5 of 5"]), (60.0, [])):
        with Progress(5, "page", log_interval_s=interval_s) as progress:
            progress.update(2)
            progress.update(3)
        assert capsys.readouterr().err.splitlines() == expected
