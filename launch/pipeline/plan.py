"""The plan of a run: the chain of jobs, what each waits for and what it leaves.

A stage writes to the pipeline's `run`; stage 2 starts from the export of stage 1; both read what
`shard` builds; whatever their YAML or `set` says of data and model wins. The plan is a function of
the YAML alone; `Job.is_done` looks at the files that a job leaves.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from data_tools.errors import ConfigError
from launch.pipeline.config import (
    ConvertSection,
    EvaluateSection,
    Pipeline,
    ShardSection,
    StageSection,
    load_pipeline,
    sbatch_options,
)
from train.config import load_config, path_problems
from train.schema import read_yaml
from train.status import read_status

_PLAIN = re.compile(r"(?:[A-Za-z_]|\.{0,2}/)[\w./-]*")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # of YAML 1.1


@dataclass(frozen=True)
class Job:
    """One job of the chain.

    Attributes:
        name: shard, stage1, convert1, stage2, convert2 or evaluate.
        script: that sbatch gets.
        arguments: of the script.
        options: of sbatch, as `--nodes=2`.
        depends_on: names of the jobs that must have completed.
        module: of Python that does the same here with the same arguments; "" for a stage.
        stage_dir: RUN/stageN that the job trains, exports or evaluates; None for shards.
        result: path or URL that is there when the job is done.
        max_rejected: share of unusable documents that shards may have.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    module: str = ""
    stage_dir: Path | None = None
    result: str = ""
    max_rejected: float = field(default=1.0, compare=False)

    @property
    def is_stage(self) -> bool:
        """Whether the job trains."""
        return not self.module

    @property
    def is_array(self) -> bool:
        """Whether the job is an array of tasks."""
        return any(option.startswith("--array=") for option in self.options)

    def is_done(self) -> bool:
        """Tell from files whether the job has nothing left to do."""
        if self.name == "shard":
            return _are_shards_done(self.result, self.max_rejected)
        assert self.stage_dir is not None
        if self.is_stage:
            return read_status(self.stage_dir).get("state") == "done"
        content = _read_json(Path(self.result))
        if self.name == "evaluate":
            return bool(content)
        # An export that was made while the stage still trained is not the end of it.
        last_step = read_status(self.stage_dir).get("step", math.inf)
        return bool(content) and (max(content.get("steps", [0])) >= last_step or self._is_chosen)

    @property
    def _is_chosen(self) -> bool:
        """Whether the export is not simply of the last step."""
        return "--best" in self.arguments


@dataclass(frozen=True)
class Plan:
    """The chain of a run, in the order of submission."""

    run: Path
    jobs: tuple[Job, ...]

    def __getitem__(self, name: str) -> Job:
        """Return a job by its name."""
        return next(job for job in self.jobs if job.name == name)

    def dependants(self, name: str) -> list[Job]:
        """Return the jobs that wait for a job, directly or not, in order."""
        waiting = {name}
        found = []
        for job in self.jobs:
            if waiting & set(job.depends_on):
                waiting.add(job.name)
                found.append(job)
        return found


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read pipeline.yaml and the stages' YAML; return the chain of jobs.

    Args:
        path: of pipeline.yaml; the paths in it are relative to the clone.
        overrides: `key.path=value`, as `stage1.sbatch.nodes=4` or `stage1.set.optim.lr=1e-5`.

    Raises:
        ConfigError: with everything that is wrong in pipeline.yaml or in a stage's YAML.
    """
    return make_plan(load_pipeline(path, overrides))


def check_paths(plan: Plan) -> None:
    """Check what must be there before the first job starts.

    Raises:
        ConfigError: if the source of the shards or the model of the first stage is missing.
    """
    first = next((job for job in plan.jobs if not job.is_done()), None)
    if first is not None and first.name == "shard":
        source = first.arguments[0]
        if "://" not in source and not os.path.exists(source):
            raise ConfigError(f"shard.source: {source}: no such file or folder")
    stage = next((job for job in plan.jobs if job.is_stage), None)  # later models are made
    if stage is not None and not stage.is_done():
        config, *overrides = stage.arguments
        problems = path_problems(load_config(config, overrides))
        if problems:
            raise ConfigError(f"{stage.name}: {config}:\n  " + "\n  ".join(problems))


def make_plan(pipeline: Pipeline) -> Plan:
    """Return the chain of jobs of a validated pipeline.

    Raises:
        ConfigError: if a stage's configuration is wrong, or an sbatch option is ours to give.
    """
    run = Path(pipeline.run)
    jobs: list[Job] = []
    if pipeline.shard is not None:
        jobs.append(_shard_job(pipeline.shard))
    for number, section in ((1, pipeline.stage1), (2, pipeline.stage2)):
        if section is not None:
            before = (jobs[-1].name,) if jobs else ()
            jobs.append(_stage_job(number, section, pipeline, before))
            jobs.append(_convert_job(number, pipeline.convert, run))
    if pipeline.evaluate is not None:
        jobs.append(_evaluate_job(pipeline.evaluate, run, jobs[-1]))
    return Plan(run, tuple(jobs))


def shard_arguments(section: ShardSection) -> tuple[str, ...]:
    """Return the arguments of `data_tools.build`."""
    words = [section.source, section.out, "--shard-mb", f"{section.size_mb:g}"]
    words += ["--unit", section.unit, "--max-rejected", f"{section.max_rejected:g}"]
    return (*words, *(("--format", section.format) if section.format else ()))


def _shard_job(section: ShardSection) -> Job:
    return Job(
        name="shard",
        script="slurm/shard.sh",
        arguments=shard_arguments(section),
        options=(f"--array=0-{section.tasks - 1}", *sbatch_options("shard", section.sbatch)),
        module="data_tools.build",
        result=f"{section.out.rstrip('/')}/summary.json",
        max_rejected=section.max_rejected,
    )


def _stage_job(
    number: int, section: StageSection, pipeline: Pipeline, depends_on: tuple[str, ...]
) -> Job:
    """Return the job that trains a stage, its configuration checked."""
    name = f"stage{number}"
    overrides = stage_overrides(number, section, pipeline)
    try:
        config = load_config(section.config, overrides)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if config.stage.number != number:
        raise ConfigError(
            f"{name}: {section.config} has stage.number {config.stage.number}; expected {number}"
        )
    return Job(
        name=name,
        script=f"slurm/{name}.sh",
        arguments=(section.config, *overrides),
        options=sbatch_options(name, section.sbatch),
        depends_on=depends_on,
        stage_dir=config.folder,
        result=str(config.folder / "status.json"),
    )


def stage_overrides(number: int, section: StageSection, pipeline: Pipeline) -> list[str]:
    """Return a stage's overrides: what the chain decides, then what the user set.

    Raises:
        ConfigError: if the user set `run.dir`, which is the pipeline's.
    """
    own = flatten(section.set)
    if "run.dir" in own:
        raise ConfigError(f"stage{number}.set.run.dir: the pipeline's `run` decides; set that")
    data = read_yaml(section.config).get("data") or {}
    chained: dict[str, Any] = {"run.dir": pipeline.run}
    if number == 2 and pipeline.stage1 is not None:
        chained["model.path"] = str(Path(pipeline.run) / "stage1" / "hf")
    if pipeline.shard is not None:
        out = pipeline.shard.out.rstrip("/")
        if "train" not in data:
            chained["data.train"] = [{"shards": f"{out}/train-*.tar"}]
        if "validation" not in data:
            chained["data.validation"] = [f"{out}/val-*.tar"]
    settings = {key: value for key, value in chained.items() if key not in own} | own
    return [f"{key}={_yaml(value)}" for key, value in settings.items()]


def _convert_job(number: int, section: ConvertSection, run: Path) -> Job:
    folder = run / f"stage{number}"
    words = [str(folder), "--dtype", section.dtype]
    words += ["--best"] if section.best else []
    words += ["--average", str(section.average)] if section.average > 1 else []
    words += ["--workers", str(section.workers)] if section.workers > 1 else []
    return Job(
        name=f"convert{number}",
        script="slurm/convert.sh",
        arguments=tuple(words),
        options=sbatch_options("convert", section.sbatch),
        depends_on=(f"stage{number}",),
        module="train.export",
        stage_dir=folder,
        result=str(folder / "hf" / "export.json"),
    )


def _evaluate_job(section: EvaluateSection, run: Path, convert: Job) -> Job:
    folder = run / f"stage{convert.name[-1]}"
    patterns = [section.data] if isinstance(section.data, str) else section.data
    words = [str(folder / "hf"), *patterns, "--out", str(folder / "report")]
    words += ["--seed", str(section.seed), "--device", section.device]
    for option in ("template", "num", "max_new_tokens", "batch_size"):
        value = getattr(section, option)
        words += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    words += ["--casefold"] if section.casefold else []
    return Job(
        name="evaluate",
        script="slurm/evaluate.sh",
        arguments=tuple(words),
        options=sbatch_options("evaluate", section.sbatch),
        depends_on=(convert.name,),
        module="inference.evaluate",
        stage_dir=folder,
        result=str(folder / "report" / "report.json"),
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of a mapping whose keys are dotted or nested."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _yaml(value: Any) -> str:
    """Return a value as the text that a `key.path=value` override reads back."""
    is_plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return str(value) if is_plain else json.dumps(value, ensure_ascii=False)


def _are_shards_done(summary: str, max_rejected: float) -> bool:
    """Tell whether shards are complete and enough of the documents were usable."""
    content = _read_json(summary)
    if not content:
        return False
    num_documents = max(1, content.get("documents", 1))
    return content.get("rejected_documents", 0) / num_documents <= max_rejected


def _read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object of a path or URL; {} if there is none."""
    try:
        with fsspec.open(str(path), "rt", encoding="utf-8") as stream:
            content = json.load(stream)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return content if isinstance(content, dict) else {}
