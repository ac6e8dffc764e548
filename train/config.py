"""The configuration of a stage: a strict schema, YAML files, overrides, and every error at once.

    extends: ../stage1.yaml        # a variant names the file that it changes
    data: {max_pixels: 1605632}

and on the command line `data.max_pixels=802816`. Unknown keys are refused with the nearest known
one. What can be derived (paths, DeepSpeed settings, steps) is derived, not asked for.
"""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from data_tools.examples.images import FACTOR_PX
from data_tools.examples.preprocess import AnyTransform, LineStrip
from train.schema import Section, apply_override, read_yaml, validate

CONFIG_VERSION = 1
REQUIRED_OF_USER = ("run.dir", "model.path", "data.train", "data.validation")


class RunConfig(Section):
    """Where a run lies and what its random draws start from."""

    dir: str = Field(min_length=1, description="the run folder; the stage writes to dir/stageN")
    seed: int = Field(default=0, ge=0, description="seed of order, tasks, augmentation, adapters")


class AdapterConfig(Section):
    """LoRA (Hu et al. 2021) on linear layers; merged into the weights at export."""

    rank: int = Field(default=16, gt=0, description="inner dimension r")
    alpha: int = Field(default=32, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapter's input")
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "qkv", "proj"],
        description="names of the linear layers that get one, in the parts that the stage trains",
    )


class ModelConfig(Section):
    """The model that the stage starts from."""

    path: str = Field(min_length=1, description="a Hugging Face folder of Qwen2.5-VL")
    init: Literal["pretrained", "scratch"] = Field(
        default="pretrained", description="scratch: random weights from the folder's config.json"
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "varlen"] = Field(
        default="auto",
        description="auto: flash-attn, else torch's varlen on a GPU; SDPA by document on a CPU",
    )
    adapter: AdapterConfig | None = Field(default=None, description="null trains full weights")


class SourceConfig(Section):
    """One of several sources of a mix."""

    shards: str = Field(min_length=1, description="path, URL, glob or {000..012} of tars")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="how densely it is interleaved; each source is seen `epochs` times",
    )
    epochs: int | None = Field(
        default=None, gt=0, description="how often it is seen; null: stage.epochs"
    )


class StorageConfig(Section):
    """How shards are read, where they lie in an object store or on a web server."""

    tries: int = Field(default=6, gt=0, description="requests for a range before the run stops")
    deadline_s: float = Field(default=120.0, gt=0, description="and the seconds for all of them")
    request_timeout_s: float = Field(default=30.0, gt=0, description="for one request")
    hedge_after_s: float | None = Field(
        default=None, gt=0, description="ask a second time when an answer takes longer; null: never"
    )
    cache_dir: str | None = Field(
        default=None, description="local folder for copies of remote shards; null: range reads"
    )
    cache_gb: float = Field(default=100.0, gt=0, description="size limit of cache_dir")


class AugmentConfig(Section):
    """Seeded changes of prepared pages; 0 switches a part off."""

    rotate_deg: float = Field(default=0.0, ge=0, le=10, description="largest rotation in degrees")
    shear: float = Field(default=0.0, ge=0, le=0.5, description="largest horizontal shear")
    blur_sigma_px: float = Field(default=0.0, ge=0, le=5, description="largest Gaussian blur")
    noise_sigma: float = Field(default=0.0, ge=0, le=64, description="grey levels")
    contrast: float = Field(default=0.0, ge=0, lt=1, description="largest relative change")
    brightness: float = Field(default=0.0, ge=0, le=128, description="largest shift, grey levels")


class DataConfig(Section):
    """What is read, at which resolution, and how much of it makes a pack and a step."""

    train: list[SourceConfig] = Field(min_length=1, description="shards to train on")
    validation: list[str] = Field(min_length=1, description="shards to evaluate on")
    min_pixels: int = Field(default=3136, ge=784, description="smaller pages are enlarged")
    max_pixels: int = Field(default=1605632, ge=784, description="larger pages are shrunk")
    preprocess: list[AnyTransform] = Field(
        default=[], description="named image transforms, stored in the export as well"
    )
    pixels: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: as the PIL processor; fast: as the torchvision one, half the CPU time",
    )
    augment: AugmentConfig | None = Field(default=None, description="null: none")
    token_budget: int = Field(default=16384, gt=0, description="text + visual tokens of a pack")
    patch_budget: int | None = Field(
        default=None, gt=0, description="vision patches of a pack; null: 4 per token, never binding"
    )
    packs_per_step: int = Field(default=8, gt=0, description="global batch in packs, all ranks")
    too_long: list[Literal["shrink", "split"]] = Field(
        default=["shrink"],
        description="for samples longer than a pack: smaller pages (to 0.6), split answers",
    )
    min_chars: int = Field(default=0, ge=0, description="leave out samples with less text")
    max_chars: int | None = Field(default=None, gt=0, description="and with more")
    max_hole_share: float = Field(
        default=0.001, ge=0, le=1, description="stop above this share of damaged samples"
    )
    num_workers: int = Field(default=4, ge=0, description="loader processes a rank; 0: none")
    queue_gb: float = Field(default=2.0, gt=0, description="batches that a rank keeps ready")
    worker_timeout_s: float = Field(
        default=300.0, gt=0, description="a loader process that takes longer for a pack is replaced"
    )
    index_workers: int = Field(default=4, ge=0, description="processes that measure lengths")
    index_dir: str | None = Field(
        default=None, description="folder for indexes and lengths; null: beside the shards"
    )
    storage: StorageConfig = Field(default_factory=StorageConfig)

    @property
    def patches(self) -> int:
        """The patch budget, derived if it is null."""
        return self.patch_budget or 4 * self.token_budget


class TemplateConfig(Section):
    """A question and how often it is asked."""

    name: str = Field(min_length=1, description="of data_tools/templates, or a YAML file")
    weight: float = Field(default=1.0, gt=0, description="its share")


class TaskConfig(Section):
    """Which questions are asked of a sample."""

    unit: Literal["page", "line"] = Field(
        default="page", description="what a sample shows; a line reader needs boxes to read pages"
    )
    templates: list[TemplateConfig] = Field(
        default=[TemplateConfig(name="text-en")], min_length=1, description="the recipe"
    )


class EarlyStoppingConfig(Section):
    """Stop when the metric has not improved for a while."""

    patience: int = Field(default=3, gt=0, description="evaluations without improvement")
    min_delta: float = Field(default=0.0, ge=0, description="smaller gains do not count")


class CollapseConfig(Section):
    """Stop a stage that destroys what the model could do (exit code 2)."""

    at_steps: list[int] = Field(
        default=[50, 100, 200, 400], description="when the loss is looked at"
    )
    max_ratio: float = Field(
        default=1.5, gt=1, description="of held-out loss to that of step 0, twice in a row"
    )


class StageConfig(Section):
    """What trains, for how long, and when to stop."""

    number: Literal[1, 2] = Field(description="1: vision encoder, language model frozen; 2: all")
    train_merger: bool = Field(
        default=True,
        description="stage 1: the merger belongs to the vision encoder's side (adapters leave it)",
    )
    epochs: int = Field(default=12, gt=0, description="how often each sample is seen")
    max_steps: int | None = Field(default=None, gt=0, description="stop earlier; null: by epochs")
    early_stopping: EarlyStoppingConfig | None = Field(default=None, description="null: never")
    collapse: CollapseConfig | None = Field(default=None, description="null: no guard")


class OptimConfig(Section):
    """AdamW (Loshchilov and Hutter 2019) with warm-up."""

    lr: float = Field(gt=0, description="peak learning rate")
    lr_merger: float | None = Field(default=None, gt=0, description="null: as lr")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of the first moment")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="of the second moment")
    weight_decay: float = Field(default=0.01, ge=0, description="on matrices only")
    warmup_steps: int = Field(default=0, ge=0, description="linear from 0")
    hold: float = Field(default=0.0, ge=0, le=1, description="share of steps before the decay")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="decay")
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="final lr / peak lr")
    clip_norm: float = Field(default=1.0, gt=0, description="global gradient norm")


class CharPriorConfig(Section):
    """Character weights from the training index; mean 1 over it."""

    rarity: float = Field(default=0.25, ge=0, le=1, description="exponent; 0: off")
    critical: float = Field(default=0.5, ge=0, description="gain of digits and separators; 0: off")
    fields: dict[str, float] = Field(default={}, description="factor by annotation category")


class LossConfig(Section):
    """How much each character counts."""

    char_prior: CharPriorConfig | None = Field(default=None, description="null: all alike")


class ParallelConfig(Section):
    """Precision and memory."""

    zero_stage: Literal[1, 2, 3] = Field(
        default=3,
        description="what is partitioned: 1 the optimizer, 2 gradients too, 3 weights too",
    )
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="with fp32 master")
    recompute: bool = Field(
        default=True, description="non-reentrant activation checkpointing of every block"
    )
    timeout_s: int = Field(default=1800, gt=0, description="a collective that takes longer fails")
    zero: dict[str, int | bool] = Field(
        default={}, description="further settings of DeepSpeed's zero_optimization"
    )


class CheckpointConfig(Section):
    """How often the state is saved, and how many are kept."""

    every_steps: int = Field(default=500, gt=0, description="and at the end")
    keep_last: int = Field(default=2, gt=0, description="older ones are deleted")
    keep_every: int | None = Field(
        default=None, gt=0, description="but not those of a multiple of so many steps; null: none"
    )
    in_background: bool = Field(
        default=True, description="training waits for a copy in memory, not for the disk"
    )
    local_dir: str | None = Field(
        default=None, description="folder of each node's own disk to write to first"
    )
    mirror: str | None = Field(
        default=None, description="URL of a second copy, as s3://bucket/run; the stage is appended"
    )
    on_error: Literal["warn", "stop"] = Field(
        default="warn", description="what a failed save does; the last one of a run always stops"
    )
    timeout_s: float = Field(
        default=1800.0, gt=0, description="how long rank 0 waits for the files of the others"
    )


class EvaluationConfig(Section):
    """The validation sample that is read during training."""

    every_steps: int = Field(default=500, gt=0, description="and at the end")
    num_samples: int = Field(default=64, gt=0, description="of the validation shards, seeded")
    max_new_tokens: int = Field(default=1024, gt=0, description="of one answer")
    batch_size: int = Field(default=16, gt=0, description="answers decoded at once")
    metric: Literal["cer", "loss"] = Field(default="cer", description="of early stopping")
    casefold: bool = Field(default=False, description="compare without case (SROIE's labels)")


class WatchdogConfig(Section):
    """When a run counts as hanging; launch.watchdog then ends it, and a job is queued again."""

    heartbeat_s: float = Field(default=5.0, gt=0, description="between two signs of life of a rank")
    factor: float = Field(default=10.0, gt=1, description="a step may take so many median steps")
    min_s: float = Field(default=900.0, gt=0, description="but never counts as hanging before")


class MonitorConfig(Section):
    """What TensorBoard, the log and the watchdog show."""

    log_every: int = Field(default=10, gt=0, description="steps between log lines")
    num_images: int = Field(default=4, ge=0, description="pages with predicted and true text")
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)


class Config(Section):
    """One stage of training."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    task: TaskConfig = Field(default_factory=TaskConfig)
    stage: StageConfig
    optim: OptimConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @property
    def folder(self) -> Path:
        """The folder of this stage, RUN/stageN."""
        return Path(self.run.dir) / f"stage{self.stage.number}"

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        """Check what no single key shows."""
        if self.data.min_pixels > self.data.max_pixels:
            raise ValueError("data.min_pixels is larger than data.max_pixels")
        for transform in self.data.preprocess:
            if isinstance(transform, LineStrip):
                smallest, largest = 28 * transform.height, FACTOR_PX * transform.max_tokens
                if self.data.min_pixels > smallest or self.data.max_pixels < 28 * largest:
                    raise ValueError(
                        "line_strip: its strips would be resized again; set data.min_pixels to at "
                        f"most {smallest} and data.max_pixels to at least {28 * largest}"
                    )
        if self.run.dir.startswith("~") or "://" in self.run.dir:
            raise ValueError("run.dir must be a path that all ranks share, not a URL")
        keeps_size = all(transform.keeps_size for transform in self.data.preprocess)
        if self.task.unit == "page" and not keeps_size:
            raise ValueError("data.preprocess cuts lines out (line_strip); set task.unit to line")
        if self.model.init == "scratch" and (self.stage.number == 1 or self.model.adapter):
            raise ValueError("model.init=scratch trains every weight: use stage 2 and no adapter")
        if self.stage.number == 2 and not self.stage.train_merger:
            raise ValueError("stage.train_merger: stage 2 trains every part")
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a stage's YAML, apply `key.path=value` overrides and validate.

    Raises:
        ConfigError: one message that lists every error with its key path and a suggestion.
    """
    record = read_yaml(path)
    for override in overrides or []:
        apply_override(record, override)
    for section, key in (("run", "dir"), ("model", "path")):
        if isinstance(record.get(section), dict) and isinstance(record[section].get(key), str):
            record[section][key] = os.path.expanduser(record[section][key])
    return validate(Config, record, path, REQUIRED_OF_USER)


def write_config(config: Config, path: Path) -> None:
    """Write the resolved configuration."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def reader_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return what an exported folder must know to read as the stage trained (`lectern.json`).

    Args:
        record: a resolved configuration, as `config.yaml` holds it.
    """
    data, task = record["data"], record["task"]
    return {
        "version": CONFIG_VERSION,
        "unit": task["unit"],
        "template": task["templates"][0]["name"],
        "preprocess": data["preprocess"],
        "min_pixels": data["min_pixels"],
        "max_pixels": data["max_pixels"],
        "pixels": data.get("pixels", "exact"),
    }


def path_problems(config: Config) -> list[str]:
    """Return, with its key, every local path that is named and cannot be used."""
    path = config.model.path
    if "://" in path:
        return [f"model.path: {path} is a URL; download the folder and name the copy"]
    if not os.path.isdir(path):
        return [f"model.path: there is no folder {path}"]
    if not os.path.isfile(os.path.join(path, "config.json")):
        return [f"model.path: {path} holds no config.json; expected a Hugging Face folder"]
    return []
