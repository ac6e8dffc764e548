"""The files of a run: cut at the resumed step, status replaced whole, pictures with text."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.stream.planner import DataState, PlannedSample, Step
from train.monitor import Monitor, caption, cut_after
from train.status import read_status


def planned(number: int) -> Step:
    """Return a step of one pack with one sample."""
    pack = (PlannedSample(0, number, number, 0, 0, 10, 4),)
    return Step(number, (pack,), DataState({}, ("digest",), (number,)))


def test_resume_cuts_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 6)) + '{"st')
    cut_after(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_status_counts_restarts_and_keeps_metrics(tmp_path: Path) -> None:
    for restarts in (0, 1):
        monitor = Monitor(tmp_path, is_main=True, start_step=0, total_steps=10)
        monitor.status(metrics={"validation/cer": 0.5})
        monitor.close()
        assert read_status(tmp_path)["restarts"] == restarts
    assert read_status(tmp_path)["metrics"] == {"validation/cer": 0.5}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_restart_keeps_the_metrics_of_the_steps_before_it(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, is_main=True, start_step=0, total_steps=10)
    monitor.status(metrics={"validation/cer": 0.5}, metrics_step=4)
    monitor.close()
    for start_step, kept in ((4, {"validation/cer": 0.5}), (3, None)):
        Monitor(tmp_path, is_main=True, start_step=start_step, total_steps=10).close()
        assert read_status(tmp_path).get("metrics") == kept


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, is_main=False, start_step=0, total_steps=10)
    monitor.step(1, planned(1), [])
    monitor.scalars(1, {"train/loss": 1.0}, "line")
    monitor.status(state="done")
    monitor.close()
    assert not list(tmp_path.iterdir())


def test_scalars_and_pages_reach_tensorboard(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, is_main=True, start_step=0, total_steps=10)
    monitor.scalars(1, {"train/loss": 1.25}, "line")
    monitor.pages(1, [("doc-1", np.zeros((28, 56, 3), np.uint8), "reda", "read")])
    monitor.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/loss")[0].value == 1.25
    assert board.Images("validation/0")[0].width > 56
    text = board.Tensors("validation/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reda" in text
    assert "doc-1" in text


def test_data_state_is_kept_every_thousand_steps(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, is_main=True, start_step=0, total_steps=2000)
    monitor.step(999, planned(1), [])
    hole = {"key": "k", "source": 0, "kind": "image", "reason": "broken"}
    monitor.step(1000, planned(2), [hole])
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [(line["step"], line["packs"], line["holes"]) for line in lines] == [
        (999, 1, 0),
        (1000, 1, 1),
    ]
    assert [line["plan_hash"] for line in lines] == [planned(n).plan_hash for n in (1, 2)]
    assert "state" not in lines[0] and lines[1]["state"] == planned(2).state.to_json()
    fault = json.loads((tmp_path / "faults.jsonl").read_text())
    assert fault == {"step": 1000} | hole
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    told = board.Tensors("data/holes/text_summary")[0].tensor_proto.string_val[0].decode()
    assert told == "**k** (image): broken"


def test_a_full_disk_costs_lines_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Monitor(tmp_path, is_main=True, start_step=0, total_steps=10)
    (tmp_path / "data.jsonl").symlink_to("/dev/full")

    def fail(path: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("train.monitor.write_json", fail)
    for step in (1, 2):
        monitor.step(step, planned(step), [])
        monitor.scalars(step, {"train/loss": 1.0}, "line")
        monitor.status(step=step)
    monitor.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert read_status(tmp_path)["step"] == 0
    assert [r.message.split(" (")[0] for r in caplog.records if r.levelname == "ERROR"] == [
        f"{tmp_path} cannot be written"
    ]


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from train.monitor import Monitor
monitor = Monitor(Path({str(tmp_path)!r}), is_main=True, start_step=0, total_steps=9)
monitor.scalars(1, {{"loss": 1.0}}, "")
path = Path({str(tmp_path / "log.jsonl")!r})
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
monitor.scalars(2, {{"loss": 1.0}}, "")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
monitor.scalars(3, {{"loss": 1.0}}, "")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_caption_leaves_the_picture_untouched() -> None:
    image = np.full((40, 60, 3), 7, np.uint8)
    picture = caption(image, ["read: a", "true: " + "word " * 40])
    assert (picture[:40, :60] == 7).all()
    assert picture.shape[0] > 40
    assert picture.shape[1] <= 400  # long texts are wrapped, not widened
