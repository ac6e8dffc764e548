"""Reader: the folder's own settings decide, training's code prepares, boxes come back."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import ConfigError, DataError
from data_tools.examples.images import decode
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.shards import LineOptions, cut_lines
from inference.reader import Reader, read_settings
from tests.inference.oracle import know_answers, page, png
from train.modeling.attention import VARLEN_NAME, register

NOISE = np.random.default_rng(0)


def noise(height, width):
    return NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_settings_come_from_the_export(line_folder):
    settings = read_settings(line_folder)
    assert (settings.unit, settings.template, settings.max_pixels) == ("line", "text-plain", 200704)
    assert [transform.name for transform in settings.preprocess] == ["line_strip"]


def test_folder_of_the_hub_reads_pages_within_its_own_pixel_limits(page_folder, tmp_path):
    folder = shutil.copytree(page_folder, tmp_path / "hub")
    (folder / "lectern.json").unlink()
    settings = read_settings(folder)
    assert (settings.unit, settings.template) == ("page", "text-en")
    assert (settings.min_pixels, settings.max_pixels) == (784, 1605632)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 3136, "longest_edge": 9999}})
    )
    assert read_settings(folder).max_pixels == 9999


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not the settings of a reader"),
        ('{"version": 2, "min_pixels": 1, "max_pixels": 2}', "version"),
        ('{"version": 1}', "min_pixels"),
        ('{"version": 1, "min_pixels": 1, "max_pixels": 2, "unit": "word"}', "unit"),
        ("[]", "not the settings of a reader"),
    ],
)
def test_damaged_settings_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "lectern.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_settings(tmp_path)
    assert "lectern.json" in str(error.value)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no exported model here .* train.export"):
        Reader.load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_that_is_not_there_is_refused(page_folder):
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        Reader.load(page_folder, device="cuda")


def test_text_does_not_depend_on_the_batch(page_folder):
    reader = Reader.load(page_folder, device="cpu", batch_size=1)
    images = [noise(60, 90), noise(140, 50), noise(84, 84)]
    single = reader.read_images(images, max_new_tokens=8)
    reader.batch_size = 3
    assert reader.read_images(images, max_new_tokens=8) == single
    assert single[0].text == reader.encoder.decode(list(single[0].token_ids))
    assert len({reading.token_ids for reading in single}) > 1


def test_gpu_path_of_the_vision_encoder_gives_the_same_text(page_folder, monkeypatch):
    """The variable-length kernel is stood in for by SDPA per window: the calls are checked."""
    calls = []

    def varlen(q, k, v, borders, *others, scale, window_size, **settings):
        calls.append(window_size)
        parts = [
            F.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1) for t in (q, k, v)), scale=scale
            ).transpose(0, 1)
            for a, b in zip(borders.tolist(), borders.tolist()[1:], strict=False)
        ]
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    images = [noise(140, 200)]
    reader = Reader.load(page_folder, device="cpu")
    plain = reader.read_images(images, max_new_tokens=8)
    assert not calls
    register()
    reader.model.model.visual.config._attn_implementation_internal = VARLEN_NAME
    assert reader.read_images(images, max_new_tokens=8) == plain
    assert calls == [(-1, -1)] * 2  # one call for each of the two layers


def test_limit_of_tokens_shows_as_unfinished(page_folder, monkeypatch):
    reader = Reader.load(page_folder, device="cpu")
    know_answers(monkeypatch, {7: "abcdef"})
    readings = [reader.read_images([page(7)], max_new_tokens=n)[0] for n in (6, 7)]
    assert [(reading.text, reading.finished) for reading in readings] == [
        ("abcdef", False),
        ("abcdef", True),
    ]


def test_line_reader_sees_the_strip_that_training_saw(line_folder):
    reader = Reader.load(line_folder, device="cpu")
    strip = reader.prepare([noise(40, 200)]).prompts[0].images[0]
    assert strip.shape[0] == 28


def test_crop_equals_that_of_the_build(line_folder):
    reader = Reader.load(line_folder, device="cpu")
    image = noise(60, 100)
    boxes = [(10, 10, 50, 20), (0, 0, 100, 60), (90, 50, 100, 60)]
    sample = Sample(
        key="a",
        images=(PageImage("a.png", 100, 60),),
        annotations=tuple(Annotation("x", box) for box in boxes),
        image_bytes=(png(image),),
    )
    for line, box in zip(cut_lines(sample, LineOptions((3, 2))), boxes, strict=True):
        np.testing.assert_array_equal(decode(line.image_bytes[0]), reader._crop([image], (0, box)))


def test_lines_of_a_document_are_joined_in_reading_order(line_folder, monkeypatch):
    reader = Reader.load(line_folder, device="cpu")
    know_answers(monkeypatch, {50: "first", 90: "second", 130: "third"})
    pages = [page(50, 300, 100), page(130, 200, 50)]
    pages[0][50:] = 90
    boxes = [(0, (10, 10, 90, 30)), (0, (10, 60, 90, 80)), (1, (5, 5, 60, 30))]
    reading = reader.read_document(pages, boxes)
    assert reading.text == "first\nsecond\nthird"
    assert [(line.image, line.bbox, line.text) for line in reading.lines] == [
        (0, (10, 10, 90, 30), "first"),
        (0, (10, 60, 90, 80), "second"),
        (1, (5, 5, 60, 30), "third"),
    ]
    assert reading.finished


def test_line_reader_refuses_a_document_without_boxes(line_folder):
    reader = Reader.load(line_folder, device="cpu")
    with pytest.raises(ConfigError, match="reads lines, and the document has no boxes"):
        reader.read_document([page(1)])


@pytest.mark.parametrize("box", [(0, (0, 0, 113, 10)), (0, (5, 5, 5, 9)), (1, (0, 0, 5, 5))])
def test_box_off_its_page_is_refused(line_folder, box):
    with pytest.raises(DataError, match="box"):
        Reader.load(line_folder, device="cpu").prepare([page(1)], [box])


def test_answer_boxes_are_mapped_back_to_the_original_page(page_folder, monkeypatch):
    reader = Reader.load(page_folder, device="cpu")
    large = page(9, 1000, 800)  # shrinks to 476 x 392 px: 200,704 px at most
    height, width = reader.prepare([large]).prompts[0].images[0].shape[:2]
    assert (width, height) == (476, 392)
    answer = (
        '[{"bbox_2d": [0, 196, 238, 392], "text": "a"}, {"bbox_2d": [0, 0, 9, 9], "text": "b"}]'
    )
    know_answers(monkeypatch, {9: answer})
    reading = reader.read_images([large], template="lines-en")[0]
    assert reading.lines[0].bbox == (0, 400, 500, 800)
    assert reading.text == "a\nb"
    both = reader.read_document([large, page(9)], template="lines-en")
    assert both.lines is None  # the answer does not say which page


def test_fields_are_parsed_by_the_template(page_folder, monkeypatch):
    reader = Reader.load(page_folder, device="cpu")
    know_answers(monkeypatch, {1: '{"total": "9.50", "company": null}', 2: "no idea"})
    first, second = reader.read_images([page(1), page(2)], template="receipt-fields-en")
    assert first.fields["total"] == "9.50"
    assert second.fields is None
