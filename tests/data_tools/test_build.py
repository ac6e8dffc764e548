"""Building shards: plan, checks, page and line units, resuming, the share of bad documents."""

import json
import os
import tarfile
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools import build as build_module
from data_tools.build import build, main, parse_margin, plan_shards
from data_tools.errors import BadDataShareError, ConfigError, DataError
from data_tools.formats import SourceDocument
from data_tools.sample import Sample
from data_tools.shards import LineOptions
from data_tools.stream.index import open_index

LINES = LineOptions((3, 2))
ORIENTATION = 0x0112  # the EXIF tag


def page(seed: int = 0, size: tuple[int, int] = (120, 90)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_source(folder: Path, num: int = 6, **changes: dict) -> Path:
    """Write `num` documents d0, d1, ... of two lines; `d3={...}` changes the entry of d3."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(num):
        page(number).save(folder / "images" / f"d{number}.png")
        annotations = [
            {"bbox": [10, 10, 60, 30], "text": f"first {number}", "category": "company"},
            {"bbox": [100, 70, 120, 90], "text": "second", "category": None},
        ]
        entry = {"image_path": f"images/d{number}.png", "annotations": annotations}
        entry |= {"split": "val" if number % 3 == 2 else "train", "shop": "s1"}
        entries.append(entry | changes.get(f"d{number}", {}))
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def samples_of(path: Path) -> list[Sample]:
    """Read a shard as any tar, without this project's index."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            stream = tar.extractfile(member)
            assert stream is not None
            parts.setdefault(key, {})[extension] = stream.read()
    return [
        Sample.from_json(
            key,
            json.loads(members["json"]),
            tuple(content for name, content in sorted(members.items()) if name != "json"),
        )
        for key, members in parts.items()
    ]


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejected.jsonl").open()]


def test_pages_are_copied_byte_for_byte_with_their_truth(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "set"), tmp_path / "out"
    assert build(str(source), str(out)).samples == 6
    train, val = samples_of(out / "train-000000.tar"), samples_of(out / "val-000000.tar")
    assert [sample.key for sample in train] == ["d0", "d1", "d3", "d4"]
    assert [sample.key for sample in val] == ["d2", "d5"]
    for sample in train + val:
        sample.validate()
        assert sample.image_bytes == ((source / "images" / f"{sample.key}.png").read_bytes(),)
        assert (sample.images[0].width, sample.images[0].height) == (120, 90)
        assert sample.annotations[0].text == f"first {sample.key[1]}"
        assert sample.tags == {"shop": "s1"} and sample.source == "set"
    assert len(open_index(str(out / "train-000000.tar"))) == 4


def test_lines_are_cut_with_their_place_on_the_page(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "set", num=1), tmp_path / "out"
    assert build(str(source), str(out), line_options=LINES).samples == 2
    first, second = samples_of(out / "train-000000.tar")
    assert (first.key, second.key) == ("d0-0000", "d0-0001")
    assert first.tags == {"shop": "s1", "document": "d0", "box": [10, 10, 60, 30]}
    assert first.annotations[0].bbox == (0, 0, 56, 24)  # 3 px left and right, 2 px up and down
    assert first.annotations[0].category == "company"
    pixels = np.asarray(Image.open(BytesIO(first.image_bytes[0])))
    assert np.array_equal(pixels, np.asarray(page(0))[8:32, 7:63])
    assert (second.images[0].width, second.images[0].height) == (23, 22)  # clipped to the page


def test_weight_and_colour_survive_the_cut(tmp_path: Path) -> None:
    annotations = [{"bbox": [1, 1, 20, 20], "text": "***"}]
    source = make_source(tmp_path / "set", num=1, d0={"annotations": annotations})
    Image.new("RGB", (120, 90), "red").save(source / "images" / "d0.png")
    build(str(source), str(tmp_path / "out"), line_options=LINES)
    (line,) = samples_of(tmp_path / "out" / "train-000000.tar")
    assert line.annotations[0].weight == 0.0
    image = Image.open(BytesIO(line.image_bytes[0]))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("line_options", [None, LINES])
def test_size_and_boxes_are_those_of_the_oriented_image(
    tmp_path: Path, line_options: LineOptions | None
) -> None:
    annotations = [{"bbox": [60, 100, 90, 120], "text": "corner"}]  # outside the stored 120 x 90
    source = make_source(tmp_path / "set", num=1, d0={"annotations": annotations})
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # stored lying, shown upright
    page(5).save(source / "images" / "d0.png", exif=exif)
    build(str(source), str(tmp_path / "out"), line_options=line_options)
    (sample,) = samples_of(tmp_path / "out" / "train-000000.tar")
    if line_options is None:
        assert (sample.images[0].width, sample.images[0].height) == (90, 120)
        assert sample.annotations[0].bbox == (60, 100, 90, 120)
    else:
        upright = np.asarray(page(5).transpose(Image.Transpose.ROTATE_270))
        pixels = np.asarray(Image.open(BytesIO(sample.image_bytes[0])))
        assert np.array_equal(pixels, upright[98:120, 57:90])


def test_several_pages_keep_their_order(tmp_path: Path) -> None:
    annotations = [
        {"bbox": [0, 0, 10, 10], "text": "a"},
        {"bbox": [0, 0, 40, 10], "text": "b", "image": 1},
    ]
    change = {"image_path": ["images/d0.png", "images/d1.png"], "annotations": annotations}
    source = make_source(tmp_path / "set", num=2, d0=change)
    build(str(source), str(tmp_path / "pages"))
    first = samples_of(tmp_path / "pages" / "train-000000.tar")[0]
    assert first.image_bytes[1] == (source / "images" / "d1.png").read_bytes()
    build(str(source), str(tmp_path / "lines"), line_options=LineOptions((0, 0)))
    lines = samples_of(tmp_path / "lines" / "train-000000.tar")
    assert lines[1].tags["image"] == 1 and lines[1].annotations[0].image == 0
    pixels = np.asarray(Image.open(BytesIO(lines[1].image_bytes[0])))
    assert np.array_equal(pixels, np.asarray(page(1))[:10, :40])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_path": "images/absent.png"}, "image missing"),
        ({"image_path": "broken.png"}, "image without readable header"),
        ({"image_path": "huge.png"}, "image without readable header, or of absurd size"),
        ({"image_path": "strip.png"}, "image more than 200 times as long as wide"),
        ({"image_path": "labels.jsonl"}, "image type is none of"),
        ({"width": 90, "height": 120}, "declared width and height"),
        ({"annotations": []}, "nothing to learn"),
        ({"annotations": 3}, "annotations is not a list"),
    ],
)
def test_unusable_document_is_rejected_with_its_reason(
    tmp_path: Path, change: dict, reason: str
) -> None:
    source, out = make_source(tmp_path / "set", d1=change), tmp_path / "out"
    (source / "broken.png").write_bytes(b"\x89PNG no more")
    (source / "huge.png").write_bytes(_png_header(20_000, 20_000))
    Image.new("L", (1005, 5)).save(source / "strip.png")
    summary = build(str(source), str(out))
    assert (summary.documents, summary.samples, summary.rejected_documents) == (6, 5, 1)
    (record,) = rejected(out)
    assert record["reason"].startswith(reason) and record["where"] == "labels.jsonl:2"
    assert summary.rejected == {record["reason"]: 1}


def _png_header(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims another size."""
    stream = BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("bbox", "text", "outcome"),
    [
        ([-3, -1, 20, 20], "a", (0, 0, 20, 20)),
        ([100, 70, 123, 93], "a", (100, 70, 120, 90)),
        ([-4, 0, 20, 20], "a", "box leaves the page by more than 3 px"),
        ([100, 70, 124, 90], "a", "box leaves the page by more than 3 px"),
        ([-3, 0, 0, 20], "a", "box leaves the page by more than 3 px"),
        ([20, 10, 20, 30], "a", "empty box"),
        ([30, 10, 20, 30], "a", "empty box"),
        ([1, 1, 20, 20], " \t", "empty text"),
    ],
)
def test_box_is_clipped_or_its_annotation_rejected(
    tmp_path: Path, bbox: list[int], text: str, outcome: object
) -> None:
    annotations = [{"bbox": bbox, "text": text}, {"bbox": [1, 1, 9, 9], "text": "kept"}]
    source = make_source(tmp_path / "set", num=1, d0={"annotations": annotations})
    summary = build(str(source), str(tmp_path / "out"))
    (sample,) = samples_of(tmp_path / "out" / "train-000000.tar")
    if isinstance(outcome, tuple):
        assert sample.annotations[0].bbox == outcome and not summary.rejected
    else:
        assert [annotation.text for annotation in sample.annotations] == ["kept"]
        assert summary.rejected == {outcome: 1} and summary.rejected_documents == 0
        assert rejected(tmp_path / "out")[0]["where"] == "labels.jsonl:1, annotation 0"


def test_cut_off_image_is_found_when_lines_are_cut(tmp_path: Path) -> None:
    change = {"image_path": "images/d1.jpg"}
    source, out = make_source(tmp_path / "set", d1=change), tmp_path / "out"
    stream = BytesIO()
    page(1).save(stream, "JPEG")
    (source / "images" / "d1.jpg").write_bytes(stream.getvalue()[:3000])
    summary = build(str(source), str(out), line_options=LINES)
    assert summary.samples == 10
    assert rejected(out)[0]["reason"] == "image cannot be decoded"
    assert rejected(out)[0]["key"] == "d1"


@given(
    st.lists(st.tuples(st.sampled_from(["train", "val"]), st.integers(0, 50)), max_size=40),
    st.integers(1, 120),
)
def test_plan_keeps_order_and_size(documents: list[tuple[str, int]], shard_bytes: int) -> None:
    given_documents = [
        (SourceDocument(key=f"k{number}", image_paths=(), split=split), size)
        for number, (split, size) in enumerate(documents)
    ]
    plan = plan_shards(given_documents, shard_bytes)
    for split in ("train", "val"):
        shards = [shard for name, shard in plan.items() if name.startswith(split)]
        flat = [entry for shard in shards for entry in shard]
        assert flat == [entry for entry in given_documents if entry[0].split == split]
        for shard in shards:
            sizes = [size for _, size in shard]
            assert sum(sizes) <= shard_bytes or sum(map(bool, sizes)) == 1


def test_shards_do_not_depend_on_workers(tmp_path: Path) -> None:
    source = str(make_source(tmp_path / "set", num=9))
    for workers in (1, 2):
        out = str(tmp_path / str(workers))
        assert build(source, out, shard_bytes=25_000, workers=workers).shards > 3
    names = sorted(path.name for path in (tmp_path / "1").glob("*.tar"))
    assert names == sorted(path.name for path in (tmp_path / "2").glob("*.tar"))
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_interrupted_build_goes_on_and_keeps_its_rejections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"annotations": [{"bbox": [5, 5, 5, 9], "text": "x"}, {"text": "y"}]}
    source = make_source(tmp_path / "set", num=8, d0=bad, d7=bad)
    whole = build(str(source), str(tmp_path / "whole"), shard_bytes=25_000)
    out = tmp_path / "out"
    done: list[object] = []

    def stop_at_third(job: object) -> str:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return original(job)  # type: ignore[arg-type]

    original = build_module.build_shard
    monkeypatch.setattr(build_module, "build_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(str(source), str(out), shard_bytes=25_000)
    assert not (out / "summary.json").exists()
    monkeypatch.setattr(build_module, "build_shard", original)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) == 2
    assert build(str(source), str(out), shard_bytes=25_000) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert whole.rejected == {"empty box": 2}
    assert rejected(out) == rejected(tmp_path / "whole")


def test_typed_twice_it_says_that_it_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(make_source(tmp_path / "set")), str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "documents read  6" in first and "samples written 6 in 2 shards" in first
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == first and "already built" in again.err


def test_other_options_or_a_changed_source_are_refused(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "set"), str(tmp_path / "out")
    build(str(source), out)
    with pytest.raises(ConfigError, match="unit was 'page', now 'line'"):
        build(str(source), out, line_options=LINES)
    with pytest.raises(ConfigError, match="other settings: shard_bytes was 100000000, now 9"):
        build(str(source), out, shard_bytes=9)
    labels = source / "labels.jsonl"
    labels.write_text(labels.read_text().replace("second", "2nd"))
    with pytest.raises(ConfigError, match="documents was '6, digest .*', now '6, digest "):
        build(str(source), out)


def test_too_many_bad_documents_end_with_65_after_everything_is_written(tmp_path: Path) -> None:
    source = make_source(tmp_path / "set", d1={"image_path": "absent.png"})
    out = tmp_path / "out"
    arguments = [str(source), str(out), "--workers", "1"]
    for _ in range(2):  # also when it is typed again
        with pytest.raises(BadDataShareError, match=r"1 of 6 documents \(16.7%\).*5.0%") as error:
            main(arguments)
        assert error.value.exit_code == 65
    assert len(samples_of(out / "train-000000.tar")) == 3
    assert main([*arguments, "--max-rejected", "0.2"]) == 0


def test_shard_without_any_usable_document_is_not_written(tmp_path: Path) -> None:
    source = make_source(tmp_path / "set", num=3, d2={"annotations": []})
    summary = build(str(source), str(tmp_path / "out"))
    assert summary.shards == 1 and not (tmp_path / "out" / "val-000000.tar").exists()


def test_source_without_a_usable_document_is_an_error(tmp_path: Path) -> None:
    source = make_source(tmp_path / "set", num=1, d0={"image_path": "absent.png"})
    with pytest.raises(DataError, match="no usable document as format guide .1 x image missing"):
        build(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--margin", "3"], "belongs to --unit line"),
        (["--unit", "line", "--margin", "a"], "expected whole pixels"),
        (["--unit", "line", "--margin", "-1"], "expected whole pixels"),
        (["--shard-mb", "0"], "--shard-mb must be above 0"),
    ],
)
def test_wrong_options_are_explained(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([str(make_source(tmp_path / "set", num=1)), str(tmp_path / "out"), *options])


def test_margin_is_one_number_or_two() -> None:
    assert (parse_margin("3"), parse_margin("4,1")) == ((3, 3), (4, 1))


def test_maestro_folder_is_built(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    page().save(tmp_path / "set" / "train" / "a.png")
    line = {"image": "a.png", "prefix": "read", "suffix": "TOTAL"}
    (tmp_path / "set" / "train" / "annotations.jsonl").write_text(json.dumps(line))
    build(str(tmp_path / "set"), str(tmp_path / "out"))
    (sample,) = samples_of(tmp_path / "out" / "train-000000.tar")
    assert sample.messages is not None and sample.messages[1]["content"][0]["text"] == "TOTAL"


@pytest.mark.parametrize(("unit", "train", "val"), [("page", 398, 60), ("line", 20_799, 3_295)])
def test_real_receipts_build_whole(tmp_path: Path, unit: str, train: int, val: int) -> None:
    shared = os.environ.get("LECTERN_SHARED")
    if not shared or not (Path(shared) / "sroie" / "labels.jsonl").is_file():
        pytest.skip("LECTERN_SHARED does not name a folder with sroie/labels.jsonl")
    options = LINES if unit == "line" else None
    source = str(Path(shared) / "sroie")
    summary = build(source, str(tmp_path), line_options=options, shard_bytes=30_000_000, workers=2)
    assert summary.documents == 458 and not summary.rejected
    counts: Counter[str] = Counter()
    for path in tmp_path.glob("*.tar"):
        counts[path.name.split("-")[0]] += len(open_index(str(path)))
    assert counts == {"train": train, "val": val}
