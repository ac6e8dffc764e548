"""The real commands: one clear error and the right code from every launcher; kill and resume."""

import signal
import time
from pathlib import Path

import pytest

from tests.builders import run_record, write_run, write_shards
from tests.launches import kill_when, launcher, run, start
from tests.train.tiny import tiny_folder

LAUNCH_S = 120


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", [6, 4])
    model = tiny_folder(tmp_path / "model")
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 8})
    record["checkpoint"] = {"every_steps": 2, "keep_last": 9}
    return write_run(tmp_path / "c.yaml", record)


ERRORS = {
    "unknown key": (["optim.lrr=1"], "optim.lrr is not a known key. Did you mean optim.lr?"),
    "missing shards": (["data.validation=[/no/such.tar]"], "no shard matches /no/such.tar"),
    "missing model": (["model.path=/no/such"], "there is no folder /no/such"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
def test_a_users_error_is_one_message_with_code_2(config: Path, case: str, dry_run: bool) -> None:
    overrides, message = ERRORS[case]
    flags = ["--dry-run"] if dry_run else []
    outcome = run(
        [*launcher("python"), "--config", str(config), *flags, *overrides], timeout_s=LAUNCH_S
    )
    assert outcome.code == 2
    assert outcome.output.count(message) == 1
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("case", [*ERRORS, "more ranks than packs"])
def test_deepspeed_passes_code_2_on_and_prints_once(config: Path, case: str) -> None:
    overrides, message = ERRORS.get(case, (["data.packs_per_step=1"], "there are 2 ranks"))
    command = [*launcher("deepspeed"), "--config", str(config), *overrides]
    outcome = run(command, timeout_s=LAUNCH_S)
    assert outcome.code == 2
    assert outcome.output.count(message) == 1
    assert "Traceback" not in outcome.output


def test_torchrun_fails_with_one_message(config: Path) -> None:
    command = [*launcher("torchrun"), "--config", str(config), "optim.lrr=1"]
    outcome = run(command, timeout_s=LAUNCH_S)
    assert outcome.code != 0
    assert outcome.output.count("optim.lrr is not a known key") == 1


def test_without_a_config_the_keys_that_are_yours_are_named() -> None:
    outcome = run(launcher("python"), timeout_s=LAUNCH_S)
    assert outcome.code == 2
    for key in ("run.dir", "model.path", "data.train", "data.validation"):
        assert f"{key} must be set (yours to set)" in outcome.stderr


def test_dry_run_prints_the_plan_and_trains_nothing(config: Path, tmp_path: Path) -> None:
    outcome = run([*launcher("python"), "--config", str(config), "--dry-run"], timeout_s=LAUNCH_S)
    assert outcome.code == 0, outcome.output
    for part in ("documents a pack", "pack fill", "steps:", "trained", "GB a rank"):
        assert part in outcome.stdout
    assert not (tmp_path / "run").exists()


def test_sigkill_and_resume_equal_the_undisturbed_run_bitwise(config: Path, tmp_path: Path) -> None:
    command = [*launcher("deepspeed"), "--config", str(config)]
    whole = run([*command, f"run.dir={tmp_path / 'whole'}"], timeout_s=LAUNCH_S)
    assert whole.code == 0, whole.output
    killed = tmp_path / "killed" / "stage2"
    process = start([*launcher("deepspeed"), "--config", str(config), f"run.dir={killed.parent}"])
    kill_when(process, (killed / "checkpoints" / "step-00000004").exists, LAUNCH_S)
    assert not (killed / "checkpoints" / "step-00000008").exists()
    command = [*launcher("deepspeed"), "--config", str(config), f"run.dir={killed.parent}"]
    resumed = run(command, timeout_s=LAUNCH_S)
    assert resumed.code == 0, resumed.output
    assert "resumed at step" in resumed.output
    undisturbed = tmp_path / "whole" / "stage2"
    for name in ("checkpoints/step-00000006", "checkpoints/step-00000008"):
        shards = sorted((undisturbed / name).glob("*.safetensors"))
        assert len(shards) == 2
        for shard in shards:  # master weights, moments, random state: every byte
            assert shard.read_bytes() == (killed / name / shard.name).read_bytes()
    expected = (undisturbed / "data.jsonl").read_text(encoding="utf-8")
    assert (killed / "data.jsonl").read_text(encoding="utf-8") == expected
    again = run(command, timeout_s=LAUNCH_S)
    assert again.code == 0
    assert "is done" in again.output


def test_torchrun_trains_as_well(config: Path, tmp_path: Path) -> None:
    outcome = run(
        [*launcher("torchrun"), "--config", str(config), "stage.max_steps=2"], timeout_s=LAUNCH_S
    )
    assert outcome.code == 0, outcome.output
    assert (tmp_path / "run/stage2/checkpoints/step-00000002").is_dir()


def test_sigterm_saves_and_ends_with_code_75(config: Path, tmp_path: Path) -> None:
    command = [*launcher("python"), "--config", str(config), "stage.max_steps=100000"]
    process = start([*command, "checkpoint.every_steps=100000"])
    log = tmp_path / "run/stage2/log.jsonl"
    deadline = time.monotonic() + LAUNCH_S
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=LAUNCH_S))
    assert process.returncode == 75, output
    assert len(list((tmp_path / "run/stage2/checkpoints").glob("step-*"))) == 1
