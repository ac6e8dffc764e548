"""Several processes build one set of shards, each its part; whoever finishes last sums up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import build as build_module
from data_tools import output
from data_tools.build import build, main, parse_part
from data_tools.errors import BadDataShareError, ConfigError

SHARD_BYTES = 25_000


def make_source(folder: Path, num: int = 9) -> str:
    """Write `num` pages, of which the first has an annotation that cannot be used."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(num):
        pixels = np.random.default_rng(number).integers(0, 255, (90, 120), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"d{number}.png")
        bbox = [5, 5, 5, 9] if number == 0 else [10, 10, 60, 30]
        annotations = [{"bbox": bbox, "text": "bad"}, {"bbox": [1, 1, 9, 9], "text": str(number)}]
        entries.append({"image_path": f"d{number}.png", "annotations": annotations})
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a build that says nothing of time or place."""
    files = [*folder.glob("*.tar"), *folder.glob("*.json*"), *folder.glob("reports/*")]
    return {path.name: path.read_bytes() for path in files}


def test_parts_one_after_the_other_make_what_one_process_makes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "set")
    whole = build(source, str(tmp_path / "whole"), shard_bytes=SHARD_BYTES)
    out = tmp_path / "out"
    for number in (2, 0):
        assert build(source, str(out), shard_bytes=SHARD_BYTES, part=(number, 3)) is None
    assert not (out / "summary.json").exists()
    assert build(source, str(out), shard_bytes=SHARD_BYTES, part=(1, 3)) == whole
    assert contents(out) == contents(tmp_path / "whole")


def test_a_part_builds_its_share_only(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "set"), tmp_path / "out"
    build(source, str(out), shard_bytes=SHARD_BYTES, part=(1, 3))
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "train-000001.tar",
        "train-000004.tar",
    ]


def test_more_parts_than_shards_leave_some_without_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_source(tmp_path / "set", num=2), str(tmp_path / "out")
    assert main([source, out, "--workers", "1", "--part", "7/8"]) == 0
    told = capsys.readouterr()
    assert "1 of 1 shards are still missing" in told.err and not told.out
    assert main([source, out, "--workers", "1", "--part", "0/8"]) == 0
    assert "samples written 2 in 1 shards" in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_parts_that_start_at_once_make_what_one_process_makes(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "set"), tmp_path / "out"
    build(source, str(tmp_path / "whole"), shard_bytes=SHARD_BYTES)
    command = [sys.executable, "-m", "data_tools.build", source, str(out), "--workers", "1"]
    command += ["--shard-mb", "0.025", "--part"]
    parts = ("0/3", "1/3", "2/3", "2/3")  # the last one is started twice
    processes = [subprocess.Popen([*command, part], stdout=subprocess.PIPE) for part in parts]
    told = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(parts)
    assert any(b"samples written 9" in text for text in told)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob("*.partial"))


def test_an_interrupted_part_goes_on_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_source(tmp_path / "set"), tmp_path / "out"
    whole = build(source, str(out), shard_bytes=SHARD_BYTES, part=(0, 2))
    assert whole is None
    original = build_module.build_shard

    def die_while_writing(job: build_module.ShardJob) -> str:
        Path(f"{job.path}.elsewhere-17.partial").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "build_shard", die_while_writing)
    with pytest.raises(KeyboardInterrupt):
        build(source, str(out), shard_bytes=SHARD_BYTES, part=(1, 2))
    monkeypatch.setattr(build_module, "build_shard", original)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    done = build(source, str(out), shard_bytes=SHARD_BYTES, part=(1, 2))
    assert done is not None and done.samples == 9
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not list(out.rglob("*.partial"))


def test_a_part_that_is_typed_again_tells_the_whole_and_its_rejected_share(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "set"), str(tmp_path / "out")
    (tmp_path / "set" / "d3.png").unlink()
    arguments = [source, out, "--workers", "1", "--part"]
    with pytest.raises(BadDataShareError):
        main([*arguments, "0/2"])  # one shard, so that this part finds everything built
    with pytest.raises(BadDataShareError):
        main([*arguments, "1/2"])


def test_settings_written_by_another_process_at_the_same_moment_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = output.write_file

    def write_after_another(path: str, content: bytes) -> None:
        write(path, content)
        write(path, json.dumps({"shard_bytes": 7}).encode())

    monkeypatch.setattr(output, "write_file", write_after_another)
    with pytest.raises(ConfigError, match="shard_bytes was 7, now 9"):
        output.claim_folder(str(tmp_path / "out"), "build.json", {"shard_bytes": 9})


def test_two_writers_of_a_file_both_end_well(tmp_path: Path) -> None:
    """The one that ends first takes the other's temporary file away with its own."""
    path = tmp_path / "a.json"
    with output._published(str(path)) as stream:
        stream.write(b"same")
        (mine,) = tmp_path.iterdir()
        assert str(os.getpid()) in mine.name
        mine.rename(path)  # as the other one leaves it
    assert [left.name for left in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["3", "3/3", "-1/2", "a/b", "0/0", "/"])
def test_a_part_that_is_none_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match="expected K/N with K from 0"):
        parse_part(text)


def test_parts_count_from_0() -> None:
    assert parse_part("0/1") == (0, 1) and parse_part("15/16") == (15, 16)
