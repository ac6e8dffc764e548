"""pipeline.yaml and the chain of jobs that it stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.errors import ConfigError, LaunchError
from launch.job_command import part_of_array, resolve
from launch.pipeline.config import load_pipeline
from launch.pipeline.plan import Plan, check_paths, load_plan
from launch.process import ROOT
from tests.builders import run_record, write_run
from train.config import load_config


def write_stage(folder: Path, number: int, **changes: Any) -> str:
    record = run_record(folder / "unused", folder / "base", [str(folder / "x/train-0.tar")])
    record["stage"] = {"number": number, "max_steps": 4}
    for key in ("train", "validation"):
        del record["data"][key]
    for section, change in changes.items():
        record[section] |= change
    return str(write_run(folder / f"stage{number}-{len(changes)}.yaml", record))


def record_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a pipeline.yaml whose stages leave the data to the chain."""
    base = {
        "run": str(folder / "run"),
        "shard": {"source": str(folder / "docs"), "out": str(folder / "shards"), "tasks": 3},
        "stage1": {"config": write_stage(folder, 1), "sbatch": {"nodes": 2, "exclusive": True}},
        "stage2": {"config": write_stage(folder, 2)},
        "evaluate": {"data": f"{folder}/shards/val-*.tar", "num": 3},
    }
    return base | changes


def plan_of(folder: Path, *overrides: str, **changes: Any) -> Plan:
    return load_plan(write_run(folder / "pipeline.yaml", record_of(folder, **changes)), overrides)


def config_of(plan: Plan, name: str) -> Any:
    path, *overrides = plan[name].arguments
    return load_config(path, overrides)


def test_each_job_waits_for_the_one_before(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [(job.name, job.depends_on) for job in plan.jobs] == [
        ("shard", ()),
        ("stage1", ("shard",)),
        ("convert1", ("stage1",)),
        ("stage2", ("convert1",)),
        ("convert2", ("stage2",)),
        ("evaluate", ("convert2",)),
    ]
    assert [job.name for job in plan.dependants("convert1")] == ["stage2", "convert2", "evaluate"]
    assert plan["shard"].options == ("--array=0-2",)
    assert plan["stage1"].options == ("--exclusive", "--nodes=2")


def test_stages_get_run_folder_model_and_data_from_the_chain(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    first, second = config_of(plan, "stage1"), config_of(plan, "stage2")
    assert first.folder == tmp_path / "run" / "stage1"
    assert first.model.path == str(tmp_path / "base")
    assert second.model.path == str(tmp_path / "run" / "stage1" / "hf")
    for config in (first, second):
        assert config.data.train[0].shards == f"{tmp_path}/shards/train-*.tar"
        assert config.data.validation == [f"{tmp_path}/shards/val-*.tar"]


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    own = {
        "data.validation": ["mine.tar"],
        "optim": {"lr": 5e-5, "warmup_steps": 3},
        "loss": {"char_prior": {"fields": {"total": 2.0}}},
        "model.path": "/models/it's 7 B, new",
    }
    stage2 = {"config": write_stage(tmp_path, 2), "set": own}
    config = config_of(plan_of(tmp_path, stage2=stage2), "stage2")
    assert config.data.validation == ["mine.tar"]
    assert config.data.train[0].shards == f"{tmp_path}/shards/train-*.tar"
    assert (config.optim.lr, config.optim.warmup_steps) == (5e-5, 3)
    assert config.loss.char_prior.fields == {"total": 2.0}
    assert config.model.path == "/models/it's 7 B, new"


def test_data_of_the_stages_own_yaml_are_kept(tmp_path: Path) -> None:
    data = {"train": [{"shards": "own-*.tar"}], "validation": ["own.tar"]}
    config = config_of(
        plan_of(tmp_path, stage1={"config": write_stage(tmp_path, 1, data=data)}), "stage1"
    )
    assert (config.data.train[0].shards, config.data.validation) == ("own-*.tar", ["own.tar"])


def test_overrides_on_the_command_line(tmp_path: Path) -> None:
    words = ("stage1.set.optim.lr=3e-4", "stage1.sbatch.nodes=4", "shard.tasks=9", "convert.best=1")
    with pytest.raises(ConfigError, match="convert.best"):
        plan_of(tmp_path, *words)
    plan = plan_of(tmp_path, *words[:3], f"run={tmp_path}/other")
    config = config_of(plan, "stage1")
    assert config.optim.lr == 3e-4
    assert config.run.dir == f"{tmp_path}/other"
    assert "--nodes=4" in plan["stage1"].options
    assert plan["shard"].options == ("--array=0-8",)


def test_sections_may_be_missing(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    data = {"train": [{"shards": "a.tar"}], "validation": ["b.tar"]}
    kept = {"run": record["run"], "stage2": {"config": write_stage(tmp_path, 2, data=data)}}
    plan = load_plan(write_run(tmp_path / "p.yaml", kept))
    assert [job.name for job in plan.jobs] == ["stage2", "convert2"]
    assert plan.jobs[0].depends_on == ()
    assert config_of(plan, "stage2").model.path == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shrad": {}}, r"shrad is not a known key. Did you mean shard\?"),
        ({"evaluate": {"date": "x"}}, r"evaluate.date is not a known key. Did you mean evaluate.d"),
        ({"shard": {"source": "x"}}, "shard.out must be set"),
        ({"evaluate": {"data": "x", "num": 0}}, "evaluate.num: input should be greater than 0"),
        ({"run": "s3://bucket/run"}, "run must be a path that all nodes share"),
        ({"stage1": None, "stage2": None}, "evaluate needs a model"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set": {"optim.lr_vison": 1.0}}, r"stage1: (?s:.*)optim.lr_vison is not a known key"),
        ({"set": {"stage.number": 2}}, "stage1: .* has stage.number 2; expected 1"),
        ({"set": {"run.dir": "x"}}, "stage1.set.run.dir: the pipeline's `run` decides"),
        ({"sbatch": {"dependency": "afterok:7"}}, "the pipeline gives --dependency itself"),
        ({"sbatch": {"time": 86400}}, 'put it in quotes, as "24:00:00"'),
    ],
)
def test_wrong_stages_are_found_before_anything_starts(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, stage1={"config": write_stage(tmp_path, 1)} | change)


def test_paths_of_the_first_jobs_are_checked(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(ConfigError, match=r"shard.source: .*/docs: no such file"):
        check_paths(plan)
    (tmp_path / "docs").mkdir()
    with pytest.raises(ConfigError, match=r"model.path: there is no folder .*/base"):
        check_paths(plan)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_done_is_what_the_files_say(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    stage = tmp_path / "run" / "stage1"

    def done() -> list[str]:
        return [job.name for job in plan.jobs if job.is_done()]

    assert done() == []
    write_json(tmp_path / "shards/summary.json", {"documents": 10, "rejected_documents": 1})
    assert done() == [], "a tenth of the documents is more than may be rejected"
    write_json(tmp_path / "shards/summary.json", {"documents": 100, "rejected_documents": 5})
    assert done() == ["shard"]
    write_json(stage / "status.json", {"state": "running", "step": 5})
    write_json(stage / "hf" / "export.json", {"steps": [5]})
    write_json(stage / "status.json", {"state": "done", "step": 9})
    assert done() == ["shard", "stage1"], "the export is of an earlier step"
    write_json(stage / "hf" / "export.json", {"steps": [3, 9]})
    assert done() == ["shard", "stage1", "convert1"]
    write_json(tmp_path / "run/stage2/report/report.json", {"num_samples": 3})
    assert done() == ["shard", "stage1", "convert1", "evaluate"]


def test_shipped_pipelines_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key stands in configs/pipeline.yaml, with its default where that is not the user's."""
    monkeypatch.chdir(ROOT)
    shown = yaml.safe_load((ROOT / "configs/pipeline.yaml").read_text())
    pipeline = load_pipeline("configs/pipeline.yaml")
    for name in type(pipeline).model_fields:
        section = getattr(pipeline, name)
        if name != "run":
            assert set(shown[name]) >= set(type(section).model_fields) - {"set"}, name
    assert len(load_plan("configs/pipeline.yaml").jobs) == 6
    quick = load_plan("configs/quickstart/pipeline.yaml")
    assert quick["evaluate"].arguments[0] == "runs/quickstart/stage2/hf"


def test_scripts_take_a_configuration_or_arguments(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    pipeline = str(tmp_path / "pipeline.yaml")
    stage = write_stage(
        tmp_path, 2, data={"train": [{"shards": "t.tar"}], "validation": ["a", "b"]}
    )
    folder, override = f"{tmp_path}/run/stage2", f"run.dir={tmp_path}/run"
    assert resolve("shard", [pipeline], {})[1:] == list(plan["shard"].arguments)
    assert resolve("shard", ["SRC", "OUT", "--unit", "line"], {})[1:] == [
        *("SRC", "OUT", "--unit", "line")
    ]
    assert resolve("convert", [stage, override, "--best"], {}) == ["train.export", folder, "--best"]
    assert resolve("evaluate", [stage, override, "--num", "5"], {}) == [
        *("inference.evaluate", f"{folder}/hf", "a", "b", "--num", "5"),
        *("--out", f"{folder}/report"),
    ]
    words = [stage, override, "s3://b/year=2024/*.png", "--out", "read"]
    assert resolve("predict", words, {})[1:] == [f"{folder}/hf", *words[2:]]
    with pytest.raises(ConfigError, match="predict: expected a configuration, or arguments"):
        resolve("predict", [], {})


def array(number: int, first: int, count: int, step: int = 1) -> dict[str, str]:
    values = {"ID": number, "MIN": first, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}


def test_tasks_of_an_array_share_the_work() -> None:
    assert part_of_array({}) == []
    assert part_of_array(array(3, 0, 8)) == ["--part", "3/8"]
    assert part_of_array(array(8, 1, 8)) == ["--part", "7/8"]
    assert part_of_array(array(6, 0, 4, step=2)) == ["--part", "3/4"]
    with pytest.raises(LaunchError, match="an array with gaps"):
        part_of_array(array(20, 17, 2))
    assert resolve("predict", ["HF", "x", "--part", "5/8"], array(1, 0, 2))[-2:] == [
        *("--part", "5/8")
    ]
