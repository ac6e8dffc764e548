"""What trains, learning rates, early stopping and the collapse guard."""

import math
from typing import Any

import pytest

from data_tools.errors import ConfigError
from tests.train.tiny import tiny_model
from train.config import CollapseConfig, EarlyStoppingConfig, OptimConfig, StageConfig
from train.stages import (
    CollapseGuard,
    EarlyStopping,
    freeze,
    lr_factor,
    parameter_groups,
)


def trainable_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("tied", [False, True])
def test_stage_1_freezes_language_model_and_head(tied: bool) -> None:
    model = tiny_model(tied=tied)
    freeze(model, StageConfig(number=1))
    names = trainable_names(model)
    assert names
    assert all(name.startswith("model.visual.") for name in names)
    assert not model.lm_head.weight.requires_grad


def test_the_merger_can_be_frozen_as_well() -> None:
    model = tiny_model()
    freeze(model, StageConfig(number=1, train_merger=False))
    assert not any(".merger." in name for name in trainable_names(model))


def test_groups_hold_every_trained_parameter_once_and_decay_only_matrices() -> None:
    model = tiny_model()
    freeze(model, StageConfig(number=2))
    groups = parameter_groups(model, OptimConfig(lr=1e-3, lr_merger=1e-4, weight_decay=0.1))
    counted = [id(p) for group in groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert group["weight_decay"] == (0.0 if group["name"].endswith("_no_decay") else 0.1)
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
        assert group["lr"] == (1e-4 if group["name"].startswith("merger") else 1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_warms_up_holds_and_ends_at_its_minimum(schedule: str) -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10, hold=0.5, schedule=schedule, min_lr_ratio=0.1)
    factors = [lr_factor(step, 100, optim) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:51] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[50:], factors[51:], strict=False))
    assert lr_factor(500, 100, optim) == pytest.approx(0.1)  # the estimate may fall short


def test_early_stopping_counts_evaluations_without_improvement() -> None:
    stopping = EarlyStopping(EarlyStoppingConfig(patience=2, min_delta=0.01))
    outcomes = []
    for step, metric in enumerate([0.5, 0.4, 0.395, 0.39]):
        outcomes.append((stopping.update(step, metric), stopping.is_over))
    assert outcomes == [(True, False), (True, False), (False, False), (False, True)]
    assert (stopping.best, stopping.best_step) == (0.4, 1)


def test_early_stopping_state_goes_through_json() -> None:
    import json

    first = EarlyStopping(EarlyStoppingConfig(patience=2))
    second = EarlyStopping(EarlyStoppingConfig(patience=2))
    second.restore(json.loads(json.dumps(first.state())))
    assert second.best == math.inf
    first.update(1, 0.3)
    second.restore(json.loads(json.dumps(first.state())))
    assert second == first


def test_collapse_guard_needs_two_high_losses_in_a_row() -> None:
    guard = CollapseGuard(CollapseConfig(at_steps=[10, 20, 30, 40], max_ratio=1.5), lr=5e-5)
    assert [step for step in range(50) if guard.is_due(step)] == [0, 10, 20, 30, 40]
    for step, loss in ((0, 1.0), (10, 1.6), (20, 1.4), (30, 1.6)):
        guard.update(step, loss)
    with pytest.raises(ConfigError, match=r"optim\.lr=5e-06"):
        guard.update(40, 1.51)


def test_collapse_guard_takes_nan_for_a_collapse() -> None:
    guard = CollapseGuard(CollapseConfig(), lr=5e-5)
    guard.update(0, 1.0)
    guard.update(50, math.nan)
    with pytest.raises(ConfigError):
        guard.update(100, math.nan)
