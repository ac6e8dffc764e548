"""Synthetic pages and lines: content, exact boxes, determinism, fonts, resuming."""

import json
import random
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from data_tools.errors import ConfigError
from data_tools.sample import Sample
from data_tools.synth import fonts, lines, pages, phrases
from data_tools.synth.__main__ import main
from data_tools.synth.degrade import ink_mask, vary_slant, vary_stroke
from data_tools.synth.fonts import BUILTIN, Face, builtin_face, open_font
from data_tools.synth.grammar import Cell, Content, Row, form, receipt
from data_tools.synth.layout import lay_out
from data_tools.synth.render import draw_page

BUILTIN_ONLY = (builtin_face(),)  # real faces are no part of the tests


@pytest.fixture
def builtin_as_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `lines` draw in Pillow's own face, which needs no font file."""
    monkeypatch.setattr(lines, "find_faces", lambda folders: list(BUILTIN_ONLY))


def _write_builtin(path: Path) -> None:
    file: Any = open_font(BUILTIN, 20).path  # an open file for a face that lies in memory
    file.seek(0)
    path.write_bytes(file.read())


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize("max_chars", [1, 2, 8, 40])
def test_lines_keep_the_length_and_have_a_tall_character(max_chars: int) -> None:
    texts = [phrases.line_text(random.Random(seed), max_chars) for seed in range(1500)]
    assert {len(text) for text in texts} == set(range(1, max_chars + 1))
    for text in texts:
        assert text == text.strip() and "  " not in text and text.isascii()
        assert any(character in phrases.TALL for character in text), text


def test_short_and_long_lines_are_both_plentiful() -> None:
    lengths = [len(phrases.line_text(random.Random(seed), 40)) for seed in range(4000)]
    assert 0.43 < sum(length <= 8 for length in lengths) / 4000 < 0.55  # 0.35 + 0.65 * 8 / 40
    assert 0.14 < sum(length > 30 for length in lengths) / 4000 < 0.2  # 0.65 * 10 / 40


def test_lines_cover_all_printable_characters() -> None:
    seen = set("".join(phrases.line_text(random.Random(seed), 40) for seed in range(2000)))
    assert seen >= set(fonts.PRINTABLE)


@pytest.mark.parametrize("draw", [receipt, form])
def test_documents_add_up_and_show_their_fields(draw: Callable[[random.Random], Content]) -> None:
    for seed in range(60):
        content = draw(random.Random(seed))
        cells = [cell for row in content.rows for cell in row.cells]
        by_category = {cell.category: cell.text for cell in cells if cell.category}
        assert by_category == content.fields
        assert {"company", "date", "total", "invoice_number"} <= set(content.fields)
        assert all(0 < len(cell.text) <= 40 and cell.text.isascii() for cell in cells)
        amounts = [_cents(cell.text) for cell in cells if _is_amount(cell.text)]
        total = _cents(content.fields["total"].split(" ")[-1].lstrip("$"))
        subtotal, tax = amounts[-3:-1] if _is_amount(content.fields["total"]) else amounts[-2:]
        assert subtotal + tax == total


def _is_amount(text: str) -> bool:
    return len(text) > 3 and text[-3] == "." and text.replace(",", "").replace(".", "").isdigit()


def _cents(text: str) -> int:
    return int(text.replace(",", "").replace(".", ""))


def test_boxes_hold_all_ink_and_no_more_than_two_pixels_of_slack() -> None:
    for seed in range(8):
        rng = random.Random(seed)
        layout = lay_out(receipt(rng) if seed % 2 else form(rng), BUILTIN, rng)
        without_lines = type(layout)(layout.width, layout.height, BUILTIN, layout.texts, ())
        pixels = _draw_clean(without_lines, seed)
        boxes = draw_page(without_lines, False, random.Random(seed)).boxes
        is_ink = pixels < int(pixels.max()) - 12
        outside = is_ink.copy()
        for x1, y1, x2, y2 in boxes:
            rows, columns = np.nonzero(is_ink[y1:y2, x1:x2])
            assert rows.min() <= 2 and columns.min() <= 2
            assert rows.max() >= y2 - y1 - 3 and columns.max() >= x2 - x1 - 3
            outside[y1:y2, x1:x2] = False
        assert not outside.any()


def _draw_clean(layout: object, seed: int) -> np.ndarray:
    """Draw with blur and noise switched off; the draws before them stay the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_tools.synth.render.vary_blur", lambda image, size_px, rng: image)
        patch.setattr("data_tools.synth.render.add_noise", lambda pixels, rng: pixels)
        return draw_page(layout, False, random.Random(seed)).pixels  # type: ignore[arg-type]


def test_texts_never_overlap_and_stay_on_the_page() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        layout = lay_out(form(rng) if seed % 2 else receipt(rng), BUILTIN, rng)
        assert 500 <= layout.width <= 800 and 700 <= layout.height <= 1400
        assert all(18 <= text.size_px <= 34 for text in layout.texts)
        covered = np.zeros((layout.height, layout.width), dtype=bool)
        for x1, y1, x2, y2 in draw_page(layout, False, rng).boxes:
            assert not covered[y1:y2, x1:x2].any()
            covered[y1:y2, x1:x2] = True
        for stroke in layout.strokes:
            assert not covered[stroke.y1 : stroke.y2 + 1, stroke.x1 : stroke.x2 + 1].any()


def test_row_too_wide_for_the_page_is_broken() -> None:
    wide = Row((Cell("W" * 30), Cell("M" * 20, 1.0, "right")))
    layout = lay_out(Content((wide,)), BUILTIN, random.Random(0))
    first, second = layout.texts
    assert second.baseline > first.baseline


def test_inverted_page_is_light_on_dark() -> None:
    plain, inverted = (
        pages.draw_document(3, (BUILTIN,), pages.PageSettings("mixed", 0, is_inverted))[1]
        for is_inverted in (False, True)
    )
    assert np.array_equal(np.asarray(inverted), 255 - np.asarray(plain))
    assert np.median(np.asarray(inverted)) < 70


def test_slant_keeps_the_ink_inside_the_canvas() -> None:
    font = open_font(BUILTIN, 40)
    for seed in range(40):
        text = "Wj" * (1 + seed % 20)
        mask = ink_mask(text, font, 10, 5 + round(0.01 * font.getlength(text)))
        slanted = vary_stroke(vary_slant(mask, random.Random(seed)), 40, random.Random(seed))
        edge = np.asarray(slanted).astype(int)
        assert edge[0].max() == edge[-1].max() == edge[:, 0].max() == edge[:, -1].max() == 0


def test_line_sample_is_a_valid_tight_crop(builtin_as_font: None) -> None:
    for number in range(60):
        sample = lines.draw_line(number, BUILTIN_ONLY, lines.LineSettings(seed=1))
        sample.validate()
        image = Image.open(BytesIO(sample.image_bytes[0]))
        assert image.mode == "L" and sample.annotations[0].bbox == (0, 0, *image.size)
        assert image.size == (sample.images[0].width, sample.images[0].height)


def test_upper_labels_are_upper_case() -> None:
    settings = lines.LineSettings(seed=0, upper=True)
    texts = [lines.draw_line(i, BUILTIN_ONLY, settings).annotations[0].text for i in range(30)]
    assert texts == [text.upper() for text in texts]


def test_lines_do_not_depend_on_shards_or_workers(tmp_path: Path, builtin_as_font: None) -> None:
    settings = lines.LineSettings(seed=5, max_chars=12)
    for name, shard_lines, workers in (("a", 100, 1), ("b", 7, 2)):
        lines.write_lines(
            str(tmp_path / name),
            40,
            settings,
            ["x"],
            [],
            0.25,
            workers,
            lines_per_shard=shard_lines,
        )
    assert sorted(path.name for path in (tmp_path / "a").glob("*.tar")) == [
        "train-000000.tar",
        "val-000000.tar",
    ]
    for split, count in (("train", 30), ("val", 10)):
        whole = _members(tmp_path / "a" / f"{split}-000000.tar")
        parts = [_members(path) for path in sorted((tmp_path / "b").glob(f"{split}-*.tar"))]
        assert {k: v for part in parts for k, v in part.items()} == whole
        assert len(whole) == 2 * count


def test_interrupted_lines_go_on_and_other_settings_are_refused(
    tmp_path: Path, builtin_as_font: None
) -> None:
    out, settings = str(tmp_path), lines.LineSettings(seed=0, max_chars=6)
    assert lines.write_lines(out, 20, settings, ["x"], [], 0.0, 1, lines_per_shard=8) == (3, 3)
    (tmp_path / "train-000001.tar").rename(tmp_path / "train-000001.tar.partial")
    kept = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    assert lines.write_lines(out, 20, settings, ["x"], [], 0.0, 1, lines_per_shard=8) == (1, 3)
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == kept
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        lines.write_lines(out, 20, lines.LineSettings(1, 6), ["x"], [], 0.0, 1, 8)


def test_line_shard_reads_back_as_samples(tmp_path: Path, builtin_as_font: None) -> None:
    lines.write_lines(str(tmp_path), 3, lines.LineSettings(0), ["x"], [], 0.0, 1)
    members = _members(tmp_path / "train-000000.tar")
    assert list(members)[:2] == ["line-000000000.png", "line-000000000.json"]
    record = json.loads(members["line-000000001.json"])
    sample = Sample.from_json("line-000000001", record)
    assert sample.source == "synth" and len(sample.annotations) == 1


def test_builtin_face_is_recognised_and_never_among_the_faces(tmp_path: Path) -> None:
    _write_builtin(tmp_path / "Innocent Name.ttf")
    assert fonts.is_builtin_face(ImageFont.load_default(20))  # type: ignore[arg-type]
    assert fonts.is_builtin_face(str(tmp_path / "Innocent Name.ttf"))
    with pytest.raises(ConfigError, match="no usable upright text face"):
        fonts.find_faces([str(tmp_path)])


def test_usable_face_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "is_builtin_face", lambda font: False)
    (tmp_path / "more").mkdir()
    for name in ("Plain.ttf", "more/Plain.ttf", "Plain-Italic.ttf", "Plain-Light.ttf", "Icons.ttf"):
        _write_builtin(tmp_path / name)
    (tmp_path / "Broken.ttf").write_bytes(b"not a font")
    found = fonts.find_faces([str(tmp_path)])
    assert [face.path for face in found] == [str(tmp_path / "Plain.ttf")]


def test_face_without_a_glyph_is_noticed() -> None:
    font = open_font(BUILTIN, 24)
    assert fonts.missing_characters(font) == ""
    assert fonts.missing_characters(font, "A\u4e2d\u00a0") == "\u4e2d\u00a0"


def test_heldout_families_are_drawn_for_validation_only() -> None:
    faces = [
        Face("/f/CourierPrime.ttf", "Courier Prime", "Bold"),
        Face("/f/CourierPrimeCode.ttf", "Courier Prime Code", "Regular"),
        Face("/f/OCRB.otf", "OCR B", "Regular"),
        Face("/f/Hack.ttf", "Hack", "Regular"),
    ]
    train, val = fonts.divide_faces(faces, ["courier prime", "OCR-B"])
    assert [face.family for face in train] == ["Hack"]
    assert len(val) == 3 and not set(train) & set(val)
    assert fonts.divide_faces(faces, []) == (faces, faces)
    with pytest.raises(ConfigError, match="Hakc: no such family.*Hack"):
        fonts.divide_faces(faces, ["Hakc"])
    with pytest.raises(ConfigError, match="holds out every font"):
        fonts.divide_faces(faces, ["C", "O", "H"])


def test_pages_command_writes_the_shape_of_users_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "a"), "--num", "12", "--split-val", "0.25", "--workers", "1"]
    assert main(arguments) == 0
    records = [json.loads(line) for line in (tmp_path / "a" / "labels.jsonl").open()]
    assert sorted(record["split"] for record in records) == ["train"] * 9 + ["val"] * 3
    for record in records:
        image = Image.open(tmp_path / "a" / record["image_path"])
        assert image.size == (record["width"], record["height"])
        assert 15 < len(record["annotations"]) < 80
        for annotation in record["annotations"]:
            x1, y1, x2, y2 = annotation["bbox"]
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_pages_do_not_depend_on_workers(tmp_path: Path) -> None:
    for workers in ("1", "2"):
        out = str(tmp_path / workers)
        assert main([out, "--num", "12", "--workers", workers, "--style", "inverted"]) == 0
    names = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*")}
    assert len(names) == 14  # the images, labels.jsonl and synth.json
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "lines"], "needs --fonts DIR"),
        (["--upper"], "belong to --kind lines"),
        (["--split-val", "1"], "expected a share"),
        (["--num", "0"], "at least 1"),
        (["--fonts", "/no/such/folder"], "no such folder"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([str(tmp_path), *arguments])
