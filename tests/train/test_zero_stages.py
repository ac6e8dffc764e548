"""One checkpoint format for ZeRO-1, 2 and 3: one stage reads, bit by bit, what another wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import run_record, write_run
from tests.harness import run_ranks
from tests.train.engines import FROZEN, build_engine, extended_model, save, train, whole_state
from tests.train.trainers import run_to_end
from train.checkpoint import load_checkpoint


def fresh_engine(dtype: str, stage: int, lr: float = 1e-2) -> Any:
    model = extended_model()
    model.get_parameter(FROZEN).requires_grad_(False)
    return build_engine(model, dtype, None, lr, stage)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, differing[:5]


def write(folder: Path, stage: int) -> None:
    for dtype in ("fp32", "bf16"):
        engine = fresh_engine(dtype, stage)
        train(engine, 0, 3)
        saved = save(engine, folder / dtype, 3, {"n": 3})
        state = whole_state(engine)
        if torch.distributed.get_rank() == 0:
            save_file(state, folder / f"{dtype}.safetensors")
        losses = train(engine, 3, 2)
        again = fresh_engine(dtype, stage, lr=0.5)
        assert load_checkpoint(again, saved) == {"n": 3}
        assert_same(whole_state(again), state)
        assert train(again, 3, 2) == losses


def read(folder: Path, stages: tuple[int, ...]) -> None:
    for dtype in ("fp32", "bf16"):
        state = load_file(folder / f"{dtype}.safetensors")
        for stage in stages:
            engine = fresh_engine(dtype, stage, lr=0.5)
            load_checkpoint(engine, folder / dtype / "step-00000003")
            assert_same(whole_state(engine), state)
            groups = engine.optimizer.param_groups
            assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-2, 0.1), (2e-3, 0.0)]
            before = whole_state(engine)
            train(engine, 3, 1)
            after = whole_state(engine)
            moved = [n for n in before if not torch.equal(before[n], after[n])]
            assert len(moved) > len(before) / 2


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("writer", "world_size", "readers"), [(1, 1, (2,)), (2, 3, (3, 1))])
def test_any_stage_reads_what_another_one_wrote(
    tmp_path: Path, writer: int, world_size: int, readers: tuple[int, ...]
) -> None:
    run_ranks(2, write, tmp_path, writer, timeout_s=90)
    run_ranks(world_size, read, tmp_path, readers, timeout_s=90)


@pytest.mark.timeout(200)
def test_the_trainer_gives_the_same_losses_with_every_stage(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    losses = []
    for stage in (3, 2, 1):
        parallel = {"zero_stage": stage, "zero": {}}
        record = run_record(tmp_path / str(stage), model, shards, parallel=parallel)
        config = write_run(tmp_path / f"{stage}.yaml", record)
        losses.append(run_ranks(2, run_to_end, config, timeout_s=60)[0])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
