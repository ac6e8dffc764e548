"""A hang is told from a long wait, and the rank that the others wait for is named."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.watchdog import Hang, Rank, Watchdog, judge, main_stack, report

STEP = "forward and backward"


def rank(number: int, *, silent_s: float = 0.0, still_s: float = 100.0, **changes: Any) -> Rank:
    record = {
        "rank": number,
        "host": f"n{number}",
        "pid": 40 + number,
        "step": 7,
        "phase": STEP,
        "allowed_s": 60.0,
        "silence_s": 50.0,
    }
    return Rank(record | changes, silent_s, still_s)


def test_the_rank_whose_heartbeat_stopped_first_is_named_with_what_it_did() -> None:
    ranks = [rank(0, phase="agreeing on the step"), rank(1, silent_s=90), rank(2, silent_s=95)]
    hang = judge(ranks)
    assert hang is not None
    assert hang.first.record["rank"] == 2
    assert "rank 2 on n2 (process 42), step 7, forward and backward" in str(hang.first)
    assert "stopped first, 95 s ago (1 more later)" in hang.reason


def test_where_all_hearts_beat_the_one_that_is_elsewhere_is_named() -> None:
    waiting = "agreeing on the step"
    hang = judge(
        [rank(0, phase=waiting), rank(1, phase="waiting for data"), rank(2, phase=waiting)]
    )
    assert hang is not None
    assert hang.first.record["rank"] == 1
    assert "2 of 3 ranks are at: agreeing on the step" in hang.reason
    together = judge([rank(0), rank(1)])
    assert together is not None
    assert "look at the network" in together.reason


@pytest.mark.parametrize(
    "ranks",
    [
        [],
        [rank(0, still_s=59.0), rank(1)],  # one of them has begun something new
        [rank(0, allowed_s=None), rank(1)],  # preparing the data may take for ever
        [rank(0, allowed_s=1800.0, phase="evaluating"), rank(1)],
        [rank(0, allowed_s=1800.0, phase="saving"), rank(1, silent_s=49.0)],
        [rank(0, still_s=1.0), rank(1, phase="ending", silent_s=90.0)],
    ],
)
def test_no_hang(ranks: list[Rank]) -> None:
    assert judge(ranks) is None


@pytest.mark.parametrize("other", [{"still_s": 1.0}, {"allowed_s": None}, {"allowed_s": 1800.0}])
def test_a_process_that_stopped_is_a_hang_whatever_the_others_do(other: dict) -> None:
    hang = judge([rank(0, allowed_s=None, silent_s=51.0), rank(1, **other)])
    assert hang is not None
    assert hang.first.record["rank"] == 0


class Files:
    """The heartbeats of two ranks, written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 0.0

    def beat(self, number: int, time_s: float, **changes: Any) -> None:
        record = rank(number).record | {"time": time_s, "since": 0.0} | changes
        (self.folder / f"rank-{number:05d}.json").write_text(json.dumps(record))

    def clock(self) -> float:
        return self.now


def test_ages_are_those_of_changes_whatever_the_clocks_of_nodes_say(tmp_path: Path) -> None:
    files = Files(tmp_path)
    watchdog = Watchdog(tmp_path, files.clock)
    hang = None
    for second in range(0, 200, 5):
        files.now = float(second)
        files.beat(0, time_s=1e9 + second)  # a node that lives in another year
        if second <= 30:
            files.beat(1, time_s=float(second), since=float(min(second, 20)))
        hang = watchdog.look()
        if hang is not None:
            break
    assert hang is not None
    assert hang.first.record["rank"] == 1
    assert hang.first.silent_s == pytest.approx(files.now - 30)
    assert files.now == 85, "more than 50 s after the last sign of life"


def test_time_in_which_the_watchdog_itself_stood_still_does_not_count(tmp_path: Path) -> None:
    """A stalled file system stops ranks and watchdog alike; so does a suspended job."""
    files = Files(tmp_path)
    watchdog = Watchdog(tmp_path, files.clock)
    files.beat(0, time_s=0.0)
    assert watchdog.look() is None
    files.now = 3600.0
    assert watchdog.look() is None, "the rank has had no time to beat since"
    for second in range(3602, 3700, 2):
        files.now = float(second)
        if watchdog.look() is not None:
            break
    assert files.now == pytest.approx(3642, abs=4), "it does not beat: noticed after 50 s"


def test_a_rank_that_never_shows_a_sign_of_life_is_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it while the data is prepared, which may take for ever."""
    files = Files(tmp_path)
    watchdog = Watchdog(tmp_path, files.clock, start_s=100.0, num_ranks=2)
    hang = None
    while hang is None and files.now < 200:
        files.now += 5.0
        files.beat(0, time_s=files.now, phase="preparing the data", allowed_s=None)
        hang = watchdog.look()
    assert hang is not None
    assert hang.first.record["rank"] == 1
    assert 100 < files.now <= 110
    monkeypatch.setattr("launch.watchdog.DUMP_PATIENCE_S", 0.0)
    lines = report(hang, tmp_path / "gone", lambda: None)
    assert "rank 1 on an unknown host" in lines[0]
    assert lines[-2] == "  no stacks: the process does not answer"


def test_a_torn_or_absent_file_is_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.json").write_text("{")
    assert Watchdog(tmp_path).look() is None


def test_the_log_shows_the_main_threads_inner_frames_and_our_own() -> None:
    inner = [
        f'  File "/v/lib/python3.11/site-packages/torch/x.py", line {n} in f' for n in range(20)
    ]
    ours = '  File "/clone/train/loop.py", line 7 in train'
    stacks = "\n".join(
        ["Thread 0x1 (most recent call first):", '  File "/a.py", line 1 in beat', ""]
    )
    stacks += "\n".join(["Thread 0x2 (most recent call first):", *inner, ours, ""])
    assert main_stack(stacks) == [*inner[:8], ours]
    assert main_stack("") == []


CHILD = """
import sys, threading, time
from pathlib import Path
from train.heartbeat import Heartbeat, Limits
limits = Limits(interval_s=0.1, min_s=1.0, long_s=1.0)
heart = Heartbeat(Path(sys.argv[1]), int(sys.argv[2]), limits)
heart.begin_step()
def waiting_for_godot():
    time.sleep(60)
waiting_for_godot()
"""


@pytest.mark.timeout(60)
def test_a_stopped_process_is_named_and_the_stacks_of_the_other_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.watchdog.DUMP_PATIENCE_S", 1.0)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(number)]) for number in (0, 1)]
    try:
        watchdog = Watchdog(tmp_path)
        while sum("waiting for data" in p.read_text() for p in tmp_path.glob("rank-*.json")) < 2:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGSTOP)
        hang: Hang | None = None
        while hang is None:
            hang = watchdog.look()
            time.sleep(0.05)
        lines = report(hang, tmp_path, lambda: [p.send_signal(signal.SIGUSR2) for p in processes])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = "\n".join(lines)
    assert lines[0].startswith("hang: rank 1 on ")
    assert "waiting for data" in lines[0]
    own, other = text.split("--- rank ")[1:3]
    assert "waiting_for_godot" in own
    assert "no stacks: the process does not answer" in other
