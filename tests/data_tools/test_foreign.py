"""Tars that are not ours: a text or JSON of another shape beside the images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.errors import DataError
from data_tools.sample import Annotation, Sample
from data_tools.stream.index import index_shard, iterate_samples, open_index
from data_tools.stream.records import KIND_JSON, KIND_SAMPLE, KIND_TEXT
from tests.builders import make_sample
from tests.data_tools.tars import PAGE, Members, encode, write_tar


def rotated(size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(size, exif=exif)


def read_one(tmp_path: Path, members: Members) -> Sample:
    """Read the one sample of a tar, by its index and by the stored one."""
    shard = write_tar(tmp_path / "a.tar", members)
    made = index_shard(shard)
    assert made.reasons == {} and len(made) == 1
    sample = made.read(0)
    assert open_index(shard).read(0) == sample
    sample.validate()
    return sample


def reason_of(tmp_path: Path, members: Members) -> str:
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert set(index.reasons) == {0}
    return index.reasons[0]


def test_a_text_file_is_the_text(tmp_path: Path) -> None:
    text = "\ufeffTOTAL 9.99\n发票\n\n"
    sample = read_one(tmp_path, [("a.jpg", PAGE), ("a.txt", text.encode())])
    assert sample.text == "TOTAL 9.99\n发票" and sample.key == "a"
    assert [(p.width, p.height) for p in sample.images] == [(60, 40)]
    assert sample.image_bytes == (PAGE,) and sample.annotations == ()
    index = open_index(str(tmp_path / "a.tar"))
    assert index.kind.tolist() == [KIND_TEXT] and index.num_chars.tolist() == [13]


@pytest.mark.parametrize("name", ["text", "caption", "transcription"])
def test_json_with_a_text(tmp_path: Path, name: str) -> None:
    record = json.dumps({name: " hello ", "url": "http://x", "width": 1}).encode()
    sample = read_one(tmp_path, [("a.json", record), ("a.jpg", PAGE)])
    assert sample.text == "hello"
    assert open_index(str(tmp_path / "a.tar")).kind.tolist() == [KIND_JSON]


def test_json_in_the_shape_of_the_guide(tmp_path: Path) -> None:
    record = {
        "image_path": "a.jpg",
        "version": "5.0",
        "annotations": [
            {"bbox": [1, 2, 30.5, 20], "text": "TOTAL", "category": "total"},
            {"bbox": [[1, 2], [9, 2], [9, 8], [1, 8]], "text": "a***"},
            {"text": "no box", "category": None},
        ],
        "fields": {"total": 9.99, "items": ["a", "b"], "none": None},
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
    }
    sample = read_one(tmp_path, [("a.jpg", PAGE), ("a.json", json.dumps(record).encode())])
    assert sample.annotations == (
        Annotation("TOTAL", (1, 2, 31, 20), category="total"),
        Annotation("a***", (1, 2, 9, 8), weight=0.0),
        Annotation("no box"),
    )
    assert sample.fields == {"total": "9.99", "items": ["a", "b"], "none": None}
    assert sample.messages == tuple(record["messages"]) and sample.text is None


def test_several_images_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    pages = [encode((30 + i, 20)) for i in range(11)]
    members = sorted([(f"a.{i}.jpg", page) for i, page in enumerate(pages)] + [("a.txt", b"x")])
    sample = read_one(tmp_path, members)
    assert sample.image_bytes == tuple(pages)
    assert [page.width for page in sample.images] == [30 + i for i in range(11)]


@pytest.mark.parametrize("kind, extension", [("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_sizes_come_from_any_header_and_are_oriented(
    tmp_path: Path, kind: str, extension: str
) -> None:
    page = encode((50, 35), kind)
    sample = read_one(tmp_path, [(f"a.{extension}", page), ("a.txt", b"x")])
    assert (sample.images[0].width, sample.images[0].height) == (50, 35)
    assert sample.images[0].file == f"0.{extension}"
    turned = read_one(tmp_path, [("a.jpeg", rotated((60, 40))), ("a.txt", b"x")])
    assert (turned.images[0].width, turned.images[0].height) == (40, 60)


def test_json_without_a_text_gives_way_to_a_text_file(tmp_path: Path) -> None:
    metadata = json.dumps({"url": "http://x", "sha256": "0"}).encode()
    for record in (metadata, b"[1, 2]"):
        sample = read_one(tmp_path, [("a.jpg", PAGE), ("a.json", record), ("a.txt", b"hello")])
        assert sample.text == "hello"


def test_our_own_record_goes_before_a_text_file(tmp_path: Path) -> None:
    sample = make_sample(0)
    members = [*sample.to_members().items(), ("doc-0000.txt", b"x")]
    assert read_one(tmp_path, members) == sample
    assert open_index(str(tmp_path / "a.tar")).kind.tolist() == [KIND_SAMPLE]


BOX_OUTSIDE = {"annotations": [{"bbox": [0, 0, 99, 10], "text": "x"}]}


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("a.jpg", PAGE), ("a.cls", b"1")], "no record: expected KEY.json or KEY.txt"),
        ([("a.txt", b"hello")], "no image: expected KEY.jpg"),
        ([("a.jpg", PAGE), ("a.txt", b" \n")], "no text: a.txt is empty"),
        ([("a.jpg", PAGE), ("a.txt", b"\xff\xfe\xfa")], "text is not UTF-8: "),
        ([("a.jpg", PAGE), ("a.json", b"{}")], "no text: expected one of text, caption"),
        ([("a.jpg", PAGE), ("a.json", b'{"text": ""}')], "no text: expected one of"),
        ([("a.jpg", PAGE), ("a.json", b"{"), ("a.txt", b"x")], "invalid JSON: "),
        ([("a.jpg", b""), ("a.txt", b"x")], "unreadable image: image 0, "),
        ([("a.jpg", PAGE[:100]), ("a.txt", b"x")], "unreadable image: image 0, "),
        ([("a.png", encode((1, 300), "PNG")), ("a.txt", b"x")], "absurd image size: 1 x 300 px"),
        (
            [("a.jpg", PAGE), ("a.json", b'{"annotations": {}}')],
            "malformed record: annotations is not a list",
        ),
        (
            [("a.jpg", PAGE), ("a.json", b'{"annotations": [{"bbox": null}]}')],
            "malformed record: an annotation has no text",
        ),
        (
            [("a.jpg", PAGE), ("a.json", b'{"messages": ["x"]}')],
            "malformed record: messages is not a list of role and content",
        ),
        ([("a.jpg", PAGE), ("a.json", b'{"fields": []}')], "malformed record: fields is not an"),
        (
            [("a.jpg", PAGE), ("a.json", json.dumps(BOX_OUTSIDE).encode())],
            "malformed record: box 0 [0, 0, 99, 10] is empty or leaves the page",
        ),
        (
            [("a.jpg", PAGE), ("a.json", b'{"annotations": [{"text": "x", "image": 1}]}')],
            "malformed record: annotation 0 names image 1 of 1",
        ),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, members: Members, reason: str) -> None:
    assert reason_of(tmp_path, members).startswith(reason)


def test_a_foreign_sample_at_a_cut_is_not_taken_for_whole(tmp_path: Path) -> None:
    """Nobody knows whether more of its images stood behind the cut."""
    members = [("a.0.jpg", PAGE), ("a.txt", b"a"), ("b.0.jpg", PAGE), ("b.txt", b"b")]
    shard = Path(write_tar(tmp_path / "a.tar", [*members, ("b.1.jpg", PAGE)]))
    index = index_shard(str(shard))
    assert index.keys == ["a", "b"]
    cut = int(index.image_start[2]) + int(index.offset[1]) - 100
    shard.write_bytes(shard.read_bytes()[:cut])
    found = index_shard(str(shard))
    assert found.keys == ["a"] and found.damage


def test_shards_that_stock_webdataset_writes(tmp_path: Path) -> None:
    """As its users do, through its encoders of images, texts and JSON."""
    pages = [np.random.default_rng(i).integers(0, 255, (20 + i, 30, 3), np.uint8) for i in range(6)]
    with webdataset.ShardWriter(f"{tmp_path}/w-%06d.tar", maxcount=4, verbose=0) as writer:
        for number, page in enumerate(pages):
            record = (
                {"txt": f"text {number}"} if number % 2 else {"json": {"text": f"text {number}"}}
            )
            writer.write({"__key__": f"k{number}", "png": page} | record)
    samples = list(iterate_samples([f"{tmp_path}/w-*.tar"]))
    assert [sample.text for sample in samples] == [f"text {number}" for number in range(6)]
    for sample, page in zip(samples, pages, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image_bytes[0]))), page)
        assert (sample.images[0].height, sample.images[0].width) == page.shape[:2]


def test_a_compressed_shard_of_stock_webdataset_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tar.gz")
    with webdataset.TarWriter(path) as writer:
        writer.write({"__key__": "a", "jpg": PAGE, "txt": "x"})
    with pytest.raises(DataError, match="compressed with gzip"):
        index_shard(path)
