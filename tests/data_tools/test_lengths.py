"""Lengths: exactly what is trained later, stored with a mark of all that they depend on."""

import dataclasses
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.preprocess import Contrast, LineStrip
from data_tools.examples.tasks import Recipe, ask
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.stream import lengths
from data_tools.stream.index import ShardChangedError, index_path, open_index
from data_tools.stream.lengths import fingerprint, make_lengths, read_lengths
from data_tools.templates import load_template
from tests.builders import make_sample, write_shard, write_shards

TEXT, LINES = load_template("text-en"), load_template("lines-en")
RECIPE = Recipe((TEXT, LINES), (1.0, 1.0))
SETTINGS = ImageSettings(784, 200_000)


def measured(
    shard: str, folder: Path, recipe: Recipe = RECIPE, images: ImageSettings = SETTINGS
) -> Any:
    make_lengths([shard], str(folder), images, recipe, num_workers=0)
    mark = fingerprint(Encoder.from_folder(folder, images), recipe)
    return read_lengths(open_index(shard), mark)


@pytest.mark.parametrize("transforms", [(), (Contrast(),), (LineStrip(),)])
def test_lengths_are_those_of_the_examples(
    tmp_path: Path, byte_folder: Path, transforms: tuple[Any, ...]
) -> None:
    samples = [make_sample(i, num_images=i % 3) for i in range(6)]
    shard = str(write_shard(tmp_path / "a.tar", samples))
    images = ImageSettings(784, 200_000, transforms)
    recipe = Recipe((TEXT,))
    found = measured(shard, byte_folder, recipe, images)
    encoder = Encoder.from_folder(byte_folder, images)
    for row, sample in enumerate(samples):
        page = [np.asarray(image) for image in _decoded(sample)]
        example = encoder.example(
            sample.key, ask(sample, TEXT), tuple(images.prepare(p) for p in page)
        )
        assert found.text[0, row] + found.visual[row] == len(example.input_ids)
        assert found.targets[0, row] == len(example.target_positions)
        assert 4 * found.visual[row] == example.grid_thw.prod(axis=1).sum()
    assert found.reasons == {}


def _decoded(sample: Sample) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(data))) for data in sample.image_bytes]


def test_unusable_samples_have_length_0_and_a_reason(tmp_path: Path, byte_folder: Path) -> None:
    good = dataclasses.replace(
        make_sample(0), annotations=(Annotation("x", (0, 0, 20, 20)),), fields={}
    )
    page = good.images[0]
    unusable: dict[str, dict[str, Any]] = {
        "absurd image size: 6000 x 20 px": {
            "images": (dataclasses.replace(page, width=6000, height=20),)
        },
        'nothing to answer "text-en"': {"annotations": ()},
        "absurd image size: 0 x 20 px": {
            "images": (dataclasses.replace(page, width=0, height=20),)
        },
        "leaves the page": {"annotations": (Annotation("x", (0, 0, 999, 9)),)},
        "malformed messages": {"messages": ({"role": "user"},)},
    }
    bad = [dataclasses.replace(good, key=f"bad-{i}", **c) for i, c in enumerate(unusable.values())]
    shard = str(write_shard(tmp_path / "a.tar", [good, *bad]))
    found = measured(shard, byte_folder)
    assert (found.text[:, 0] > 0).all() and not found.text[:, 1:].any()
    seen_by_index = open_index(shard).reasons
    assert list(seen_by_index) == [1, 3] and list(found.reasons) == [2, 4, 5]
    reasons = seen_by_index | found.reasons
    for row, reason in enumerate(unusable, start=1):
        assert reason in reasons[row]


def test_a_template_without_an_answer_leaves_the_others_theirs(
    tmp_path: Path, byte_folder: Path
) -> None:
    """A line without a box can still be read as text."""
    both = make_sample(0)
    unplaced = dataclasses.replace(make_sample(1), annotations=(Annotation("x"),))
    shard = str(write_shard(tmp_path / "a.tar", [both, unplaced]))
    found = measured(shard, byte_folder)
    assert (found.text > 0).tolist() == [[True, True], [True, False]]
    assert (found.targets > 0).tolist() == [[True, True], [True, False]]
    assert found.visual.all() and found.reasons == {}
    alone = measured(shard, byte_folder, Recipe((TEXT,)))
    assert found.text[0].tolist() == alone.text[0].tolist()


def test_escaped_half_surrogates_are_unusable(tmp_path: Path, byte_folder: Path) -> None:
    """A JSON file can name half a surrogate pair though no UTF-8 text can hold it."""
    path = tmp_path / "a.tar"
    members = make_sample(0).to_members()
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            if name.endswith("json"):
                data = data.replace(b'"text":"', b'"text":"\\ud800', 1)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert "half a surrogate pair" in measured(str(path), byte_folder).reasons[0]


def test_coordinates_of_very_long_pages_are_counted_in_full(
    tmp_path: Path, byte_folder: Path
) -> None:
    """On a page of 11,200 x 1,120 px a box can have 18 digits, two more than four times four."""
    annotation = Annotation("x", (11_000, 1_010, 11_100, 1_100))
    page = PageImage("a.png", 11_200, 1_120)
    sample = Sample("long", (page,), (annotation,), image_bytes=(b"not looked at",))
    shard = str(write_shard(tmp_path / "a.tar", [sample]))
    images = ImageSettings(784, 12_845_056)
    found = measured(shard, byte_folder, Recipe((LINES,)), images)
    turns = ask(sample, LINES, [(11_200, 1_120)])
    num_text, _ = Encoder.from_folder(byte_folder, images).count(turns)
    assert num_text <= found.text[0, 0] <= num_text + 2


def test_workers_measure_the_same(
    tmp_path: Path, byte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "CHUNK", 3)
    one, other = (write_shards(tmp_path / name, [7, 0, 4]) for name in ("a", "b"))
    make_lengths(one, str(byte_folder), SETTINGS, RECIPE, num_workers=0)
    make_lengths(other, str(byte_folder), SETTINGS, RECIPE, num_workers=1)
    mark = fingerprint(Encoder.from_folder(byte_folder, SETTINGS), RECIPE)
    for a, b in zip(one, other, strict=True):
        first, second = read_lengths(open_index(a), mark), read_lengths(open_index(b), mark)
        for field in ("text", "targets", "visual"):
            assert np.array_equal(getattr(first, field), getattr(second, field))
        assert first.text.shape == (2, len(open_index(a)))


def test_lengths_are_made_once(
    tmp_path: Path, byte_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shards(tmp_path, [2])[0]
    measured(shard, byte_folder)
    monkeypatch.setattr(lengths, "_measure", None)
    measured(shard, byte_folder)
    assert len(os.listdir(tmp_path)) == 3


def test_lengths_of_a_replaced_shard_are_refused(tmp_path: Path, byte_folder: Path) -> None:
    shard = write_shards(tmp_path, [3])[0]
    measured(shard, byte_folder)
    os.remove(index_path(shard))
    write_shards(tmp_path, [3], first=7)
    with pytest.raises(ShardChangedError, match=r"lengths-.* was measured on another version"):
        measured(shard, byte_folder)


def test_the_mark_changes_with_everything_that_lengths_depend_on(byte_encoder: Encoder) -> None:
    def mark(recipe: Recipe = RECIPE, images: ImageSettings = SETTINGS, template: str = "") -> str:
        encoder = Encoder(byte_encoder.tokenizer, images)
        original = encoder.tokenizer.chat_template
        try:
            encoder.tokenizer.chat_template = original + template
            return fingerprint(encoder, recipe)
        finally:
            encoder.tokenizer.chat_template = original

    marks = [
        mark(),
        mark(recipe=Recipe((LINES, TEXT), (1.0, 1.0))),
        mark(recipe=Recipe((TEXT,))),
        mark(recipe=Recipe((TEXT.model_copy(update={"prompt": "other"}), LINES), (1.0, 1.0))),
        mark(images=ImageSettings(784, 200_001)),
        mark(images=ImageSettings(785, 200_000)),
        mark(images=ImageSettings(784, 200_000, (Contrast(),))),
        mark(images=ImageSettings(784, 200_000, (Contrast(low_percentile=2.0),))),
        mark(template=" "),
    ]
    assert len(set(marks)) == len(marks)
    byte_encoder.count(ask(make_sample(0), TEXT))
    assert mark() == marks[0]
    assert mark(recipe=Recipe((TEXT, LINES), (2.0, 1.0), seed=9)) == marks[0]
