"""Evaluate: known readings of known shards give known figures, reports and refusals."""

import json

import pytest

from data_tools.errors import ConfigError, DataError
from data_tools.output import write_shard
from data_tools.sample import Annotation, PageImage, Sample
from inference import evaluate
from inference.reader import Reader
from tests.inference.oracle import know_answers, page, png


def make_sample(number, text, *, boxes=None, **changes):
    annotations = boxes or (Annotation(text, (0, 0, 112, 84)),)
    settings = {
        "key": f"page-{number}",
        "images": (PageImage("p.png", 112, 84),),
        "annotations": tuple(annotations),
        "image_bytes": (png(page(number)),),
    }
    return Sample(**settings | changes)


@pytest.fixture
def reader(page_folder):
    return Reader.load(page_folder, device="cpu", batch_size=2)


@pytest.fixture
def line_reader(line_folder):
    return Reader.load(line_folder, device="cpu", batch_size=2)


def shard(folder, samples, name="val-000000.tar"):
    write_shard(str(folder / name), samples)
    return str(folder / "*.tar")


def test_known_readings_give_known_rates(reader, tmp_path, monkeypatch):
    samples = [make_sample(1, "abcd"), make_sample(2, "efgh"), make_sample(3, "TOTAL 12.50")]
    pattern = shard(tmp_path, samples)
    know_answers(monkeypatch, {1: "abcd", 2: "efxh", 3: "TOTAL 12,50"})
    evaluation, scored = evaluate.run(reader, [pattern])
    assert (evaluation.text.cer.errors, evaluation.text.cer.length) == (2, 19)
    assert evaluation.text.exact_match.value == pytest.approx(1 / 3)
    assert evaluation.text.num_groups == 3
    assert [item.sample.key for item in scored] == ["page-1", "page-2", "page-3"]
    assert evaluation.fields is None and evaluation.lines is None


def test_lines_of_a_document_are_one_group(line_reader, tmp_path, monkeypatch):
    samples = [make_sample(n, "abcd", tags={"document": f"d{n % 2}"}) for n in (1, 2, 3, 4)]
    know_answers(monkeypatch, dict.fromkeys((1, 2, 3, 4), "abcx"))
    evaluation, _ = evaluate.run(line_reader, [shard(tmp_path, samples)])
    assert evaluation.text.num_groups == 2


def test_illegible_lines_are_left_out_of_line_samples_only(
    reader, line_reader, tmp_path, monkeypatch
):
    blurred = (Annotation("***", (0, 0, 112, 84), weight=0.0),)
    pattern = shard(tmp_path, [make_sample(1, "abcd"), make_sample(2, "***", boxes=blurred)])
    know_answers(monkeypatch, {1: "abcd", 2: "what"})
    lines, _ = evaluate.run(line_reader, [pattern])
    assert (lines.num_samples, lines.left_out, lines.text.cer.errors) == (1, {"illegible": 1}, 0)
    assert evaluate.run(reader, [pattern])[0].num_samples == 2


def test_line_reader_refuses_shards_of_pages(line_reader, tmp_path):
    boxes = (Annotation("a", (0, 0, 9, 9)), Annotation("b", (0, 20, 9, 30)))
    pattern = shard(tmp_path, [make_sample(1, "", boxes=boxes)])
    with pytest.raises(ConfigError, match='"page-1" is a page with 2 boxes; build .* --unit line'):
        evaluate.run(line_reader, [pattern])


def test_fields_are_scored_and_unreadable_answers_counted(reader, tmp_path, monkeypatch):
    fields = {"company": "ACME", "date": "2019-01-02", "address": "x", "total": "12.50"}
    samples = [make_sample(n, "t", fields=fields) for n in (1, 2)]
    answer = json.dumps(fields | {"total": "RM12.5"})
    know_answers(monkeypatch, {1: answer, 2: "sorry"})
    evaluation, _ = evaluate.run(reader, [shard(tmp_path, samples)], template="receipt-fields-en")
    found = evaluation.fields
    assert (found.strict.right, found.strict.predicted, found.strict.reference) == (3, 4, 8)
    assert found.typed.right == 4
    assert (found.e2e_accuracy.value, found.e2e_accuracy_typed.value) == (0, 0.5)
    assert found.num_unreadable == 1


def test_boxed_lines_are_scored_on_the_original_page(reader, tmp_path, monkeypatch):
    boxes = (Annotation("a", (0, 0, 50, 20)), Annotation("b", (0, 40, 50, 60)))
    answer = [{"bbox_2d": [0, 0, 50, 20], "text": "a"}, {"bbox_2d": [0, 41, 50, 60], "text": "x"}]
    know_answers(monkeypatch, {1: json.dumps(answer)})
    pattern = shard(tmp_path, [make_sample(1, "", boxes=boxes)])
    evaluation, scored = evaluate.run(reader, [pattern], template="lines-en")
    assert evaluation.lines.detection.f1 == 1
    assert evaluation.lines.end_to_end.f1 == 0.5
    assert scored[0].reference == "a\nb"
    assert evaluation.text.cer.errors == 1


def test_conversations_ask_their_own_first_question(reader, tmp_path, monkeypatch):
    messages = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Total?"}]},
        {"role": "assistant", "content": "9.50"},
    )
    pattern = shard(tmp_path, [make_sample(1, "t", messages=messages)])
    seen = []
    original = Reader.prepare

    def prepare(self, *arguments, **settings):
        seen.append(settings["question"])
        return original(self, *arguments, **settings)

    monkeypatch.setattr(Reader, "prepare", prepare)
    know_answers(monkeypatch, {1: "9.50"})
    evaluation, _ = evaluate.run(reader, [pattern])
    assert seen == ["Total?"]
    assert evaluation.text.exact_match.value == 1


def test_draw_depends_on_the_seed_alone_and_keeps_the_order(tmp_path):
    for number in range(2):
        shard(
            tmp_path,
            [make_sample(10 * number + n, "t") for n in range(1, 9)],
            f"val-{number:06d}.tar",
        )
    pattern = [str(tmp_path / "*.tar")]

    def draw(num, seed):
        return [index.keys[row] for index, row in evaluate.draw_rows(pattern, num, seed)]

    assert draw(6, 1) == draw(6, 1) != draw(6, 2)
    assert draw(6, 1) == sorted(draw(6, 1), key=draw(None, 0).index)
    assert len(draw(99, 0)) == 16


def test_broken_images_are_left_out_and_counted(reader, tmp_path, monkeypatch):
    samples = [make_sample(1, "abcd"), make_sample(2, "x", image_bytes=(b"broken",))]
    know_answers(monkeypatch, {1: "abcd"})
    evaluation, _ = evaluate.run(reader, [shard(tmp_path, samples)])
    assert evaluation.num_samples == 1
    assert sum(evaluation.left_out.values()) == 1


def test_nothing_to_compare_is_an_error_with_the_reason(reader, tmp_path):
    pattern = shard(tmp_path, [make_sample(1, "t")])
    with pytest.raises(DataError, match="no sample to compare for template receipt-fields-en"):
        evaluate.run(reader, [pattern], template="receipt-fields-en")


def test_command_prints_a_table_and_writes_its_reports(page_folder, tmp_path, monkeypatch, capsys):
    pattern = shard(tmp_path, [make_sample(1, "Abc|d"), make_sample(2, "efgh")])
    know_answers(monkeypatch, {1: "abc|d", 2: "ef-h"})
    out, figures = tmp_path / "report", tmp_path / "figures.json"
    options = ["--device", "cpu", "--casefold", "--out", str(out), "--json", str(figures)]
    assert evaluate.main([str(page_folder), pattern, *options]) == 0
    table = capsys.readouterr().out
    assert "CER                 0.1111 [" in table and "] 95 %" in table
    assert "g -> -" in table and "casefold" in table
    record = json.loads((out / "report.json").read_text())
    assert record == json.loads(figures.read_text())
    assert record["text"]["options"]["casefold"] is True
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    assert [(p["key"], p["errors"]) for p in predictions] == [("page-1", 0), ("page-2", 1)]
    assert "| CER | 0.1111 [" in (out / "report.md").read_text()


def test_field_report_has_a_row_for_each_field(reader, tmp_path, monkeypatch):
    know_answers(monkeypatch, {1: '{"total": "3"}'})
    pattern = shard(tmp_path, [make_sample(1, "t", fields={"total": "3"})])
    evaluation, _ = evaluate.run(reader, [pattern], template="receipt-fields-en")
    page_text = evaluate.markdown(evaluation)
    assert "| total | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.0000 |" in page_text
    assert "E2E accuracy, documents" in evaluate.table(evaluation)


def test_senseless_numbers_are_refused(page_folder):
    with pytest.raises(ConfigError, match="--num must be at least 1"):
        evaluate.main([str(page_folder), "x.tar", "--num", "0"])


def test_invisible_characters_are_shown_in_confusions(reader, tmp_path, monkeypatch):
    know_answers(monkeypatch, {1: "a\x01b"})
    evaluation, _ = evaluate.run(reader, [shard(tmp_path, [make_sample(1, "a b")])])
    assert "␣ -> U+0001" in evaluate.table(evaluation)
