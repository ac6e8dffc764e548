"""One start of a stage at a time: claims, what counts as alive, the fence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.errors import LaunchError
from train.ownership import (
    check_owner,
    claim,
    new_start,
    process_ticks,
    read_owner,
    start_folder,
)
from train.status import write_json

JOB = {"SLURM_JOB_ID": "12"}


def stub_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def other(start: object, **changes: object) -> object:
    return replace(start, pid=os.getppid(), ticks=process_ticks(os.getppid()), **changes)


def test_a_living_process_is_not_replaced_and_a_dead_one_is(tmp_path: Path) -> None:
    mine = new_start({})
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living = replace(mine, name="a", pid=child.pid, ticks=process_ticks(child.pid))
    claim(tmp_path, living)
    with pytest.raises(
        LaunchError, match=rf"trained by process {child.pid} .* nothing was started"
    ):
        claim(tmp_path, mine)
    assert read_owner(tmp_path) == living
    child.kill()
    child.wait()
    assert claim(tmp_path, mine) == start_folder(tmp_path, mine.name)
    assert read_owner(tmp_path) == mine


def test_a_process_id_that_was_given_to_another_process_is_no_sign_of_life(tmp_path: Path) -> None:
    mine = new_start({})
    claim(tmp_path, replace(mine, name="a", pid=os.getppid(), ticks=1))
    claim(tmp_path, mine)


@pytest.mark.parametrize(
    ("answer", "is_alive"),
    [
        ("echo JobId=12 JobState=RUNNING Reason=None", True),
        ("echo JobId=12 JobState=PENDING Reason=BeginTime", True),
        ("echo JobId=12 JobState=SIGNALING", True),
        ("echo JobId=12 JobState=SPECIAL_EXIT", True),
        ("echo JobId=12 JobState=FAILED", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
    ],
)
def test_a_job_lives_as_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_alive: bool
) -> None:
    stub_scontrol(tmp_path, monkeypatch, answer)
    claim(tmp_path, new_start(JOB))
    mine = other(new_start({"SLURM_JOB_ID": "13"}))
    if is_alive:
        with pytest.raises(LaunchError, match="trained by job 12 already"):
            claim(tmp_path, mine)  # type: ignore[arg-type]
    else:
        claim(tmp_path, mine)  # type: ignore[arg-type]


def test_the_next_start_of_a_job_takes_over_and_the_old_one_writes_nothing(tmp_path: Path) -> None:
    first, second = new_start(JOB), new_start(JOB | {"SLURM_RESTART_COUNT": "1"})
    claim(tmp_path, first)
    check_owner(tmp_path, first.name)
    claim(tmp_path, second)
    check_owner(tmp_path, second.name)
    with pytest.raises(LaunchError, match=r"taken over by job 12 \(restart 1\)"):
        check_owner(tmp_path, first.name)


def test_a_start_on_another_host_lives_while_its_heartbeats_are_fresh(tmp_path: Path) -> None:
    mine = new_start({})
    folder = claim(tmp_path, replace(mine, name="far", host="elsewhere", pid=1))
    beat = folder / "rank-00000.json"
    beat.write_text("{}")
    with pytest.raises(LaunchError, match=r"process 1 on elsewhere already \(its last sign"):
        claim(tmp_path, mine)
    os.utime(beat, (0, 0))
    claim(tmp_path, mine)


def test_the_names_of_a_jobs_starts_differ_and_sort(tmp_path: Path) -> None:
    names = [new_start(JOB | {"SLURM_RESTART_COUNT": str(n)}).name for n in range(3)]
    assert len(set(names)) == 3
    assert names == sorted(names)


def test_a_broken_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text("{}")
    with pytest.raises(LaunchError, match=r"owner\.json is no record of a start"):
        read_owner(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat would else leave a file every five seconds."""

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "x.json", {"value": 1})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {"value": 2}, is_durable=True)
    assert json.loads((tmp_path / "x.json").read_text()) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_json_is_replaced_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for value in (1, 2):
        write_json(tmp_path / "x.json", {"value": value})
    assert json.loads((tmp_path / "x.json").read_text()) == {"value": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
