"""A signal at any moment: during the start, during an evaluation; and a start that was replaced."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import EXIT_AGAIN, EXIT_DONE, LaunchError
from tests.builders import run_record, write_run
from tests.harness import run_ranks
from tests.launches import ROOT
from tests.train.trainers import gathered, losses_of, start
from train.checkpoint.manifest import list_checkpoints
from train.ownership import claim, new_start
from train.signals import StopSignal

EVALUATED = {"every_steps": 2, "num_samples": 4, "max_new_tokens": 4, "metric": "loss"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_start_ends_at_once_since_nothing_is_to_be_saved(number: int) -> None:
    code = "from train.signals import StopSignal\nStopSignal()\nprint('up', flush=True)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_AGAIN
    assert "during the start: nothing to save" in said


def test_a_deferred_signal_is_noted() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopSignal()
        stop.defer()
        assert not stop.has_come()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.has_come()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_and_signal_in_evaluation(config: Path) -> tuple[int, int]:
    """Signal one rank while the second evaluation decodes; return (exit code, step saved)."""
    trainer = start(config)
    evaluate = trainer.evaluator.run

    def interrupted(engine: Any, must_stop: Any) -> Any:
        if trainer.step == 4 and trainer.ranks.rank == trainer.ranks.world_size - 1:
            trainer.presence.stop.number = signal.SIGTERM
        return evaluate(engine, must_stop)

    trainer.evaluator.run = interrupted  # type: ignore[method-assign]
    return trainer.run(), trainer.step


def run_on(config: Path) -> tuple[int, dict[str, Any], dict]:
    trainer = start(config)
    code = trainer.run()
    return code, trainer.stopping.state(), gathered(trainer)


@pytest.mark.timeout(240)
def test_an_evaluation_that_is_given_up_is_made_up_for(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    stopping = {"number": 2, "max_steps": 6, "early_stopping": {"patience": 5}}
    configs = []
    for name in ("calm", "signalled"):
        record = run_record(tmp_path / name, model, shards, stage=stopping, evaluation=EVALUATED)
        configs.append(write_run(tmp_path / f"{name}.yaml", record))
    calm, signalled = configs
    expected = run_ranks(2, run_on, calm, timeout_s=120)[0]
    assert (
        run_ranks(2, run_and_signal_in_evaluation, signalled, timeout_s=120)
        == [(EXIT_AGAIN, 4)] * 2
    )
    found = run_ranks(2, run_on, signalled, timeout_s=120)[0]
    assert found[0] == EXIT_DONE
    assert found[1] == expected[1], "early stopping knows of every evaluation"
    assert all(found[2][name].equal(expected[2][name]) for name in expected[2])
    stages = [tmp_path / name / "stage2" for name in ("calm", "signalled")]
    assert losses_of(stages[0]) == losses_of(stages[1])
    assert evaluations(stages[0]) == evaluations(stages[1])


def evaluations(stage: Path) -> list[tuple[int, float]]:
    lines = (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)
    return [(r["step"], r["validation/loss"]) for r in records if "validation/loss" in r]


def run_until_replaced(config: Path) -> str:
    trainer = start(config)
    agree = trainer._agree

    def replaced(step: Any) -> Any:
        if trainer.step == 2:
            trainer.saver.wait()
            elsewhere = new_start({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
            claim(trainer.config.folder, elsewhere)
        return agree(step)

    trainer._agree = replaced  # type: ignore[method-assign]
    with pytest.raises(LaunchError) as caught:
        trainer.run()
    trainer.saver.save(3, {})
    trainer.saver.close(must_hold=False)
    return str(caught.value)


def test_a_start_that_was_replaced_writes_nothing_more(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    stage = {"number": 2, "max_steps": 9}
    record = run_record(tmp_path / "run", model, shards, stage=stage)
    record["checkpoint"] |= {"every_steps": 1, "keep_last": 9}
    config = write_run(tmp_path / "c.yaml", record)
    message = run_ranks(1, run_until_replaced, config, timeout_s=90)[0]
    assert "was taken over by job 7 (restart 1)" in message
    folder = tmp_path / "run" / "stage2"
    assert len(losses_of(folder)) == 2
    assert [step for step, _ in list_checkpoints(folder / "checkpoints")] == [1, 2]
