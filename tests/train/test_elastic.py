"""At another number of ranks a checkpoint goes on: equal state, a curve equal within rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import run_ranks
from tests.train.engines import build_engine, extended_model, save, train, whole_state
from train.checkpoint import load_checkpoint
from train.modeling.adapters import add_adapter
from train.modeling.names import is_vision

SAVED_STEP = 2
SHORT, LONG = 8, 20  # steps of the curve
SHORT_RTOL, LONG_RTOL = 1e-6, 1e-5


def make_engine(variant: str, lr: float = 1e-3) -> Any:
    """Return a fresh engine that trains everything, the vision encoder, or an adapter."""
    model = extended_model()
    if variant == "stage 1":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_vision(name))
    if variant == "adapter":
        targets = ["q_proj", "v_proj", "qkv"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_adapter(model, rank=3, alpha=6, dropout=0.0, targets=targets, stage=2)
    return build_engine(model, lr=lr)


def settings_of(engine: Any) -> dict[str, Any]:
    groups = [
        {k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups
    ]
    optimizer = engine.optimizer.optimizer
    flats = engine.optimizer.fp32_partitioned_groups_flat
    counts = {int(optimizer.state[flat]["step"]) for flat in flats}
    return {"groups": repr(groups), "counts": sorted(counts), "steps": engine.global_steps}


def write(folder: Path, variant: str) -> tuple[dict[str, Any], list[float]]:
    """Save, and return the settings and the curve of the undisturbed run."""
    engine = make_engine(variant)
    train(engine, 0, SAVED_STEP)
    save(engine, folder, SAVED_STEP, {})
    state = whole_state(engine)
    if torch.distributed.get_rank() == 0:
        save_file(state, folder / "state.safetensors")
    settings = settings_of(engine)
    return settings, train(engine, SAVED_STEP, LONG)


def go_on(folder: Path, variant: str) -> tuple[dict[str, Any], list[float]]:
    """Load at this world size, compare every tensor, and return settings and curve."""
    engine = make_engine(variant, lr=0.5)
    load_checkpoint(engine, folder / f"step-{SAVED_STEP:08d}")
    expected, found = load_file(folder / "state.safetensors"), whole_state(engine)
    assert found.keys() == expected.keys()
    differing = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not differing, differing[:5]
    settings = settings_of(engine)
    return settings, train(engine, SAVED_STEP, LONG)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("written", "read", "variant"),
    [
        (1, 2, "everything"),
        (2, 1, "adapter"),
        (2, 4, "stage 1"),
        (4, 3, "everything"),
    ],
)
def test_state_is_equal_and_the_curve_goes_on(
    tmp_path: Path, written: int, read: int, variant: str
) -> None:
    settings, curve = run_ranks(written, write, tmp_path, variant, timeout_s=100)[0]
    found, resumed = run_ranks(read, go_on, tmp_path, variant, timeout_s=100)[0]
    assert found == settings
    assert resumed[:SHORT] == pytest.approx(curve[:SHORT], rel=SHORT_RTOL)
    assert resumed == pytest.approx(curve, rel=LONG_RTOL)
    assert resumed[-1] != resumed[0]
