"""The check names every problem of every sample, by kind, and says by its exit code if any."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.check import main, rows_of_sample, spread
from data_tools.errors import ConfigError
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.stream.index import open_index
from data_tools.views.problems import KINDS, kind_of
from tests.builders import make_sample, write_shard, write_shards
from tests.servers import serve_folder


def problems(path: Path) -> list[tuple[str, str]]:
    """Return (key, kind) of every line of a report."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(record) == {"shard", "key", "kind", "problem"} for record in records)
    return sorted((record["key"], record["kind"]) for record in records)


def run(tmp_path: Path, *arguments: str, expected: int = 65) -> list[tuple[str, str]]:
    report = tmp_path / "report.jsonl"
    code = main([*arguments, "--workers", "1", "--report", str(report)])
    assert code == expected
    return problems(report)


def jpeg_sample(number: int, width: int, height: int) -> Sample:
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return Sample(
        key=f"doc-{number:04d}",
        images=(PageImage("page.jpg", width, height),),
        annotations=(Annotation("TOTAL", (2, 2, 60, 20)),),
        image_bytes=(buffer.getvalue(),),
    )


def test_clean_shards_end_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path, [3, 0, 2])
    assert run(tmp_path, *shards, expected=0) == []
    out = capsys.readouterr().out
    assert "5 samples, 5 images, 3 shards" in out and "no problem found" in out


@pytest.mark.parametrize("change", ["box outside", "blank text", "nothing", "size", "image"])
def test_each_problem_is_named_with_its_kind_and_key(tmp_path: Path, change: str) -> None:
    good, bad = make_sample(0), make_sample(1)
    page = bad.images[0]
    expected: dict[str, tuple[str, dict[str, Any]]] = {
        "box outside": ("box", {"annotations": (Annotation("a", (0, 0, page.width + 1, 9)),)}),
        "blank text": ("text", {"annotations": (Annotation("a"), Annotation(" \n"))}),
        "nothing": ("text", {"annotations": (), "fields": {}}),
        "size": ("size", {"images": (PageImage("page.png", page.width, page.height + 1),)}),
        "image": ("image", {"image_bytes": (bad.image_bytes[0][:-40],)}),
    }
    kind, values = expected[change]
    shard = write_shard(tmp_path / "a.tar", [good, dataclasses.replace(bad, **values)])
    assert run(tmp_path, str(shard)) == [("doc-0001", kind)]


def test_a_byte_flipped_since_indexing_is_found_although_the_image_decodes(tmp_path: Path) -> None:
    """Inside the compressed pixels of a JPEG only the checksum shows it."""
    # Three pages of over 100 KB: the ends of the shard, by which a replaced one is told, stay.
    shard = write_shard(tmp_path / "a.tar", [jpeg_sample(n, 640, 480) for n in range(3)])
    index = open_index(str(shard))
    start, size, *_ = index.images(1)[0]
    content = bytearray(shard.read_bytes())
    content[int(index.offset[1]) + start + size // 2] ^= 1
    shard.write_bytes(content)
    assert run(tmp_path, str(shard)) == [("doc-0001", "checksum")]


def test_invalid_json_is_found(tmp_path: Path) -> None:
    sample = make_sample(1)
    shard = write_shard(tmp_path / "a.tar", [make_sample(0), sample, make_sample(2)])
    content = shard.read_bytes()
    place = content.index(b'{"version"', content.index(b"doc-0001.json"))
    shard.write_bytes(content[:place] + b"[" + content[place + 1 :])
    assert run(tmp_path, str(shard)) == [("doc-0001", "record")]


def test_keys_shared_by_shards_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_shards(tmp_path / "one", [3])
    two = write_shards(tmp_path / "two", [2], first=2)
    assert run(tmp_path, *one, *two) == [("doc-0002", "key")]
    assert one[0] in (tmp_path / "report.jsonl").read_text()
    assert two[0] in capsys.readouterr().out


def test_a_shard_that_is_cut_off_or_no_tar_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut, none = (tmp_path / f"{name}.tar" for name in ("good", "cut", "none"))
    write_shard(good, [make_sample(0)])
    write_shard(cut, [make_sample(n) for n in range(1, 4)])
    cut.write_bytes(cut.read_bytes()[:4000])
    none.write_bytes(b"no tar at all" * 100)
    assert main([str(good), str(cut), str(none), "--workers", "1", "--json"]) == 65
    record = json.loads(capsys.readouterr().out)
    assert record["by_kind"]["shard"]["count"] == 2 and record["samples"] >= 2
    assert not record["is_clean"]


@pytest.mark.timeout(120)
def test_two_workers_find_what_one_finds(tmp_path: Path) -> None:
    bad = dataclasses.replace(make_sample(9), annotations=(Annotation(" "),))
    shards = write_shards(tmp_path, [4, 3])
    shards.append(str(write_shard(tmp_path / "bad.tar", [bad])))
    report = tmp_path / "two.jsonl"
    assert main([*shards, "--workers", "2", "--report", str(report)]) == 65
    assert problems(report) == run(tmp_path, *shards) == [("doc-0009", "text")]


def test_reasons_of_the_index_have_a_kind() -> None:
    assert kind_of("key used twice: two samples share it") == "key"
    assert kind_of("unreadable image: image 0, no known format") == "image"
    assert kind_of("no record: expected KEY.json") == "record"
    assert {kind_of("x"), "key", "image"} <= set(KINDS)


def test_no_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="--workers"):
        main(["a.tar", "--workers", "0"])


@pytest.mark.timeout(120)
def test_remote_shards_are_checked_like_local_ones(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    bad = dataclasses.replace(make_sample(1), annotations=(Annotation(" "),))
    write_shard(tmp_path / "shards" / "a.tar", [make_sample(0), bad])
    with serve_folder(tmp_path / "shards") as server:
        arguments = [f"{server.url}/a.tar", "--index-dir", str(tmp_path / "indexes")]
        assert run(tmp_path, *arguments) == [("doc-0001", "text")]


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (code == 0) == record["is_clean"]
    return record


def test_a_sample_is_spread_over_all_shards() -> None:
    few = spread(1000, 64)
    assert len(few) == 64 and {0, 999} <= set(few) and set(few.values()) == {1}
    assert max(b - a for a, b in zip(sorted(few), sorted(few)[1:], strict=False)) <= 16
    assert spread(3, 64) == {0: 22, 1: 21, 2: 21} and spread(2, 2) == {0: 1, 1: 1}
    assert spread(5, 1) == {0: 1} and spread(0, 64) == {}


@pytest.mark.parametrize("num_rows", [0, 1, 5, 1000])
def test_a_sample_takes_different_rows_over_the_whole_shard(num_rows: int) -> None:
    for shard in range(20):
        rows = rows_of_sample(num_rows, 8, shard)
        assert len(set(rows)) == len(rows) == min(8, num_rows)
        assert all(0 <= row < num_rows for row in rows)
    one_a_shard = [rows_of_sample(1000, 1, shard)[0] for shard in range(64)]
    assert min(one_a_shard) < 30 and max(one_a_shard) > 970


def test_a_sample_reads_so_many_and_finds_a_bad_one_among_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = dataclasses.replace(make_sample(99), annotations=(Annotation(" "),))
    shards = [*write_shards(tmp_path, [9, 9]), str(write_shard(tmp_path / "z.tar", [bad]))]
    record = sampled(capsys, *shards, "--sample", "8")
    assert record["by_kind"]["text"]["first"]["key"] == "doc-0099"
    assert record["samples"] == 7 and record["shards"] == 3
    assert sampled(capsys, *shards[:2], "--sample", "8") == {
        **record, "by_kind": {}, "problems": 0, "bad_samples": 0, "is_clean": True, "shards": 2,
        "samples": 8, "images": 8,
    }  # fmt: skip


def test_a_sample_of_shards_without_index_reads_beginnings_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "a.tar", [jpeg_sample(n, 640, 480) for n in range(6)])
    for index in tmp_path.glob("*.index"):
        index.unlink()
    shard.write_bytes(shard.read_bytes()[:-400_000])  # what lies behind is not looked at
    record = sampled(capsys, str(shard), "--sample", "2")
    assert record["samples"] == 2 and record["is_clean"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_sample_names_a_shard_that_is_not_the_one_indexed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, [3, 3])
    open_index(shards[1])
    Path(shards[1]).write_bytes(b"no tar at all" * 100)
    record = sampled(capsys, *shards, "--sample", "64")
    assert record["by_kind"]["shard"]["first"]["shard"] == shards[1]
    assert record["samples"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--sample", "0"], "--sample must be"), (["--sample", "3", "--report", "x"], "--report")],
)
def test_wrong_options_of_a_sample_are_explained(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["a.tar", *options])
