"""A step of a job: signals passed on, the first failure kept, the job put back into the queue."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from data_tools.errors import EXIT_AGAIN, LaunchError
from launch import step as step_module
from launch.allocation import Allocation
from launch.slurm import ask, find, show
from launch.step import (
    JobSignals,
    find_ending,
    first_failure,
    job_id,
    put_back,
    rank_command,
    read_count,
    run_step,
    step_id,
)
from tests.launch.stubs import stub_programs

SRUN = """
for rank in 0 1; do SLURM_PROCID=$rank SLURM_STEP_ID=7 "$@" & done
worst=0; for job in $(jobs -p); do wait "$job"; code=$?; [ $code -le $worst ] || worst=$code; done
exit $worst
"""


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr("launch.slurm.FIRST_PAUSE_S", 0.01)


def test_the_code_of_the_rank_that_failed_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_programs(tmp_path, monkeypatch, srun=SRUN)
    ranks = "sleep 0.$((SLURM_PROCID * 4)); exit $((2 + 141 * SLURM_PROCID))"
    with JobSignals().caught() as signals:
        code = run_step(["srun", *rank_command(["bash", "-c", ranks], tmp_path)], signals)
    assert code == 143, "srun's own: that of the rank it ended"
    assert first_failure(tmp_path) == 2
    assert step_id(tmp_path) == "12.7"


def test_usr1_is_passed_on_and_the_step_is_waited_for(tmp_path: Path) -> None:
    trainer = (
        f"trap 'echo x >>{tmp_path}/heard; sleep 0.3; exit 75' USR1; echo $$ >{tmp_path}/pid; "
    )

    def warn() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)

    with JobSignals().caught() as signals:
        threading.Thread(target=warn).start()
        command = ["bash", "-c", f"{trainer} while :; do sleep 0.05; done"]
        assert run_step(command, signals) == EXIT_AGAIN
    assert (signals.must_save, signals.is_ending) == (True, True)
    assert (tmp_path / "heard").read_text() == "x\n", "once"


def test_ranks_that_a_stop_signal_ended_in_their_first_second_are_no_failure(
    tmp_path: Path,
) -> None:
    with JobSignals().caught() as signals:
        command = ["bash", "slurm/rank.sh", str(tmp_path), "bash", "-c", "kill -USR1 $$"]
        assert run_step(command, signals, environment={"SLURM_PROCID": "1"}) == 138
    assert (tmp_path / "codes").read_text() == "138\n"
    assert first_failure(tmp_path) == EXIT_AGAIN


def test_a_controller_that_is_away_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    scontrol = f"echo x >>{tmp_path}/tries; [ $(wc -l <{tmp_path}/tries) -ge 3 ] || {{ {away}; }}"
    stub_programs(tmp_path, monkeypatch, scontrol=scontrol)
    monkeypatch.setattr(step_module, "LEAVE_PATIENCE_S", 0)
    assert put_back(True) == EXIT_AGAIN
    assert len((tmp_path / "tries").read_text().split()) == 3


def test_a_refusal_is_told_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol = (
        f"echo x >>{tmp_path}/tries; echo 'Requested operation is presently disabled' >&2; exit 1"
    )
    stub_programs(tmp_path, monkeypatch, scontrol=scontrol)
    assert put_back(True) == EXIT_AGAIN
    assert "presently disabled. Submit the job again to go on" in capsys.readouterr().err
    assert len((tmp_path / "tries").read_text().split()) == 1


def test_bad_nodes_are_excluded_once_the_job_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = (
        f'echo "$*" >>{tmp_path}/calls; echo "JobId=12 ExcNodeList=$(cat {tmp_path}/avoided)"'
    )
    stub_programs(tmp_path, monkeypatch, scontrol=scontrol)
    monkeypatch.setattr(step_module, "LEAVE_PATIENCE_S", 0)
    for avoided, wanted in (("(null)", "n2,n5"), ("n[7-8]", "n[7-8],n2,n5")):
        (tmp_path / "avoided").write_text(avoided)
        put_back(True, ["n2", "n5"])
        first, *_, last = (tmp_path / "calls").read_text().splitlines()
        assert first == "requeue 12"
        assert last == f"update JobId=12 ExcNodeList={wanted}"


AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("found", "requeues"), [("RUNNING Restarts=0", 1), ("RUNNING Restarts=1", 0)]
)
def test_a_job_goes_back_into_the_queue_however_long_the_controller_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str, requeues: int
) -> None:
    """But not where its next start, which Slurm has made meanwhile, would be ended."""
    scontrol = (
        f"echo x >>{tmp_path}/tries; [ $(wc -l <{tmp_path}/tries) -gt 12 ] || {{ {AWAY}; }}\n"
        f'[ "$1" = requeue ] && echo x >>{tmp_path}/requeued; echo "JobId=12 JobState={found}"'
    )
    stub_programs(tmp_path, monkeypatch, scontrol=scontrol)
    monkeypatch.setattr(step_module, "LEAVE_PATIENCE_S", 0)
    assert put_back(True) == EXIT_AGAIN
    done = tmp_path / "requeued"
    assert (len(done.read_text().split()) if done.exists() else 0) == requeues


def test_a_job_that_is_being_ended_asks_why_until_the_controller_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "echo 'JobId=12 JobState=COMPLETING Reason=TimeLimit Restarts=0'"
    scontrol = f"echo x >>{tmp_path}/tries; [ $(wc -l <{tmp_path}/tries) -gt 7 ] || {{ {AWAY}; }}"
    stub_programs(tmp_path, monkeypatch, scontrol=f"{scontrol}\n{answer}")
    allocation = Allocation("12", 0, ("n1",), 0, 1, 1)
    signals = JobSignals()
    assert find_ending(allocation, signals) == "", "it goes on: nobody waits for the answer"
    signals.is_ending = True
    assert find_ending(allocation, signals) == "time limit"


def test_a_step_is_told_again_when_the_first_signal_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Srun drops what comes before its tasks run."""
    monkeypatch.setattr(step_module, "WARN_AGAIN_S", 0.3)
    monkeypatch.setattr(step_module, "SRUN_STARTS_S", 0.3)
    srun = "n=0; trap 'n=$((n + 1)); [ $n -lt 3 ] || exit 75' USR1; while :; do sleep 0.02; done"
    with JobSignals().caught() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run_step(["bash", "-c", srun], signals) == EXIT_AGAIN


def test_srun_gets_what_the_look_returns() -> None:
    with JobSignals().caught() as signals:
        code = run_step(["sleep", "60"], signals, look=lambda: signal.SIGTERM)
    assert code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("content", "code"), [("", None), ("0\n0\n", None), ("\0\0\0 2\n14", 2), ("7x\n65\n", 65)]
)
def test_codes_that_were_torn_are_left_out(tmp_path: Path, content: str, code: int | None) -> None:
    (tmp_path / "codes").write_text(content)
    assert first_failure(tmp_path) == code


@pytest.mark.parametrize("text", ["0", "x", "-1", "2.5"])
def test_a_count_that_is_none_is_refused(text: str) -> None:
    assert read_count("LECTERN_MAX_FAILURES", 3, {"LECTERN_MAX_FAILURES": ""}) == 3
    with pytest.raises(LaunchError, match=f"LECTERN_MAX_FAILURES={text}: expected a whole number"):
        read_count("LECTERN_MAX_FAILURES", 3, {"LECTERN_MAX_FAILURES": text})


def test_a_task_of_an_array_is_named_by_both_numbers() -> None:
    task = {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_id(task) == "20_3"
    assert job_id({"SLURM_JOB_ID": "20"}) == "20"


def test_what_slurm_prints_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_programs(
        tmp_path,
        monkeypatch,
        scontrol='[ $4 = 12 ] && echo "JobId=12 JobState=RUNNING Restarts=1" || '
        "{ echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }",
        squeue="printf '31\\n9\\n31\\n'",
    )
    assert show("12") == {"JobId": "12", "JobState": "RUNNING", "Restarts": "1"}
    assert show("13") == {}
    assert find("x") == ["9", "31"]
    assert ask("squeue").split()[0] == "31"
