"""The check names every problem of every sample, by kind, and says by its exit code if any."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.check import main
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
