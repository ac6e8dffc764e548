"""Which stage starts from what."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import ConfigError, LaunchError
from launch import chain, quickstart
from launch.chain import run_chain, run_stage
from tests.builders import run_record, write_run
from train.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY_BASE = [str(path) for path in sorted((ROOT / "configs/tiny-base").glob("phase*.yaml"))]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands are noted instead of run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(chain, "run", lambda command, **_: commands.append(list(command)))
    return commands


def model_paths(commands: list[list[str]]) -> list[str]:
    """Return the model that each training command starts from, its overrides applied."""
    paths = []
    for command in commands:
        if "--config" in command:
            place = command.index("--config")
            paths.append(load_config(command[place + 1], command[place + 2 :]).model.path)
    return paths


def write_stages(folder: Path, **second: Any) -> list[str]:
    shards = [str(folder / "shards" / "train-000000.tar")]
    first = run_record(folder / "run", folder / "base", shards, stage={"number": 1})
    other = run_record(folder / "run", folder / "elsewhere", shards, **second)
    return [str(write_run(folder / f"{n}.yaml", r)) for n, r in enumerate((first, other), start=1)]


def test_a_stage_starts_from_the_export_before_it(tmp_path: Path, started: list[list[str]]) -> None:
    overrides = [f"run.dir={tmp_path}/other"]
    exported = run_chain(write_stages(tmp_path), 2, overrides)
    assert exported == [f"{tmp_path}/other/stage{n}/hf" for n in (1, 2)]
    assert model_paths(started) == [f"{tmp_path}/base", f"{tmp_path}/other/stage1/hf"]
    assert [command[2:] for command in started if "train.export" in command] == [
        ["train.export", f"{tmp_path}/other/stage{n}"] for n in (1, 2)
    ]


def test_a_model_that_the_user_names_wins(tmp_path: Path, started: list[list[str]]) -> None:
    run_chain(write_stages(tmp_path), None, ["model.path=/models/mine"])
    assert model_paths(started) == ["/models/mine"] * 2


def test_a_second_stage_need_not_name_a_model(tmp_path: Path, started: list[list[str]]) -> None:
    """As configs/stage2.yaml, which leaves it open."""
    first, second = write_stages(tmp_path)
    lines = Path(second).read_text().replace(f"path: {tmp_path}/elsewhere", "init: pretrained")
    Path(second).write_text(lines)
    with pytest.raises(ConfigError, match="model.path"):
        load_config(second)
    run_chain([first, second], 2, [])
    assert model_paths(started)[1] == f"{tmp_path}/run/stage1/hf"


def test_the_phases_of_the_tiny_base_follow_each_other(started: list[list[str]]) -> None:
    run_chain(TINY_BASE, 2, [])
    exports = [f"runs/tiny-base/phase{n}/stage2/hf" for n in (1, 2, 3, 4)]
    assert model_paths(started) == ["models/tiny-base", *exports]


def test_stages_that_share_a_folder_are_refused_before_anything_starts(
    started: list[list[str]],
) -> None:
    with pytest.raises(ConfigError, match=r"phase1.yaml and .*phase2.yaml both write to x/stage2"):
        run_chain(TINY_BASE, 2, ["run.dir=x"])
    assert started == []


def test_a_wrong_later_stage_is_found_before_anything_starts(
    tmp_path: Path, started: list[list[str]]
) -> None:
    stages = write_stages(tmp_path, optim={"lr": -1.0})
    with pytest.raises(ConfigError, match="optim.lr"):
        run_chain(stages, 2, [])
    assert started == []


def test_a_failed_stage_names_what_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "train_command", lambda *_: ["false"])
    with pytest.raises(LaunchError, match=rf"{tmp_path}/run/stage1/log.jsonl"):
        run_stage(write_stages(tmp_path)[0], 2, [])


def test_the_quickstarts_second_stage_names_the_first_ones_export() -> None:
    first, second = (load_config(ROOT / config) for config in quickstart.CONFIGS)
    assert second.model.path == str(first.folder / "hf")
