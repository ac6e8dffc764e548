"""The pipeline command with a Slurm of files: submit, status, cancel, resume, dry run, local."""

import fcntl
import getpass
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import ConfigError, LaunchError
from launch.pipeline import __main__ as pipeline
from launch.pipeline import local as pipeline_local
from launch.pipeline import submit as pipeline_submit
from launch.pipeline.record import job_name
from launch.pipeline.status import chain_status, duration, seconds_per_step
from launch.process import ROOT
from tests.builders import write_run
from tests.launch.chains import NUM_HELD_OUT, write_chain
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.test_plan import record_of, write_json
from tests.launches import run

STEPS = ["shard", "stage1", "convert1", "stage2", "convert2", "evaluate"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the command does to the environment ends with the test."""
    before = dict(os.environ)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pipeline_submit, "CONFIRM_S", 0.0)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    os.environ["PATH"] = fake.path
    return fake


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    write_json(tmp_path / "base" / "config.json", {})
    return write_run(tmp_path / "pipeline.yaml", record_of(tmp_path))


def call(config: Path, *words: str) -> int:
    return pipeline.main([str(config), *words])


def ids(config: Path) -> dict[str, str]:
    record = json.loads((config.parent / "run" / "pipeline.json").read_text())
    return {name: job["job_id"] for name, job in record["jobs"].items()}


def options_of(words: list[str]) -> dict[str, str]:
    return dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


def finish(config: Path, slurm: FakeSlurm, *names: str) -> None:
    """Let steps complete, their results and their jobs."""
    results = {
        "shard": ("shards/summary.json", {"documents": 5}),
        "stage1": ("run/stage1/status.json", {"state": "done", "step": 4, "total_steps": 4}),
        "convert1": ("run/stage1/hf/export.json", {"steps": [4]}),
    }
    for name in names:
        path, content = results[name]
        write_json(config.parent / path, content)
        slurm.set(ids(config)[name], JobState="COMPLETED")


def fail(slurm: FakeSlurm, job_id: str, code: str) -> None:
    slurm.set(job_id, JobState="FAILED", ExitCode=code)


def test_the_chain_is_submitted_in_order(config: Path, slurm: FakeSlurm) -> None:
    assert call(config) == 0
    calls = slurm.calls("sbatch")
    scripts = [next(word for word in words if word.startswith("slurm/")) for words in calls]
    names = ("shard", "stage1", "convert", "stage2", "convert", "evaluate")
    assert scripts == [f"slurm/{name}.sh" for name in names]
    options = [options_of(words) for words in calls]
    assert [o["dependency"] for o in options] == [
        "singleton",
        *(f"afterok:{number},singleton" for number in range(100, 105)),
    ]
    run = config.parent / "run"
    for name, option in zip(STEPS, options, strict=True):
        assert option["job-name"] == job_name(run, name)
        assert option["kill-on-invalid-dep"] == "yes"
        assert option["comment"] == str(run)
    assert options[1]["nodes"] == "2"
    record = json.loads((run / "pipeline.json").read_text())
    assert list(record["jobs"]) == STEPS
    assert all(len(job["git"]) >= 40 for job in record["jobs"].values())
    assert ids(config) == dict(zip(STEPS, map(str, range(100, 106)), strict=True))
    assert record["jobs"]["stage2"]["after"] == ["102"]


def test_names_are_unique_to_run_and_step(tmp_path: Path) -> None:
    names = {job_name(tmp_path / run, step) for run in ("a/x", "b/x") for step in STEPS}
    assert len(names) == 12
    assert job_name(tmp_path / "my run", "shard").startswith("shard-my-run-")


def test_typed_twice_nothing_is_submitted_twice(
    config: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    call(config)
    slurm.set("100", JobState="RUNNING")
    capsys.readouterr()
    for words in ((), ("resume",)):
        assert call(config, *words) == 0
        out = capsys.readouterr().out
        assert "shard     job 100, RUNNING" in out and "stage1    job 101, PENDING" in out
        assert "nothing to submit" in out
    assert len(slurm.calls("sbatch")) == 6


def test_a_job_that_was_not_recorded_is_found_by_its_name(config: Path, slurm: FakeSlurm) -> None:
    """The command died between sbatch and its record."""
    call(config)
    path = config.parent / "run" / "pipeline.json"
    record = json.loads(path.read_text())
    for name in ("stage2", "convert2", "evaluate"):
        del record["jobs"][name]
    path.write_text(json.dumps(record))
    for number in ("104", "105"):  # of these there never was a job
        slurm.set(number, JobState="CANCELLED")
    assert call(config) == 0
    assert len(slurm.calls("sbatch")) == 8
    assert ids(config)["stage2"] == "103"
    assert options_of(slurm.calls("sbatch")[6])["dependency"] == "afterok:103,singleton"


def test_a_refused_job_leaves_the_others_recorded(config: Path, slurm: FakeSlurm) -> None:
    slurm.switch("refuse")
    with pytest.raises(LaunchError, match=r"(?s)shard was not submitted: .*Invalid account"):
        call(config)
    (slurm.folder / "refuse").unlink()
    call(config)
    assert list(ids(config)) == STEPS


def fail_stage1(config: Path, slurm: FakeSlurm) -> None:
    call(config)
    finish(config, slurm, "shard")
    fail(slurm, "101", "2:0")


def test_a_failed_job_is_named_with_code_log_and_advice(config: Path, slurm: FakeSlurm) -> None:
    fail_stage1(config, slurm)
    for number in range(102, 106):
        slurm.set(str(number), JobState="CANCELLED")
    with pytest.raises(LaunchError) as caught:
        call(config)
    text = str(caught.value)
    name = job_name(config.parent / "run", "stage1")
    assert "stage1 (job 101) ended as FAILED with exit code 2: something has to be changed" in text
    assert f"logs/{name}-101.out" in text
    assert "convert1, stage2, convert2, evaluate did not run because of it" in text
    assert len(slurm.calls("sbatch")) == 6

    assert call(config, "resume") == 0
    new = slurm.calls("sbatch")[6:]
    assert [options_of(words)["job-name"].partition("-")[0] for words in new] == STEPS[1:]
    assert options_of(new[0])["dependency"] == "singleton", "shards are there"
    assert options_of(new[1])["dependency"] == "afterok:106,singleton"
    record = json.loads((config.parent / "run" / "pipeline.json").read_text())
    assert record["jobs"]["stage1"]["earlier"] == ["101"]


def test_waiting_dependants_of_a_failed_job_are_replaced(config: Path, slurm: FakeSlurm) -> None:
    """Where a site ignores --kill-on-invalid-dep they would wait for ever."""
    fail_stage1(config, slurm)
    assert call(config, "resume") == 0
    assert [words[-1] for words in slurm.calls("scancel")] == ["105", "104", "103", "102"]
    assert len(slurm.calls("sbatch")) == 11


def test_a_dependant_that_runs_is_not_replaced(config: Path, slurm: FakeSlurm) -> None:
    fail_stage1(config, slurm)
    slurm.set("102", JobState="RUNNING")
    with pytest.raises(LaunchError, match="convert1 runs already, though stage1 is not done"):
        call(config, "resume")
    assert len(slurm.calls("sbatch")) == 6


def test_a_resumed_stage_is_not_stopped_by_the_old_stop_file(
    config: Path, slurm: FakeSlurm
) -> None:
    fail_stage1(config, slurm)
    stop = config.parent / "run" / "stage1" / "STOP"
    stop.parent.mkdir(parents=True)
    stop.touch()
    call(config, "resume")
    assert not stop.exists()


def test_an_id_that_is_another_jobs_by_now_is_not_ours(config: Path, slurm: FakeSlurm) -> None:
    """A controller that forgot a job gives its id away again."""
    call(config)
    slurm.set("100", JobName="somebody-elses", JobState="RUNNING")
    with pytest.raises(LaunchError, match=r"shard \(job 100\) has ended .* no longer knows it"):
        call(config)
    call(config, "resume")
    assert ids(config)["shard"] == "106"
    assert ["100"] not in slurm.calls("scancel")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (None, "Slurm knows no such job"),
        ({"UserId": "eve(7)", "JobState": "RUNNING"}, "belongs to eve"),
        ({"JobState": "FAILED"}, "the job is FAILED; the chain would never start"),
    ],
)
def test_what_the_chain_cannot_wait_for_is_refused_before_anything_is_submitted(
    config: Path, slurm: FakeSlurm, about: dict[str, str] | None, message: str
) -> None:
    if about is not None:
        slurm.set("77", **{"JobName": "x", "UserId": f"{getpass.getuser()}(0)"} | about)
    with pytest.raises(LaunchError, match=message):
        call(config, "--after", "77")
    assert slurm.calls("sbatch") == []


def test_the_chain_waits_for_a_job_of_the_user(config: Path, slurm: FakeSlurm) -> None:
    slurm.set("77", JobName="x", UserId=f"{getpass.getuser()}(0)", JobState="RUNNING")
    call(config, "--after", "77")
    dependencies = [options_of(words)["dependency"] for words in slurm.calls("sbatch")]
    assert dependencies[:2] == ["afterok:77,singleton", "afterok:78,singleton"]


def test_a_job_that_slurm_forgets_at_once_is_told(config: Path, slurm: FakeSlurm) -> None:
    slurm.switch("forget")
    with pytest.raises(LaunchError, match=r"shard: Slurm has forgotten job 100") as caught:
        call(config)
    assert caught.value.exit_code == 75
    (slurm.folder / "forget").unlink()
    assert call(config, "resume") == 0


def test_cancel_takes_dependants_first_and_lets_a_stage_save(
    config: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    call(config)
    finish(config, slurm, "shard")
    slurm.set("101", JobState="RUNNING", Reason="None")
    for _ in range(2):
        assert call(config, "cancel") == 0
    cancelled = slurm.calls("scancel")
    assert cancelled[:4] == [["105"], ["104"], ["103"], ["102"]]
    assert cancelled[4:] == [["--batch", "--signal=USR1", "101"]] * 2
    assert (config.parent / "run" / "stage1" / "STOP").exists()
    fail(slurm, "101", "75:0")
    capsys.readouterr()
    assert call(config, "cancel") == 0
    assert capsys.readouterr().out == "nothing is queued or running\n"
    assert chain_status(pipeline.load_plan(config))[0][1].state == "stopped"
    with pytest.raises(LaunchError, match=r"\(job 101\) was stopped and can go on"):
        call(config)


def test_two_commands_at_once_are_kept_apart(config: Path, slurm: FakeSlurm) -> None:
    lock = config.parent / "run" / "pipeline.lock"
    lock.parent.mkdir()
    with open(lock, "w") as file:
        file.write('{"host": "login2", "pid": 4711}')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        for verb in ("submit", "resume", "cancel"):
            with pytest.raises(LaunchError, match=r"this run \(process 4711 on login2\): wait"):
                call(config, verb)
    assert slurm.calls("sbatch") == []
    assert call(config) == 0


def test_changed_arguments_of_a_queued_job_are_told(
    config: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    call(config)
    call(config, "--set", "stage2.set.optim.lr=1e-4", "--set", "evaluate.sbatch.partition=p")
    lines = capsys.readouterr().out.splitlines()
    changed = [line for line in lines if "submitted with other arguments" in line]
    assert [line.split()[0] for line in changed] == ["stage2", "evaluate"]


def test_dry_run_needs_no_slurm_and_shows_commands_and_scripts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "is_available", lambda: False)
    write_json(config.parent / "shards" / "summary.json", {"documents": 5})
    assert call(config, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "# shard: done already" in out
    assert out.count("\nsbatch --parsable") == 5
    assert "--dependency=afterok:ID-OF-stage1,singleton" in out
    assert out.count("    #SBATCH --open-mode=append") == 4, "that of both exports once"
    assert not (config.parent / "run").exists()
    with pytest.raises(LaunchError, match="run the chain on this machine with --local"):
        call(config)


def test_the_sites_file_is_read_and_cpu_jobs_ask_for_no_gpus(
    config: Path, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "clone" / "slurm" / "site.sh"
    site.parent.mkdir(parents=True)
    site.write_text("SBATCH_GPUS_PER_NODE=8\nexport SBATCH_ACCOUNT='a b'; echo loud\n")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    pipeline_submit.take_up_site(site.parent.parent)
    assert os.environ["SBATCH_ACCOUNT"] == "a b"
    assert "SLURM_CPUS_PER_TASK" not in os.environ
    call(config)
    assert ["SBATCH_GPUS_PER_NODE" in site for site in slurm.site_of_calls()] == [
        *(False, True, False, True, False, True)
    ]
    site.write_text("echo no such module >&2; false\n")
    with pytest.raises(ConfigError, match=r"slurm/site.sh failed: no such module"):
        pipeline_submit.take_up_site(site.parent.parent)


def write_progress(folder: Path) -> None:
    write_json(
        folder / "status.json",
        {
            "state": "running",
            "step": 40,
            "total_steps": 100,
            "loss": 0.51234,
            "tokens_per_s": 1999.6,
            "restarts": 2,
            "host": "n7",
            "time": time.time(),
        },
    )
    steps = (10, 20, 30, 40)  # 2 s a step, and a pause
    lines = [{"step": s, "time": 2.0 * s + 500 * (s > 20), "train/loss": 1.0} for s in steps]
    lines.insert(2, {"step": 20, "time": 77.0, "validation/cer": 0.1})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 50, "ti')


def test_status_shows_step_loss_speed_remaining_and_restarts(
    config: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    call(config)
    finish(config, slurm, "shard")
    slurm.set("101", JobState="RUNNING", Reason="None", NodeList="n[1-2]", Restarts="3")
    write_progress(config.parent / "run" / "stage1")
    capsys.readouterr()
    assert call(config, "status") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["shard", "done", "100", "0"]
    assert out[2].split() == [
        *("stage1", "RUNNING", "101", "n[1-2]", "40/100", "0.5123", "2000", "00:02:00", "3")
    ]
    assert out[3].split() == ["convert1", "PENDING", "102", "0", "Dependency"]
    assert [line.split(":")[0] for line in out[7:]] == ["log of stage1"]
    fail(slurm, "101", "2:0")
    call(config, "status", "--json")
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert (steps[1]["state"], steps[1]["reason"]) == ("FAILED", "exit code 2")
    assert steps[1]["log"].endswith("-101.out")


def test_status_adds_up_the_tasks_of_an_array(
    config: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    call(config)
    name = job_name(config.parent / "run", "shard")
    slurm.set("100", ArrayJobId="100", JobState="PENDING")
    slurm.set("120", JobName=name, ArrayJobId="100", JobState="RUNNING", Restarts="1", Reason="x")
    slurm.set("121", JobName=name, ArrayJobId="100", JobState="COMPLETED", Reason="None")
    capsys.readouterr()
    call(config, "status", "--json")
    shard = json.loads(capsys.readouterr().out)["steps"][0]
    assert (shard["state"], shard["job_id"], shard["restarts"]) == ("RUNNING", "100", 1)
    assert shard["reason"] == "1 PENDING, 1 RUNNING, 1 COMPLETED"
    slurm.set("100", JobState="COMPLETED")
    slurm.set("120", JobState="FAILED", ExitCode="65:0", Reason="NonZeroExitCode")
    with pytest.raises(LaunchError, match=r"shard \(job 100\) .* exit code 65: the data are bad"):
        call(config)


def test_status_works_from_files_alone(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.pipeline.status.is_available", lambda: False)
    write_progress(config.parent / "run" / "stage1")
    call(config, "status")
    out = capsys.readouterr().out
    assert "stage1    running      n7     40/100  0.5123  2000      00:02:00  2" in out
    assert "(from the run's files alone: Slurm is not on this machine)" in out


def test_a_held_job_says_how_to_release_it(config: Path, slurm: FakeSlurm) -> None:
    call(config)
    slurm.set("101", Reason="launch_failed_requeued_held")
    rows, _ = chain_status(pipeline.load_plan(config))
    assert rows[1].reason == "launch_failed_requeued_held: `scontrol release 101`"


def test_a_job_that_completed_without_a_result_is_told(config: Path, slurm: FakeSlurm) -> None:
    call(config)
    slurm.set("100", JobState="COMPLETED")
    with pytest.raises(LaunchError, match=r"but .*/summary.json does not say that it is done"):
        call(config)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_whole_chain_runs_on_this_machine(tmp_path: Path) -> None:
    chain = write_chain(tmp_path)
    command = [sys.executable, "-m", "launch.pipeline", str(chain), "--local", "--ranks", "2"]
    outcome = run(command, timeout_s=500)
    assert outcome.code == 0, outcome.output
    report = json.loads((tmp_path / "run" / "stage2" / "report" / "report.json").read_text())
    assert report["num_samples"] == NUM_HELD_OUT
    again = run(command, timeout_s=60)
    assert (again.code, again.stdout.count("done already")) == (0, 6), again.output


def test_speed_and_durations() -> None:
    assert seconds_per_step([]) is None
    assert duration(93784) == "1d 02:03"


def note_local(config: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let --local note its commands instead of running them; each leaves its result."""
    commands: list[list[str]] = []
    contents: dict[str, Any] = {
        "summary.json": {"documents": 5},
        "status.json": {"state": "done", "step": 4},
        "export.json": {"steps": [4]},
        "report.json": {"num_samples": 3},
    }
    results = iter(job.result for job in pipeline.load_plan(config).jobs)

    def note(command: list[str], advice: str = "") -> None:
        commands.append(command)
        path = Path(next(results))
        write_json(path, contents[path.name])

    monkeypatch.setattr(pipeline_local, "run", note)
    return commands


def test_local_runs_the_same_commands_once(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = note_local(config, monkeypatch)
    assert call(config, "--local", "--ranks", "2") == 0
    assert len(commands) == 6
    plan = pipeline.load_plan(config)
    for job, command in zip(plan.jobs, commands, strict=True):
        words = list(job.arguments)
        assert command[-len(words) :] == words
    assert commands[1][3:6] == [commands[1][3], "--num_gpus", "2"]
    capsys.readouterr()
    assert call(config, "--local", "--ranks", "2") == 0
    assert capsys.readouterr().out.count("done already") == 6
    assert len(commands) == 6


def test_local_is_refused_beside_the_jobs(
    config: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = note_local(config, monkeypatch)
    call(config)
    with pytest.raises(LaunchError, match="shard, stage1, .* queued or running as Slurm jobs"):
        call(config, "--local")
    assert commands == []


@pytest.mark.parametrize(
    "words",
    [
        ("--ranks", "2"),
        ("--json",),
        ("cancel", "--local"),
        ("status", "--dry-run"),
        ("--local", "--ranks", "0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(config: Path, words: Any) -> None:
    with pytest.raises(ConfigError):
        call(config, *words)
