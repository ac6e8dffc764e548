"""pipeline.yaml: a strict schema, overrides, and every error at once.

    run: runs/invoices
    shard: {source: data/invoices, out: data/shards, size_mb: 100, tasks: 8}
    stage1: {config: configs/stage1.yaml, set: {model.path: /models/7b}, sbatch: {nodes: 2}}
    stage2: {config: configs/stage2.yaml, sbatch: {nodes: 2, time: "24:00:00"}}
    evaluate: {data: "data/shards/val-*.tar"}

Sections may be missing; `extends: other.yaml` works as in a stage's YAML. On the command line:
`--set stage1.sbatch.nodes=4 --set stage1.set.optim.lr=1e-5`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_tools.errors import ConfigError
from train.schema import Section, apply_override, read_yaml, validate

# What the pipeline itself says to sbatch, or relies on.
RESERVED = (
    *("array", "chdir", "comment", "dependency", "error", "job_name", "kill_on_invalid_dep"),
    *("no_requeue", "open_mode", "output", "parsable", "wait", "wrap"),
)
SEXAGESIMAL = ("time", "time_min")

Sbatch = dict[str, str | int | bool]


class ShardSection(Section):
    """Documents to shards, by an array job (`data_tools.build`)."""

    source: str = Field(min_length=1, description="annotations: a file, folder or URL")
    out: str = Field(min_length=1, description="folder or URL for the shards")
    size_mb: float = Field(default=100.0, gt=0, description="size that shards aim at")
    unit: Literal["page", "line"] = Field(default="page", description="a sample is a page or line")
    format: str | None = Field(default=None, description="of the annotations; null: found out")
    max_rejected: float = Field(
        default=0.05, ge=0, le=1, description="stop if more of the documents are unusable"
    )
    tasks: int = Field(default=1, gt=0, description="parts that are built at the same time")
    sbatch: Sbatch = Field(default={}, description="options of sbatch")


class StageSection(Section):
    """A stage of training (`train/main.py`)."""

    config: str = Field(min_length=1, description="the stage's YAML")
    set: dict[str, Any] = Field(default={}, description="overrides, dotted or nested")
    sbatch: Sbatch = Field(default={}, description="options of sbatch: nodes, time, ...")


class ConvertSection(Section):
    """Checkpoint to Hugging Face folder after each stage (`train.export`)."""

    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="of the weights")
    average: int = Field(default=1, gt=0, description="the mean of so many newest checkpoints")
    best: bool = Field(default=False, description="the best step under early stopping")
    workers: int = Field(default=1, gt=0, description="processes that write weight files")
    sbatch: Sbatch = Field(default={}, description="options of sbatch")


class EvaluateSection(Section):
    """How well the last stage reads (`inference.evaluate`)."""

    data: str | list[str] = Field(min_length=1, description="shards: paths, URLs or globs")
    template: str | None = Field(default=None, description="null: that of training")
    num: int | None = Field(default=None, gt=0, description="samples to draw; null: all")
    seed: int = Field(default=0, ge=0, description="of the draw")
    max_new_tokens: int | None = Field(default=None, gt=0, description="limit of each answer")
    batch_size: int | None = Field(default=None, gt=0, description="prompts decoded together")
    casefold: bool = Field(default=False, description="ignore case")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where it runs")
    sbatch: Sbatch = Field(default={}, description="options of sbatch")


class Pipeline(Section):
    """The content of pipeline.yaml."""

    run: str = Field(min_length=1, description="the run folder that all nodes share")
    shard: ShardSection | None = Field(default=None, description="missing: the shards exist")
    stage1: StageSection | None = Field(default=None, description="missing: not trained")
    stage2: StageSection | None = Field(default=None, description="missing: not trained")
    convert: ConvertSection = Field(default_factory=ConvertSection)
    evaluate: EvaluateSection | None = Field(default=None, description="missing: no report")


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and validate pipeline.yaml alone.

    Raises:
        ConfigError: one message that lists every error with its key and the nearest known one.
    """
    record = read_yaml(path)
    for override in overrides:
        apply_override(record, override, _split)
    pipeline = validate(Pipeline, record, path)
    if "://" in pipeline.run or pipeline.run.startswith("~"):
        raise ConfigError(f"{path}: run must be a path that all nodes share, got {pipeline.run!r}")
    if not any((pipeline.shard, pipeline.stage1, pipeline.stage2)):
        raise ConfigError(f"{path}: nothing to do; expected shard, stage1 or stage2")
    if pipeline.evaluate and not (pipeline.stage1 or pipeline.stage2):
        raise ConfigError(f"{path}: evaluate needs a model; expected stage1 or stage2")
    return pipeline


def sbatch_options(section: str, options: Mapping[str, str | int | bool]) -> tuple[str, ...]:
    """Return `{nodes: 2, exclusive: true}` as `--nodes=2 --exclusive`; false leaves one out.

    Raises:
        ConfigError: if an option is the pipeline's own, or a time that YAML took for a number.
    """
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if key.replace("-", "_") in RESERVED:
            raise ConfigError(f"{section}.sbatch.{key}: the pipeline gives --{name} itself")
        if key.replace("-", "_") in SEXAGESIMAL and not isinstance(value, str):
            raise ConfigError(
                f"{section}.sbatch.{key}: got the number {value}; put it in quotes, as "
                '"24:00:00", which YAML else reads as seconds'
            )
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words.append(f"--{name}={value}")
    return tuple(words)


def _split(key: str) -> list[str]:
    """Return the keys of a path; below `set` the rest is one key, of the stage's YAML."""
    parts = key.split(".")
    return [*parts[:2], ".".join(parts[2:])] if parts[1:2] == ["set"] and parts[2:] else parts
