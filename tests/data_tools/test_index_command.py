"""`python -m data_tools.index`: what it prints, and that it may be typed again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.index import main
from data_tools.stream.index import index_shard
from tests.builders import make_sample, write_shards
from tests.data_tools.tars import members_of, write_tar
from tests.servers import serve_folder

ROOT = Path(__file__).resolve().parents[2]


def test_a_summary_of_sound_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, [2, 3], num_images=2)
    pattern = f"{tmp_path}/train-{{000000..000001}}.tar"
    for indexed in (2, 0):
        assert main([pattern, "--workers", "1"]) == 0
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert lines[0] == f"shards   2 ({indexed} indexed now)"
        assert lines[1] == "samples  5 (5 usable)" and lines[2] == "images   10"
        assert len(lines) == 4 and captured.err == ""


def test_problems_are_counted_by_kind_with_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = members_of(make_sample(0))
    bad = [("x.json", b"{"), ("y.json", b"{]"), ("z.cls", b"1")]
    one = write_tar(tmp_path / "a.tar", [*sound, *bad])
    two = Path(write_shards(tmp_path, [2])[0])
    cut = int(index_shard(str(two)).offset[1]) + 100
    two.write_bytes(two.read_bytes()[:cut])
    assert main([one, str(two), "--workers", "1", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["shards"], record["samples"], record["usable"]) == (2, 5, 2)
    assert {k: v["count"] for k, v in record["reasons"].items()} == {
        "invalid JSON": 2,
        "no image": 1,
    }
    assert record["reasons"]["invalid JSON"]["first"].startswith(f'{one}, sample "x": invalid')
    assert record["damaged"][str(two)].startswith("damaged or cut off at byte")
    assert "python -m data_tools.check" in captured.err
    main([one, str(two)])
    text = capsys.readouterr().out
    assert f'not usable, invalid JSON: 2\n  first: {one}, sample "x": ' in text
    assert f"damaged  {two}: damaged or cut off" in text


def test_a_replaced_shard_is_indexed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shards(tmp_path, [1])[0]
    main([shard])
    write_shards(tmp_path, [3])
    main([shard, "--json"])
    records = capsys.readouterr().out.splitlines()
    assert json.loads(records[-1])["samples"] == 3


def test_read_only_shards_behind_http(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "data", [4])
    with serve_folder(tmp_path / "data") as server:
        url = f"{server.url}/train-000000.tar"
        with pytest.raises(DataError, match=r"is not writable .* --index-dir"):
            main([url])
        options = ["--index-dir", str(tmp_path / "indexes"), "--json"]
        main([url, *options])
        main([url, *options, "--checksums"])
        assert [json.loads(line)["indexed"] for line in capsys.readouterr().out.splitlines()] == [
            1,
            1,
        ]


@pytest.mark.timeout(120)
def test_the_command_ends_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>")
    command = [sys.executable, "-m", "data_tools.index", str(tmp_path / "a.tar")]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.startswith(f"DataError: {tmp_path}/a.tar: no readable tar file")
    assert "Traceback" not in outcome.stderr
