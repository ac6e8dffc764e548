"""The trainer on ranks: the same numbers at any world size, the right parameters, no hang."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import make_sample, run_record, write_run, write_shard
from tests.harness import run_ranks
from tests.train.tiny import tiny_folder
from tests.train.trainers import gathered, losses_of, run_to_end, start
from train.config import Config, load_config
from train.data import open_data, prepare
from train.ranks import Ranks
from train.shards import find_shards
from train.stages import trains

RTOL_FP32 = 1e-6  # sums in another order; measured below 3e-8


def test_loss_curve_is_the_same_on_1_2_and_3_ranks(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    curves = []
    for world_size in (1, 2, 3):  # 4 packs a step: 3 ranks need weight-0 packs
        record = run_record(tmp_path / f"run{world_size}", model, shards)
        config = write_run(tmp_path / f"{world_size}.yaml", record)
        curves.append(run_ranks(world_size, run_to_end, config, timeout_s=120)[0])
    assert len(curves[0]) == 4
    assert curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=RTOL_FP32)


def test_loss_curve_does_not_depend_on_accumulation(tmp_path: Path, model: Path) -> None:
    same = make_sample(0)
    samples = [dataclasses.replace(same, key=f"doc-{i}") for i in range(8)]
    shard = str(write_shard(tmp_path / "train-000000.tar", samples))
    curves = []
    # All eight documents in the one step: one pack of them, or four packs of two.
    for packs, budget in ((1, 4096), (4, 60)):
        record = run_record(
            tmp_path / f"run{packs}",
            model,
            [shard],
            data={"packs_per_step": packs, "token_budget": budget},
            stage={"number": 2, "epochs": 1, "max_steps": None},
        )
        config = write_run(tmp_path / f"{packs}.yaml", record)
        curves.append(run_ranks(1, first_step, config, timeout_s=60)[0])
    (loss_1, norm_1, micro_1), (loss_4, norm_4, micro_4) = curves
    assert (micro_1, micro_4) == (1, 4)
    assert loss_4 == pytest.approx(loss_1, rel=RTOL_FP32)
    assert norm_4 == pytest.approx(norm_1, rel=1e-5)


def first_step(config_path: Path) -> tuple[float, float, int]:
    trainer = start(config_path)
    ranks = trainer.ranks
    step = next(iter(trainer.data.executor(trainer.state, trainer.layout, ranks, False)))
    total = sum(batch.weight_sum for batch in step.batches)
    trainer._train_step(step, total)
    values = trainer.statistics.collect(trainer.engine)
    return values["train/loss"], values["gradient/norm"], len(step.batches)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_stage_moves_exactly_its_parameters(
    tmp_path: Path, shards: list[str], tied: bool, stage: int
) -> None:
    folder = tiny_folder(tmp_path / "model", tied=tied)
    record = run_record(tmp_path / "run", folder, shards, stage={"number": stage, "max_steps": 3})
    config = write_run(tmp_path / "c.yaml", record)
    before, after = run_ranks(2, weights_before_and_after, config, timeout_s=90)[0]
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in before) is not tied
    section = load_config(config).stage
    for name in before:
        is_equal = torch.equal(before[name], after[name])
        assert is_equal is not trains(name, section), name
    frozen = [name for name in before if not trains(name, section)]
    assert bool(frozen) is (stage == 1)
    assert all("visual" not in name for name in frozen)


def weights_before_and_after(config_path: Path) -> tuple[Any, Any]:
    trainer = start(config_path)
    before = gathered(trainer)
    trainer.run()
    return before, gathered(trainer)


@pytest.mark.parametrize("stage", [1, 2])
def test_text_only_rank_beside_an_image_rank_does_not_hang(
    tmp_path: Path, model: Path, stage: int
) -> None:
    # (images, characters): every document fills more than half of a pack of 72 tokens.
    shapes = [(0, 60), (1, 40), (0, 60), (3, 12), (0, 60), (1, 40)]
    mixed = [
        dataclasses.replace(make_sample(i, num_images=images), text="A" * characters)
        for i, (images, characters) in enumerate(shapes)
    ]
    shard = str(write_shard(tmp_path / "train-000000.tar", mixed))
    curves = []
    for world_size in (1, 2):
        record = run_record(
            tmp_path / f"run{world_size}", model, [shard], stage={"number": stage, "max_steps": 2}
        )
        record["data"] |= {"token_budget": 72, "packs_per_step": 6}
        config = write_run(tmp_path / f"{world_size}.yaml", record)
        results = run_ranks(world_size, losses_and_images, config, timeout_s=90)
        curves.append(results[0][0])
        if world_size == 2:
            assert any(a != b for a, b in zip(results[0][1], results[1][1], strict=True))
    assert curves[1] == pytest.approx(curves[0], rel=RTOL_FP32)


def losses_and_images(config_path: Path) -> tuple[list[float], list[int]]:
    trainer = start(config_path)
    step = next(iter(trainer.data.executor(trainer.state, trainer.layout, trainer.ranks, False)))
    dummies = [batch.num_dummy_images for batch in step.batches]
    trainer.run()
    return losses_of(trainer.config.folder), dummies


def test_bf16_gradients_are_summed_in_float32(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    record = run_record(tmp_path / "run", model, shards)
    record["parallel"] |= {"precision": "bf16"}
    dtypes = run_ranks(2, gradient_dtype, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    assert dtypes == ["torch.float32"] * 2


def gradient_dtype(config_path: Path) -> str:
    trainer = start(config_path)
    return str(trainer.engine.optimizer.grad_partitions_flat_buffer.dtype)


def test_recomputation_does_not_change_the_loss(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    curves, forwards = [], []
    for recompute in (False, True):
        record = run_record(tmp_path / f"run{recompute}", model, shards)
        record["parallel"] |= {"recompute": recompute}
        config = write_run(tmp_path / f"{recompute}.yaml", record)
        curve, count = run_ranks(2, losses_and_block_forwards, config, timeout_s=90)[0]
        curves.append(curve)
        forwards.append(count)
    assert curves[1] == pytest.approx(curves[0], rel=RTOL_FP32)
    assert forwards[1] == 2 * forwards[0]  # each block once more, from the first step on


def losses_and_block_forwards(config_path: Path) -> tuple[list[float], int]:
    trainer = start(config_path)
    block = trainer.engine.module.model.model.language_model.layers[0]
    calls: list[int] = []
    block.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.evaluator.loss = lambda engine: 0.0  # type: ignore[method-assign]
    trainer._evaluate = lambda: False  # type: ignore[method-assign]
    trainer.run()
    return losses_of(trainer.config.folder), len(calls)


def test_bf16_trains_with_float32_rotary_frequencies(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    record = run_record(tmp_path / "run", model, shards, optim={"lr": 3e-3})
    record["parallel"] |= {"precision": "bf16"}
    losses, dtypes = run_ranks(2, buffers_and_losses, write_run(tmp_path / "c.yaml", record))[0]
    assert losses[-1] < losses[0]
    assert dtypes == {"torch.float32"}


def buffers_and_losses(config_path: Path) -> tuple[list[float], set[str]]:
    trainer = start(config_path)
    names = dict(trainer.engine.module.model.named_buffers())
    dtypes = {str(b.dtype) for name, b in names.items() if "inv_freq" in name}
    trainer.run()
    return losses_of(trainer.config.folder), dtypes


def test_collapsing_stage_stops_with_a_message_and_exit_code_2(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    from data_tools.errors import ConfigError

    record = run_record(
        tmp_path / "run",
        model,
        shards,
        optim={"lr": 3.0, "clip_norm": 1e3},
        stage={
            "number": 2,
            "max_steps": 9,
            "collapse": {"at_steps": [1, 2, 3], "max_ratio": 1.2},
        },
    )
    config = write_run(tmp_path / "c.yaml", record)
    message = run_ranks(2, run_and_catch, config, timeout_s=90)[0]
    assert ConfigError.exit_code == 2
    assert "optim.lr=5e-06" in message
    assert "twice in a row" in message


def run_and_catch(config_path: Path) -> str:
    from data_tools.errors import ConfigError

    trainer = start(config_path)
    try:
        trainer.run()
    except ConfigError as error:
        return str(error)
    return "did not stop"


def test_adapter_trains_alone(tmp_path: Path, model: Path, shards: list[str]) -> None:
    record = run_record(tmp_path / "run", model, shards)
    record["model"] |= {"adapter": {"rank": 4, "alpha": 8}}
    config = write_run(tmp_path / "c.yaml", record)
    before, after = run_ranks(2, weights_before_and_after, config, timeout_s=90)[0]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_a_run_counts_broken_samples_and_stops_above_the_share(tmp_path: Path, model: Path) -> None:
    samples = [make_sample(i) for i in range(8)]
    broken = samples[3].image_bytes[0][:60]  # the header survives, the pixels do not
    samples[3] = dataclasses.replace(samples[3], image_bytes=(broken,))
    shard = str(write_shard(tmp_path / "train-000000.tar", samples))
    record = run_record(tmp_path / "run", model, [shard], stage={"number": 2, "max_steps": 4})
    record["data"] |= {"max_hole_share": 0.5}
    record["evaluation"] |= {"num_samples": 8}
    config = write_run(tmp_path / "c.yaml", record)
    run_ranks(2, run_to_end, config, timeout_s=90)  # the evaluation meets it as well
    faults = (tmp_path / "run" / "stage2" / "faults.jsonl").read_text(encoding="utf-8")
    assert "doc-0003" in faults

    record["data"] |= {"max_hole_share": 0.0}
    record["run"]["dir"] = str(tmp_path / "strict")
    message = run_ranks(2, run_and_catch_data, write_run(tmp_path / "s.yaml", record))[0]
    assert "doc-0003" in message
    assert "max_hole_share" in message


def run_and_catch_data(config_path: Path) -> str:
    from data_tools.errors import BadDataShareError

    trainer = start(config_path)
    try:
        trainer.run()
    except BadDataShareError as error:
        return str(error)
    return "did not stop"


def test_dry_run_numbers_agree_with_the_run(tmp_path: Path, model: Path, shards: list[str]) -> None:
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": None})
    record["stage"] |= {"epochs": 4}
    config = load_config(write_run(tmp_path / "c.yaml", record))
    steps = count_steps(config)
    from train.stages import estimate_steps

    data = open_data(config)
    estimate = estimate_steps(config, data.num_samples, data.samples_per_pack())
    assert estimate == pytest.approx(steps, rel=0.05, abs=1)


def count_steps(config: Config) -> int:
    found = find_shards(config, Ranks())
    prepare(config, found)
    data = open_data(config)
    planner = data.plan.planner(data.sources, data.first_state())
    count = 0
    while planner.next_step() is not None:
        count += 1
    return count
