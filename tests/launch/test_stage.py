"""A start of a stage as a job, Slurm's commands stubbed: what it records, requeues, and obeys."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.errors import EXIT_AGAIN, EXIT_DEFECT, EXIT_USER, LaunchError
from launch import stage as stage_module
from launch import step as step_module
from launch.allocation import Allocation
from launch.preflight.findings import Report
from launch.stage import StageJob
from launch.starts import StartRecord, newest_step, read_starts
from launch.step import JobSignals
from tests.builders import run_record, write_run
from tests.launch.stubs import stub_programs
from train.config import Config, load_config
from train.ownership import claim, new_start
from train.status import write_json

RUNNING = "JobState=RUNNING Reason=None"
AT_THE_LIMIT = "JobState=COMPLETING Reason=TimeLimit"
CANCELLED = "JobState=COMPLETING Reason=None"


class Site:
    """A run and the commands of its Slurm: what they are asked, what they answer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        record = run_record(folder / "run", folder / "model", ["train.tar"], stage={"number": 1})
        write_run(folder / "stage1.yaml", record)
        self.config: Config = load_config(folder / "stage1.yaml", [])
        self.stage = self.config.folder
        self.stage.mkdir(parents=True)
        self.signals = JobSignals()
        self.slurm()

    def slurm(self, state: str = RUNNING, srun: str = "exit 75") -> None:
        """Let the job be in a state, and its ranks do what srun's script says."""
        (self.folder / "state").write_text(f"JobId=12 Restarts=0 ExcNodeList=(null) {state}\n")
        calls = f'echo "$*" >>{self.folder}/calls'
        stub_programs(
            self.folder,
            self._monkeypatch,
            scontrol=f"{calls}; cat {self.folder}/state",
            scancel=calls,
            srun=f"echo srun >>{self.folder}/calls\n{srun}",
        )

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def job(self, *, nodes: tuple[str, ...] = ("n1", "n2"), restart: int = 0) -> StageJob:
        self._monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        self._monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        allocation = Allocation("12", restart, nodes, 0, 1, 1)
        words = [str(self.folder / "stage1.yaml")]
        return StageJob(self.config, words, allocation, self.signals)

    def start(self, *, nodes: tuple[str, ...] = ("n1", "n2"), restart: int = 0) -> int:
        """Run a start to its end; return the exit code of the job."""
        with self.signals.caught():
            return self.job(nodes=nodes, restart=restart).run()

    def preflight(self, bad_nodes: dict[str, str], then: Callable[[], None] | None = None) -> None:
        """Let the preflight find bad nodes, and something happen meanwhile."""

        def found(*arguments: object) -> Report:
            if then is not None:
                then()
            return Report([], bad_nodes, EXIT_DEFECT if bad_nodes else 0)

        self._monkeypatch.delenv("LECTERN_PREFLIGHT")
        self._monkeypatch.setattr(stage_module, "run_preflight", found)

    def save(self, step: int) -> str:
        """Return a shell command that makes a checkpoint."""
        return f"mkdir -p {self.stage}/checkpoints/step-{step:08d}"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("LECTERN_PREFLIGHT", "off")
    monkeypatch.setattr(step_module, "LEAVE_PATIENCE_S", 0)
    monkeypatch.setattr(step_module, "SRUN_STARTS_S", 0.1)
    monkeypatch.setattr("launch.slurm.FIRST_PAUSE_S", 0.01)
    return Site(tmp_path, monkeypatch)


TOLD = "trap 'sleep 0.3; exit 75' USR1; while :; do sleep 0.02; done"


def test_a_job_at_its_time_limit_is_queued_before_the_ranks_have_saved(site: Site) -> None:
    """KILL comes 30 s after TERM, and Slurm itself does not queue such a job again."""
    said = f"grep -q '^requeue 12' {site.folder}/calls && exit 75; sleep 0.05"
    site.slurm(AT_THE_LIMIT, f"trap : USR1; kill -TERM $PPID; while :; do {said}; done")
    assert site.start() == EXIT_AGAIN
    last = read_starts(site.stage)[-1]
    assert (last.action, last.is_failure) == ("requeue", True), "no checkpoint was made"


def test_a_term_that_reached_the_batch_process_alone_is_passed_on(site: Site) -> None:
    site.slurm(RUNNING, f"kill -TERM $PPID; {TOLD}")
    assert site.start() == EXIT_AGAIN
    assert "requeue 12" in site.calls


def test_a_cancelled_job_stays_cancelled(site: Site) -> None:
    site.slurm(CANCELLED, "kill -TERM $PPID; sleep 0.5; exit 75")
    assert site.start() == EXIT_AGAIN
    assert "requeue 12" not in site.calls
    assert read_starts(site.stage)[-1].action == "leave"


def test_starts_without_a_checkpoint_end_the_job_also_if_they_were_interrupted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECTERN_MAX_FAILURES", "2")
    site.slurm(srun=f"{site.save(5)}; exit 75")
    assert site.start() == EXIT_AGAIN
    site.slurm()
    assert [site.start(restart=n) for n in (1, 2)] == [EXIT_AGAIN, EXIT_AGAIN]
    starts = read_starts(site.stage)
    assert sorted(start.action or "" for start in starts) == ["requeue", "requeue", "stop"]
    assert site.calls.count("requeue 12") == 2
    assert "given up" in starts[-1].reason


@pytest.mark.parametrize("restart", [0, 1])
def test_a_stop_file_is_obeyed_once_also_before_the_ranks_start(site: Site, restart: int) -> None:
    """`launch.pipeline cancel` may come in the first second of a job, or while it is queued."""
    (site.stage / "STOP").touch()
    assert site.start(restart=restart) == EXIT_AGAIN
    assert "srun" not in site.calls and "requeue 12" not in site.calls
    assert "a file STOP asked for it" in read_starts(site.stage)[-1].reason
    assert not (site.stage / "STOP").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_do_not_start_after_a_warning_and_no_node_is_blamed(site: Site, number: int) -> None:
    site.preflight({"n1": "no answer"}, lambda: os.kill(os.getpid(), number))
    assert site.start() == EXIT_AGAIN
    assert "srun" not in site.calls
    assert not any("ExcNodeList" in call for call in site.calls)


SIGNALLED = "answer: slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-25T01:49:10 ***"


@pytest.mark.parametrize(
    ("nodes", "bad", "excluded"),
    [
        (("n1", "n2"), {"n1": "gpus: 7 of 8"}, "n1"),
        (("n1",), {"n1": "gpus: 7 of 8"}, "n1"),
        (("n1", "n2"), {"n1": "no answer", "n2": "no answer"}, ""),  # a file system, not nodes
        (("n1",), {"n1": SIGNALLED}, ""),  # preemption warns the steps alone
        (("n1", "n2"), {"n1": "answer: srun: error: n1: task 0: Terminated"}, ""),
    ],
)
def test_nodes_are_avoided_only_for_what_is_theirs(
    site: Site, nodes: tuple[str, ...], bad: dict[str, str], excluded: str
) -> None:
    site.preflight(bad)
    assert site.start(nodes=nodes) in (EXIT_AGAIN, EXIT_DEFECT)
    assert "requeue 12" in site.calls
    updates = [call for call in site.calls if "ExcNodeList" in call]
    assert updates == ([f"update JobId=12 ExcNodeList={excluded}"] if excluded else [])


def test_a_preflight_that_cannot_write_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.delenv("LECTERN_PREFLIGHT")
    monkeypatch.setattr(stage_module, "run_preflight", fail)
    assert site.start() == EXIT_AGAIN
    assert "No space left" in read_starts(site.stage)[-1].reason
    assert "requeue 12" in site.calls


def test_a_full_disk_does_not_keep_a_job_from_going_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = site.job()

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launch.starts.write_json", fail)
    site.slurm(RUNNING, f"kill -TERM $PPID; {TOLD}")
    with site.signals.caught():
        assert job.run() == EXIT_AGAIN
    assert "requeue 12" in site.calls
    assert "the end of this start is not recorded" in capsys.readouterr().err


def test_ranks_that_hang_are_ended_by_srun_where_the_controller_is_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "KILL_PATIENCE_S", 0.3)
    monkeypatch.setattr("launch.watchdog.DUMP_PATIENCE_S", 0.0)
    record = {"rank": 0, "host": "n1", "pid": 1, "step": 3, "phase": "saving", "since": 0.0}
    limits = {"time": 1.0, "allowed_s": 0.1, "silence_s": 900.0}
    site.slurm(srun="trap '' TERM; while :; do sleep 0.02; done")
    job = site.job(nodes=("n1",))
    folder = next((site.stage / "starts").iterdir())
    write_json(folder / "rank-00000.json", record | limits)
    monkeypatch.setattr("launch.watchdog.LOOK_EVERY_S", 0.1)
    with site.signals.caught():
        assert job.run() == EXIT_AGAIN
    last = read_starts(site.stage)[-1]
    assert last.code == 128 + signal.SIGKILL
    assert last.reason.startswith("hang, rank 0 on n1")


def test_a_start_that_was_replaced_does_not_end_the_ranks_of_the_next_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step has the same id. Nor does it put the job back into the queue."""
    site.slurm(srun="sleep 0.5; exit 70")
    job = site.job()
    folder = next((site.stage / "starts").iterdir())
    silent = {"rank": 0, "host": "n1", "pid": 1, "step": 3, "phase": "saving", "since": 0.0}
    write_json(folder / "rank-00000.json", silent | {"time": 1.0, "allowed_s": 1, "silence_s": -1})
    (folder / "step").write_text("0")
    claim(site.stage, new_start({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}))
    with site.signals.caught(), pytest.raises(LaunchError, match=r"taken over by job 12 \(restart"):
        job.run()
    assert not [call for call in site.calls if "--signal" in call or "requeue" in call]


@pytest.mark.parametrize("name", ["LECTERN_MAX_FAILURES", "LECTERN_MIN_NODES"])
def test_a_wrong_setting_is_told_before_anything_is_claimed(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "0")
    with pytest.raises(LaunchError, match=f"{name}=0: expected a whole number") as caught:
        site.job()
    assert caught.value.exit_code == EXIT_USER
    assert not (site.stage / "owner.json").exists()


def test_records_and_folders_that_are_none_of_ours_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a", ""), ("b", '{"name": "b"}'), ("c", "null")):
        (tmp_path / "starts" / name).mkdir(parents=True)
        (tmp_path / "starts" / name / "start.json").write_text(content)
    (tmp_path / "starts" / "d").mkdir()
    StartRecord("d", "12", 0, ("n1",), 1.0, 0).write(tmp_path)
    assert [start.name for start in read_starts(tmp_path)] == ["d"]
    assert capsys.readouterr().err.count("is left out") == 3
    for name in ("step-00000007", "step-00000009-kept", "step-latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 7
    assert json.loads((tmp_path / "starts/d/start.json").read_text())["action"] is None
