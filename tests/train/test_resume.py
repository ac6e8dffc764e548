"""Going on after an end: the same samples, the same decisions, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools import ledger
from tests.builders import run_record, write_run, write_shards
from tests.harness import run_ranks
from tests.train.trainers import losses_of, run_to_end, start


def test_resume_on_another_world_size_sees_the_same_samples(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    whole = run_record(tmp_path / "whole", model, shards, stage={"number": 2, "max_steps": 6})
    run_ranks(2, run_to_end, write_run(tmp_path / "whole.yaml", whole), timeout_s=90)
    half = run_record(tmp_path / "half", model, shards, stage={"number": 2, "max_steps": 3})
    run_ranks(2, run_to_end, write_run(tmp_path / "half.yaml", half), timeout_s=90)
    (tmp_path / "half" / "stage2" / "status.json").unlink()  # not done: more steps are wanted
    half["stage"]["max_steps"] = 6
    run_ranks(1, run_to_end, write_run(tmp_path / "half.yaml", half), timeout_s=90)
    plans = [
        (tmp_path / name / "stage2" / "data.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("whole", "half")
    ]
    assert plans[0] == plans[1]
    seen = [keys_of_steps(tmp_path / name / "stage2") for name in ("whole", "half")]
    assert seen[0] == seen[1] and len(seen[0]) == 6
    assert max(sample["epoch"] for step in seen[0] for pack in step for sample in pack) > 1
    assert losses_of(tmp_path / "half" / "stage2") == pytest.approx(
        losses_of(tmp_path / "whole" / "stage2"), rel=1e-5
    )


def keys_of_steps(stage: Path) -> list[list[list[dict[str, Any]]]]:
    """Return the packs of every step as the ledger makes them from the run's files."""
    path = stage / "seen.jsonl"
    assert ledger.main([str(stage), "--out", str(path)]) == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["packs"] for line in lines]


def test_resume_with_other_data_settings_is_refused(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 1})
    run_ranks(1, run_to_end, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    (tmp_path / "run" / "stage2" / "status.json").unlink()
    for change in ({"token_budget": 128}, {"max_chars": 30}):
        changed = record | {"data": record["data"] | change}
        config = write_run(tmp_path / "changed.yaml", changed)
        message = run_ranks(1, start_and_catch, config, timeout_s=60)[0]
        assert "made with other data settings" in message


def test_a_refused_start_leaves_the_data_of_the_run_as_it_was(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    """Cursors mean nothing in a catalogue of other settings: shards would join too early."""
    stage = {"number": 2, "max_steps": 1}
    prior = {"char_prior": {"rarity": 0.5}}
    record = run_record(tmp_path / "run", model, shards, stage=stage, loss=prior)
    run_ranks(1, run_to_end, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    folder = tmp_path / "run" / "stage2"
    (folder / "status.json").unlink()
    files = [*(folder / "data").iterdir(), folder / "characters.json", folder / "plan.json"]
    before = [path.read_bytes() for path in files]
    other = write_shards(tmp_path / "more", [3], first=40)
    sources = [*record["data"]["train"], {"shards": other[0]}]
    for change in ({"max_chars": 30}, {"train": sources}):
        changed = record | {"data": record["data"] | change}
        message = run_ranks(
            1, start_and_catch, write_run(tmp_path / "changed.yaml", changed), timeout_s=60
        )[0]
        assert "made with other data settings" in message
        assert [path.read_bytes() for path in files] == before
    assert "data.train (1 sources, now 2)" in message


def start_and_catch(config_path: Path) -> str:
    from data_tools.errors import CheckpointError

    try:
        start(config_path)
    except CheckpointError as error:
        return str(error)
    return "resumed"


def test_killed_between_evaluations_stops_as_early_as_undisturbed(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    stage = {"number": 2, "max_steps": 20, "early_stopping": {"patience": 2, "min_delta": 1e6}}
    ends = []
    for name in ("whole", "cut"):
        record = run_record(tmp_path / name, model, shards, stage=stage)
        record["evaluation"] |= {"every_steps": 2, "num_samples": 2, "max_new_tokens": 1}
        record["checkpoint"] |= {"every_steps": 2, "keep_last": 1}
        config = write_run(tmp_path / f"{name}.yaml", record)
        if name == "cut":
            run_ranks(1, run_until_step, config, 4, timeout_s=60)
        run_ranks(1, run_to_end, config, timeout_s=60)
        checkpoints = sorted(p.name for p in (tmp_path / name).rglob("step-*"))
        ends.append(checkpoints)
    # The first evaluation is the best, two more end the stage; the best checkpoint is kept.
    assert ends[0] == ["step-00000002", "step-00000006"]
    assert ends[1] == ends[0]


def run_until_step(config_path: Path, step: int) -> None:
    """Train and vanish after a step's checkpoint, as a killed process does."""
    trainer = start(config_path)
    report = trainer._report

    def report_or_die(batches: Any) -> None:
        if trainer.step > step:
            raise KeyboardInterrupt
        report(batches)

    trainer._report = report_or_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_changed_learning_rate_acts_on_resume(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 1})
    run_ranks(1, run_to_end, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    (tmp_path / "run" / "stage2" / "status.json").unlink()
    record["optim"] |= {"lr": 5e-6, "weight_decay": 0.3}
    settings = run_ranks(1, optim_settings, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    assert {lr for lr, _ in settings[0]} == {5e-6}
    assert {decay for _, decay in settings[0]} == {0.0, 0.3}


def optim_settings(config_path: Path) -> list[tuple[float, float]]:
    trainer = start(config_path)
    return [(g["peak_lr"], g["weight_decay"]) for g in trainer.engine.optimizer.param_groups]
