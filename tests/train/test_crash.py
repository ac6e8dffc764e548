"""SIGKILL at any moment of a save: a whole checkpoint is found, the end is that of no crash."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import run_record, write_run, write_shards
from tests.launches import kill_when, launcher, run, start
from tests.train.crash import crash_once, expected_state, final_state, start_ranks
from tests.train.tiny import tiny_folder
from train.checkpoint.manifest import list_checkpoints, verify

LAST_STEP = 40
LONGEST_S = 0.5
LAUNCH_S = 150


def campaign(folder: Path, num_kills: int, seed: int) -> None:
    """Kill so many times; whenever a run gets to its end, check it and begin anew."""
    draw = random.Random(seed)
    kills, ends, furthest = 0, 0, 0
    while kills < num_kills or not ends:
        place = folder / f"run-{ends}"
        kills += crash_once(place, draw, LAST_STEP, LONGEST_S)
        found = list_checkpoints(place)
        assert all(not verify(path) for _, path in found), f"seed {seed}: a visible one is broken"
        newest = found[-1][0] if found else 0
        assert newest >= furthest, f"seed {seed}: from step {furthest} back to {newest}"
        furthest = newest
        if furthest == LAST_STEP or kills >= num_kills:
            for rank in start_ranks(place, 2, LAST_STEP):
                rank.join(60)
                assert rank.exitcode == 0
            step, state = final_state(place)
            assert step == LAST_STEP
            for key, values in expected_state(LAST_STEP).items():
                assert torch.equal(state[key], values), f"seed {seed}: {key} differs"
            shutil.rmtree(place)
            ends, furthest = ends + 1, 0
    print(f"seed {seed}: {kills} kills, {ends} runs to their end, all bitwise")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1])
def test_kills_at_any_moment_of_a_save(tmp_path: Path, seed: int) -> None:
    campaign(tmp_path, 15, seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_kills(tmp_path: Path) -> None:
    campaign(tmp_path, 200, seed=20261124)


def reaches(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(number >= step for number, _ in list_checkpoints(folder))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_kills_of_a_full_training_on_two_ranks(tmp_path: Path) -> None:
    """The launcher, ZeRO-3, the loader and the background writer, killed at random times."""
    seed = 7
    draw = random.Random(seed)
    shards = write_shards(tmp_path / "shards", [6, 4])
    model = tiny_folder(tmp_path / "model")
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 40})
    record["checkpoint"] = {"every_steps": 1, "keep_last": 2}
    record["data"] |= {"num_workers": 1}
    config = write_run(tmp_path / "c.yaml", record)
    command = [*launcher("deepspeed"), "--config", str(config)]
    whole = run([*command, f"run.dir={tmp_path / 'whole'}"], timeout_s=LAUNCH_S)
    assert whole.code == 0, whole.output
    killed = tmp_path / "killed" / "stage2"
    folder, goal = killed / "checkpoints", 0
    for _ in range(10):
        goal += draw.randint(1, 3)
        process = start([*launcher("deepspeed"), "--config", str(config),
                         f"run.dir={killed.parent}"])  # fmt: skip
        kill_when(process, reaches(folder, goal), LAUNCH_S, delay_s=draw.uniform(0, 0.3))
        assert all(not verify(path) for _, path in list_checkpoints(folder)), f"seed {seed}"
    end = run([*command, f"run.dir={killed.parent}"], timeout_s=LAUNCH_S)
    assert end.code == 0, end.output
    for name in ("step-00000039", "step-00000040"):
        for shard in sorted((tmp_path / "whole/stage2/checkpoints" / name).glob("*.safetensors")):
            assert shard.read_bytes() == (killed / "checkpoints" / name / shard.name).read_bytes()
