"""The files of a run: cut at the resumed step, status replaced whole, pictures with text."""

import json
from pathlib import Path

import numpy as np

from train.monitor import Monitor, caption, cut_after
from train.status import read_status


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


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, is_main=False, start_step=0, total_steps=10)
    monitor.step(1, 2, [], {})
    monitor.scalars(1, {"train/loss": 1.0}, "line")
    monitor.status(state="done")
    monitor.close()
    assert not list(tmp_path.iterdir())


def test_scalars_and_pages_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    monitor.step(999, 5, [], {"cursors": [1]})
    monitor.step(1000, 6, [{"key": "k", "reason": "broken"}], {"cursors": [2]})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 999, "plan_hash": 5, "holes": 0}
    assert lines[1] == {"step": 1000, "plan_hash": 6, "holes": 1, "state": {"cursors": [2]}}
    fault = json.loads((tmp_path / "faults.jsonl").read_text())
    assert fault == {"step": 1000, "key": "k", "reason": "broken"}


def test_caption_leaves_the_picture_untouched() -> None:
    image = np.full((40, 60, 3), 7, np.uint8)
    picture = caption(image, ["read: a", "true: " + "word " * 40])
    assert (picture[:40, :60] == 7).all()
    assert picture.shape[0] > 40
    assert picture.shape[1] <= 400  # long texts are wrapped, not widened
