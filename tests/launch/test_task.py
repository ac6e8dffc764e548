"""Any other command as a job: queued again where it was interrupted, and only there."""

from pathlib import Path

import pytest

from data_tools.errors import EXIT_AGAIN, LaunchError
from launch import step as step_module
from launch.task import run_task
from tests.launch.stubs import stub_programs

AT_THE_LIMIT = "JobState=COMPLETING Reason=TimeLimit"
PREEMPTED = "JobState=RUNNING PreemptTime=2026-01-02T03:04:05"


class Task:
    """A job of one command, Slurm's own commands stubbed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch

    def run(self, state: str, srun: str, *, restart: int = 0) -> int:
        """Return the exit code of the job whose command does what srun's script says."""
        self._monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        scontrol = (
            f'echo "$*" >>{self.folder}/calls\n'
            f'[ "$2" = hostnames ] && echo n1 || echo "JobId=12 Restarts={restart} {state}"'
        )
        stub_programs(self.folder, self._monkeypatch, scontrol=scontrol, srun=srun)
        return run_task(["work"])

    @property
    def is_queued(self) -> bool:
        return "requeue 12" in (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setattr(step_module, "LEAVE_PATIENCE_S", 0)
    return Task(tmp_path, monkeypatch)


def test_a_job_at_its_time_limit_is_queued_while_its_command_saves(task: Task) -> None:
    wait = f"grep -q '^requeue 12' {task.folder}/calls && exit 75; sleep 0.05"
    code = task.run(AT_THE_LIMIT, f"trap : USR1; kill -TERM $PPID; while :; do {wait}; done")
    assert code == EXIT_AGAIN
    assert task.is_queued


def test_a_term_that_reached_the_batch_process_alone_is_passed_on(task: Task) -> None:
    told = "trap 'exit 75' USR1; kill -TERM $PPID; while :; do sleep 0.02; done"
    assert task.run("JobState=RUNNING", told) == EXIT_AGAIN
    assert task.is_queued


def test_one_that_never_gets_through_in_its_time_is_given_up(task: Task) -> None:
    dying = "kill -TERM $PPID; sleep 0.4; exit 143"
    assert task.run(AT_THE_LIMIT, dying, restart=2) == 143
    assert not task.is_queued


@pytest.mark.parametrize("state", [AT_THE_LIMIT, PREEMPTED])
def test_a_command_that_has_ended_well_is_not_run_again(task: Task, state: str) -> None:
    assert task.run(state, "exit 0") == 0
    assert not task.is_queued


def test_what_preemption_has_ended_goes_on(task: Task) -> None:
    assert task.run(PREEMPTED, "exit 137", restart=9) == EXIT_AGAIN
    assert task.is_queued


def test_a_failure_is_the_jobs(task: Task) -> None:
    assert task.run("JobState=RUNNING", "exit 65") == 65
    assert not task.is_queued


def test_a_wrong_setting_is_told_first(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LECTERN_MAX_FAILURES", "x")
    with pytest.raises(LaunchError, match="LECTERN_MAX_FAILURES=x: expected a whole number"):
        task.run("JobState=RUNNING", "exit 0")
