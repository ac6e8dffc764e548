"""What a rank says of itself, how long it may take, and its stacks."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from train.heartbeat import STEPS_NEEDED, Heartbeat, Limits

STEP = "forward and backward"


def record_of(folder: Path) -> dict:
    return json.loads((folder / "rank-00003.json").read_text(encoding="utf-8"))


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("phase", "step_s", "allowed_s"),
    [
        (STEP, 100.0, 1000.0),  # 10 median steps
        (STEP, 0.1, 900.0),  # but not less than min_s
        (STEP, None, 1800.0),  # the first steps compile
        ("evaluating", 0.1, 1800.0),
        ("loading the model", None, 1800.0),
        ("preparing the data", None, None),
    ],
)
def test_how_long_a_rank_may_take(phase: str, step_s: float | None, allowed_s: object) -> None:
    assert Limits().of(phase, step_s) == allowed_s


def test_a_rank_tells_what_it_does_also_while_its_main_thread_waits(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 3, Limits(interval_s=0.02, min_s=0.5))
    try:
        assert record_of(tmp_path)["phase"] == "starting"
        heart.phase("evaluating")
        wait_until(lambda: record_of(tmp_path)["phase"] == "evaluating")
        beaten = record_of(tmp_path)["time"]
        wait_until(lambda: record_of(tmp_path)["time"] > beaten)
        for step in range(STEPS_NEEDED):
            heart.begin_step()
            heart.end_step(step + 1)
        heart.begin_step()
        wait_until(lambda: record_of(tmp_path)["step"] == STEPS_NEEDED)
        wait_until(lambda: record_of(tmp_path)["allowed_s"] == 0.5)
        assert record_of(tmp_path)["pid"] == os.getpid()
    finally:
        heart.close()


def test_sigusr2_writes_the_stacks_and_kills_nobody_afterwards(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 3, Limits())
    os.kill(os.getpid(), signal.SIGUSR2)
    stacks = tmp_path / "stacks-00003.txt"
    wait_until(lambda: "test_sigusr2_writes_the_stacks" in stacks.read_text())
    heart.close()
    os.kill(os.getpid(), signal.SIGUSR2)


def test_a_folder_that_is_gone_does_not_end_the_rank(tmp_path: Path) -> None:
    folder = tmp_path / "start"
    folder.mkdir()
    heart = Heartbeat(folder, 3, Limits(interval_s=0.01))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    time.sleep(0.1)
    heart.close()
