"""Answers of many tasks: told apart by srun's labels, never waited for beyond the limit."""

import os
import subprocess
import time

import pytest

from launch.preflight.on_nodes import Step, labelled

pytestmark = pytest.mark.timeout(60)


def step(script: str, limit_s: float = 20, *, is_labelled: bool = True, num: int = 1) -> Step:
    commands = [["bash", "-c", script]] * num
    return Step(commands, limit_s, [dict(os.environ)] * num, is_labelled=is_labelled)


def test_labels_tell_the_tasks_apart_and_broken_lines_are_joined() -> None:
    found = step("echo '1: {\"a\":'; echo ' 0: {}'; echo '1:  7}'; echo 'srun: hm' >&2").wait()
    assert found.task(0).out == "{}" and found.task(1).out == '{"a": 7}'
    assert found.told == "srun: hm\n" and not found.is_late
    assert found.task(5).out == ""


def test_complaints_keep_their_lines() -> None:
    assert step("echo '3: one' >&2; echo '3: two' >&2").wait().task(3).err == "one\ntwo\n"


def test_what_came_in_time_is_kept_when_somebody_hangs() -> None:
    before_s = time.monotonic()
    found = step("echo '0: here'; exec sleep 60", 1.0).wait()
    assert found.is_late and found.task(0).out == "here"
    assert time.monotonic() - before_s < 10


def test_what_came_in_time_is_read_also_by_one_who_comes_late() -> None:
    late = step("echo '0: here'", 0.5)
    time.sleep(1.0)
    found = late.wait()
    assert found.task(0).out == "here" and not found.is_late


def test_nothing_of_a_step_that_hangs_is_left_running() -> None:
    mark = f"sleep 61.{os.getpid()}"
    assert step(f"(trap '' TERM; exec {mark}) & exec {mark}", 0.5).wait().is_late
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert mark not in listing.stdout.splitlines()


def test_without_srun_every_process_is_a_task() -> None:
    found = step("echo 1: $RANK", is_labelled=False, num=2).wait()
    assert found.task(0).out == "1:\n" and set(found.tasks) == {0, 1}


def test_srun_is_asked_for_labels() -> None:
    assert labelled(["srun", "--nodes=2", "hostname"])[:2] == ["srun", "--label"]
