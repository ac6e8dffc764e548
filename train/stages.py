"""What trains in which stage, at which learning rate, and when a stage ends.

Stage 1 trains the vision encoder; the language model and lm_head are frozen. The merger, which
translates one into the other, counts to the encoder's side unless `stage.train_merger` is off.
Stage 2 trains everything. With an adapter only the adapter trains, in the same parts.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from data_tools.errors import ConfigError
from train.config import CollapseConfig, Config, EarlyStoppingConfig, OptimConfig, StageConfig
from train.modeling.names import is_merger, is_vision, module_group

FALLBACK_LR = 5e-6


def trains(name: str, stage: StageConfig) -> bool:
    """Return whether a parameter (name in memory) trains in a stage without an adapter."""
    if stage.number == 2:
        return True
    return is_vision(name) and (stage.train_merger or not is_merger(name))


def freeze(model: Any, stage: StageConfig) -> None:
    """Set `requires_grad` of every parameter; a tied head follows its embedding."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, stage))


def parameter_groups(model: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: one for each part of the model, with and without weight decay.

    Decay acts on matrices only, not on biases and norms. `peak_lr` is what the schedule scales.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = module_group(name)
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        lr = optim.lr_merger if part == "merger" and optim.lr_merger else optim.lr
        group = groups.setdefault(
            (part, is_matrix),
            {
                "name": f"{part}{'' if is_matrix else '_no_decay'}",
                "params": [],
                "lr": lr,
                "peak_lr": lr,
                "weight_decay": optim.weight_decay if is_matrix else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def lr_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Return learning rate / peak learning rate for a step (counted from 0).

    Linear warm-up, then the peak for `hold` of all steps, then decay to `min_lr_ratio`.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    start = max(optim.warmup_steps, int(optim.hold * total_steps))
    if optim.schedule == "constant" or step < start:
        return 1.0
    done = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    left = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left


def estimate_steps(config: Config, num_samples: int, samples_per_pack: float) -> int:
    """Return the steps of the stage: of all epochs' samples, or `max_steps`.

    Args:
        config: of the stage.
        num_samples: of one epoch.
        samples_per_pack: mean over the first packs of the plan.
    """
    packs = num_samples * config.stage.epochs / samples_per_pack
    by_epochs = math.ceil(packs / config.data.packs_per_step)
    return min(by_epochs, config.stage.max_steps or by_epochs)


@dataclass
class EarlyStopping:
    """Ends a stage when its metric (lower is better) has not improved for a while."""

    settings: EarlyStoppingConfig | None
    best: float = math.inf
    best_step: int = 0
    num_bad: int = 0

    def update(self, step: int, metric: float) -> bool:
        """Take in an evaluation; return whether it is the best so far."""
        if self.settings is None:
            return False
        is_best = metric < self.best - self.settings.min_delta
        if is_best:
            self.best, self.best_step, self.num_bad = metric, step, 0
        else:
            self.num_bad += 1
        return is_best

    @property
    def is_over(self) -> bool:
        """Whether the stage should end."""
        return self.settings is not None and self.num_bad >= self.settings.patience

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        best = None if math.isinf(self.best) else self.best
        return {"best": best, "best_step": self.best_step, "num_bad": self.num_bad}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.best = math.inf if state["best"] is None else state["best"]
        self.best_step, self.num_bad = state["best_step"], state["num_bad"]


@dataclass
class CollapseGuard:
    """Ends a stage that destroys what the model could do before.

    The teacher-forced loss on held-out samples is compared with that of step 0 at given steps.
    Twice in a row above `max_ratio` times the first is a collapse.
    """

    settings: CollapseConfig | None
    lr: float
    first_loss: float | None = None
    num_high: int = field(default=0)

    def is_due(self, step: int) -> bool:
        """Return whether the held-out loss is wanted before this step (0 is the reference)."""
        return self.settings is not None and (step == 0 or step in self.settings.at_steps)

    def update(self, step: int, loss: float) -> None:
        """Take in a held-out loss.

        Raises:
            ConfigError: on a collapse, with what to change.
        """
        if self.settings is None:
            return
        if self.first_loss is None:
            self.first_loss = loss
            return
        is_high = not loss <= self.settings.max_ratio * self.first_loss  # NaN is high as well
        self.num_high = self.num_high + 1 if is_high else 0
        if self.num_high >= 2:
            raise ConfigError(
                f"the stage collapses: held-out loss {loss:.3f} at step {step}, "
                f"{self.first_loss:.3f} before training (more than stage.collapse.max_ratio = "
                f"{self.settings.max_ratio} twice in a row). The learning rate {self.lr:g} is too "
                f"high for this model: set optim.lr={FALLBACK_LR:g} and a fresh run.dir"
            )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"first_loss": self.first_loss, "num_high": self.num_high}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.first_loss, self.num_high = state["first_loss"], state["num_high"]
