"""Pictures of samples: the page as the model sees it, boxes where the texts are, texts beside."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from data_tools.errors import ConfigError, DataError
from data_tools.examples.augment import Augmentation
from data_tools.examples.encode import ImageSettings
from data_tools.peek import View, main, parse_augment
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.views.drawing import MARGIN_PX, PLAIN_COLOUR, Fonts, draw_sample_page
from data_tools.views.measured import parse_transforms
from tests.builders import encode_png, make_sample, write_shard, write_shards

HEAD_PX = 22 + MARGIN_PX  # one line above the page


def blank_sample(width: int, height: int, box: tuple[int, int, int, int]) -> Sample:
    page = np.full((height, width, 3), 255, np.uint8)
    return Sample(
        key="page",
        images=(PageImage("page.png", width, height),),
        annotations=(Annotation("TOTAL 12.50", box),),
        image_bytes=(encode_png(page),),
    )


def test_boxes_lie_on_the_resized_page(tmp_path: Path) -> None:
    sample = blank_sample(1400, 1400, (700, 700, 1000, 800))
    view = View(ImageSettings(784, 700 * 700))
    moved, (image,) = view.prepare(sample)
    assert image.shape == (700, 700, 3)
    sheet = draw_sample_page(moved, 0, image, ["page"], Fonts.load(None), boxes=True)
    page = np.asarray(sheet)[HEAD_PX:, MARGIN_PX:]
    colour = ImageColor.getrgb(PLAIN_COLOUR)
    rows, columns = np.nonzero((page[:700, :700] == colour).all(axis=2))
    assert (rows.max() + 1, columns.max() + 1) == (400, 500)  # of 800 and 1000 before the resize
    assert (page[350, 360:490] == colour).all() and (page[360:390, 350] == colour).all()


def test_boxes_move_with_the_augmented_page(tmp_path: Path) -> None:
    sample = blank_sample(700, 700, (300, 100, 400, 150))
    plain = View(ImageSettings(784, 490_000))
    augmentation = Augmentation(rotate_deg=10.0, shear=0.2)
    views = [dataclasses.replace(plain, augmentation=augmentation, epoch=e) for e in range(6)]
    boxes = {view.prepare(sample)[0].annotations[0].bbox for view in [plain, *views]}
    assert len(boxes) > 2
    assert views[0].prepare(sample)[0] == views[0].prepare(sample)[0]


def test_command_draws_the_wanted_number_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, [3, 4])
    out = tmp_path / "out"
    assert main([*shards, str(out), "--num", "4", "--seed", "1"]) == 0
    first = sorted(out.glob("*.png"))
    assert [str(path) for path in first] == sorted(capsys.readouterr().out.split())
    assert len(first) == 4
    assert main([*shards, str(tmp_path / "again"), "--num", "4", "--seed", "1"]) == 0
    again = sorted((tmp_path / "again").glob("*.png"))
    assert [p.name for p in again] == [p.name for p in first]
    assert first[0].read_bytes() == again[0].read_bytes()
    assert Image.open(first[0]).width > 560


def test_a_key_and_every_page_of_it(tmp_path: Path) -> None:
    pages = make_sample(5, num_images=2)
    shard = write_shard(tmp_path / "a.tar", [make_sample(0), pages])
    assert main([str(shard), str(tmp_path / "out"), "--key", "doc-0005"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["doc-0005-1.png", "doc-0005.png"]
    with pytest.raises(DataError, match='no sample "other" in 1 shards'):
        main([str(shard), str(tmp_path / "out"), "--key", "other"])


def test_a_sample_that_cannot_be_decoded_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_sample(0)
    bad = dataclasses.replace(make_sample(1), image_bytes=(make_sample(1).image_bytes[0][:-40],))
    shard = write_shard(tmp_path / "a.tar", [good, bad])
    assert main([str(shard), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "doc-0000.png" in captured.out and 'sample "doc-0001"' in captured.err
    alone = write_shard(tmp_path / "b.tar", [bad])
    with pytest.raises(DataError, match="no sample could be drawn"):
        main([str(alone), str(tmp_path / "out")])


def test_transforms_that_change_the_geometry_draw_no_boxes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [make_sample(0)])
    arguments = [str(shard), str(tmp_path / "out"), "--min-pixels", "784"]
    assert main([*arguments, "--preprocess", "{name: line_strip, stretch: 2.5}"]) == 0
    picture = np.asarray(Image.open(tmp_path / "out" / "doc-0000.png"))
    page = picture[:, : picture.shape[1] - 560 - MARGIN_PX]
    assert not (page == ImageColor.getrgb(PLAIN_COLOUR)).all(axis=2).any()


def test_settings_on_the_command_line_are_checked() -> None:
    expected = Augmentation(rotate_deg=2.0, noise_sigma=6.0)
    assert parse_augment("rotate_deg=2,noise_sigma=6") == expected
    for text in ("rotate=2", "rotate_deg", "rotate_deg=x", "rotate_deg=-1", "rotate_deg=nan"):
        with pytest.raises(ConfigError, match="expected NAME=NUMBER, NAME one of rotate_deg"):
            parse_augment(text)
    assert parse_transforms(["contrast"])[0].name == "contrast"
    for text in ("cartoon", "{name: contrast, low: 1}", "{name: ["):
        with pytest.raises(ConfigError, match="--preprocess"):
            parse_transforms([text])
    with pytest.raises(ConfigError, match="--num"):
        main(["a.tar", "out", "--num", "0"])
