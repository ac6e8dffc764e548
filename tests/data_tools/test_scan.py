"""The walk over a tar: samples that cannot be used, tars that are damaged, files that are none."""

import dataclasses
import json
import re
import tarfile
import zlib
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.sample import PageImage
from data_tools.stream.index import index_shard, iterate_samples, open_index
from data_tools.stream.records import KIND_UNUSABLE
from tests.builders import make_sample, write_shards
from tests.data_tools.tars import Members, members_of, write_tar

SAMPLES = [make_sample(0), make_sample(1)]
IMAGE_0, JSON_0, IMAGE_1, JSON_1 = members_of(*SAMPLES)
NO_IMAGES = dataclasses.replace(SAMPLES[0], images=(), annotations=(), image_bytes=())
TALL = dataclasses.replace(SAMPLES[0], images=(PageImage("a.png", 1, 20_000),), annotations=())
HUGE = dataclasses.replace(SAMPLES[0], images=(PageImage("a.png", 60_000, 60_000),))
OTHER_VERSION = json.dumps(json.loads(JSON_0[1]) | {"version": 9}).encode()


@pytest.mark.parametrize(
    "members, reasons",
    [
        (
            [IMAGE_0, IMAGE_1, JSON_0, JSON_1],
            {
                0: "no record: expected KEY.json or KEY.txt",
                1: "no record: expected",
                2: "key used twice: two samples share it, or the members of one are not adjacent",
                3: "key used twice",
            },
        ),
        ([JSON_0, IMAGE_1, JSON_1], {0: "image files missing or too many: 0 in the tar, 1 in"}),
        (
            [IMAGE_0, JSON_0, IMAGE_1, JSON_1, IMAGE_0, JSON_0],
            {2: "key used twice"},
        ),
        ([IMAGE_0, JSON_0, JSON_0, IMAGE_1, JSON_1], {0: "two records: 2 x doc-0000.json"}),
        ([IMAGE_0, IMAGE_1, JSON_1], {0: "no record"}),
        ([IMAGE_0, IMAGE_0, JSON_0, IMAGE_1, JSON_1], {0: "image files missing or too many: 2 in"}),
        ([IMAGE_0, ("doc-0000.json", b"{"), IMAGE_1, JSON_1], {0: "invalid JSON: Expecting"}),
        ([IMAGE_0, ("doc-0000.json", b"[]"), IMAGE_1, JSON_1], {0: "no JSON object: list"}),
        ([IMAGE_0, ("doc-0000.json", b'{"version": 1}')], {0: "malformed record: malformed JSON"}),
        ([IMAGE_0, ("doc-0000.json", OTHER_VERSION)], {0: "malformed record: version 9, expected"}),
        ([IMAGE_0, ("doc-0000.json", b'"\xff"')], {0: "invalid JSON: 'utf-8' codec"}),
        ([IMAGE_0, ("doc-0000.json", b"[" * 100_000)], {0: "invalid JSON: "}),
        ([("a\nb.json", JSON_0[1])], {0: "the key holds a character that no key may have"}),
        (members_of(TALL), {0: "absurd image size: 1 x 20000 px"}),
        (members_of(HUGE), {0: "absurd image size: 60000 x 60000 px"}),
        ([JSON_0, JSON_1, IMAGE_0], {0: "image files", 1: "image files", 2: "key used twice"}),
        (
            [*members_of(NO_IMAGES), IMAGE_1, JSON_1, ("doc-0000.png", b"x")],
            {2: "key used twice"},
        ),
    ],
)
def test_a_sample_that_cannot_be_used_stays_with_a_reason(
    tmp_path: Path, members: Members, reasons: dict[int, str]
) -> None:
    shard = write_tar(tmp_path / "a.tar", members)
    for index in (index_shard(shard), open_index(shard)):
        assert index.damage == "" and set(index.reasons) == set(reasons)
        for row in range(len(index)):
            if row not in reasons:
                assert index.read(row) in (*SAMPLES, NO_IMAGES)
                continue
            assert index.reasons[row].startswith(reasons[row])
            assert index.kind[row] == KIND_UNUSABLE
            with pytest.raises(DataError, match=re.escape(reasons[row])) as caught:
                index.read(row)
            assert f'{shard}, sample "{index.keys[row]}": ' in str(caught.value)
    usable = [row for row in range(len(index)) if row not in reasons]
    assert list(iterate_samples([shard])) == [index.read(row) for row in usable]


def test_a_key_in_no_known_encoding_is_kept_readable(tmp_path: Path) -> None:
    shard = Path(write_tar(tmp_path / "a.tar", [IMAGE_0, JSON_0, ("doc-xxxx.json", b"{}")]))
    shard.write_bytes(shard.read_bytes().replace(b"doc-xxxx", b"doc-\xff\xffxx"))
    data = bytearray(shard.read_bytes())
    place = data.index(b"doc-\xff")
    header = data[place : place + 512]
    header[148:156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(header)
    shard.write_bytes(data)
    index = index_shard(str(shard))
    assert index.keys == ["doc-0000", "doc-\\udcff\\udcffxx"]
    assert index.reasons == {1: "the key holds a character that no key may have"}


def cuts(size: int) -> list[int]:
    return [700, *range(1024, size - 1024, 512), size // 2 + 7]


@pytest.mark.parametrize("is_record_first", [False, True])
def test_a_tar_cut_anywhere_keeps_its_whole_samples(tmp_path: Path, is_record_first: bool) -> None:
    members = [members_of(make_sample(number)) for number in range(3)]
    members = [part[::-1] if is_record_first else part for part in members]
    whole = Path(write_tar(tmp_path / "a.tar", [member for part in members for member in part]))
    data, index = whole.read_bytes(), index_shard(str(whole))
    ends = [int(index.offset[row]) + int(index.size[row]) for row in range(3)]
    cut = tmp_path / "cut.tar"
    for size in cuts(len(data.rstrip(b"\0"))):
        cut.write_bytes(data[:size])
        num_whole = sum(end <= size for end in ends)
        if num_whole == 0:
            with pytest.raises(DataError, match=r"cut.tar: no readable tar file with a whole"):
                index_shard(str(cut))
            continue
        found = index_shard(str(cut))
        assert found.damage.startswith("damaged or cut off at byte ") and not found.reasons
        assert [found.read(row) for row in range(len(found))] == [
            make_sample(row) for row in range(num_whole)
        ]


@pytest.mark.parametrize("size", [0, 1, 511, 512])
def test_a_tar_without_one_member_is_refused(tmp_path: Path, size: int) -> None:
    shard = Path(write_shards(tmp_path, [1])[0])
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(DataError, match=r"train-000000.tar: no readable tar file"):
        index_shard(str(shard))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    shard = Path(write_shards(tmp_path, [3])[0])
    index = index_shard(str(shard))
    data = bytearray(shard.read_bytes())
    data[int(index.offset[1]) + 10] ^= 1
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(data)
    found = index_shard(str(damaged))
    assert found.damage == f"damaged or cut off at byte {int(index.offset[1])}"
    assert found.keys == ["doc-0000"]


def test_tars_put_together_with_cat_are_not_read_in_part_silently(tmp_path: Path) -> None:
    one, two = (Path(path) for path in write_shards(tmp_path, [2, 2]))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    index = index_shard(str(both))
    assert len(index) == 2 and index.damage.startswith("more data behind its end at byte ")


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    """Wherever it is in the sample, and only in that sample."""
    shard = Path(write_shards(tmp_path, [3])[0])
    index, data = index_shard(str(shard)), shard.read_bytes()
    start, size = int(index.offset[1]), int(index.size[1])
    for place in range(start, start + size, 37):
        changed = bytearray(data)
        changed[place] ^= 4
        part = bytes(changed[start : start + size])
        assert zlib.crc32(part) != index.crc32[1] == zlib.crc32(data[start : start + size])
        with pytest.raises(DataError, match=r'"doc-0001": bytes differ from the index \(crc32\)'):
            index.parse(1, part)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 100, bytes(range(256)) * 16])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: no readable tar file"):
        index_shard(str(shard))


@pytest.mark.parametrize(
    "mode, name, command",
    [("w:gz", "gzip", "gunzip"), ("w:bz2", "bzip2", "bunzip2"), ("w:xz", "xz", "unxz")],
)
def test_compressed_tars_are_named(tmp_path: Path, mode: str, name: str, command: str) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(DataError, match=rf"compressed with {name}.* Unpack it \({command}\)"):
        index_shard(str(path))
