"""The trainer on ranks: the same numbers at any world size, the right parameters, no hang."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from tests.builders import make_sample, run_record, write_run, write_shard, write_shards
from tests.harness import run_ranks
from tests.train.tiny import tiny_folder
from train.config import Config, load_config
from train.data import measure, open_data
from train.engine import build_engine, start_distributed
from train.loop import Trainer, prepare_data
from train.ranks import Ranks
from train.shards import find_shards
from train.stages import trains

RTOL_FP32 = 1e-6  # sums in another order; measured below 3e-8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return write_shards(tmp_path / "shards", [7, 0, 5])


def start(config_path: Path) -> Trainer:
    """Build the trainer of a rank inside `run_ranks`."""
    import torch.distributed as dist

    config = load_config(config_path)
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    device = start_distributed(config, ranks)
    data = prepare_data(config, find_shards(config, ranks), ranks)
    trainer = Trainer(config, data, build_engine(config, device), ranks, device)
    trainer.resume()
    return trainer


def gathered(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in trainer.engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["train/loss"] for line in lines if "train/loss" in (record := json.loads(line))]


def run_to_end(config_path: Path) -> list[float]:
    trainer = start(config_path)
    trainer.run()
    return losses_of(trainer.config.folder)


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


def test_resume_on_another_world_size_sees_the_same_samples(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    whole = run_record(tmp_path / "whole", model, shards, stage={"number": 2, "max_steps": 6})
    run_ranks(2, run_to_end, write_run(tmp_path / "whole.yaml", whole), timeout_s=90)
    half = run_record(tmp_path / "half", model, shards, stage={"number": 2, "max_steps": 3})
    run_ranks(2, run_to_end, write_run(tmp_path / "half.yaml", half), timeout_s=90)
    (tmp_path / "half" / "stage2" / "status.json").unlink()  # not done: more steps are wanted
    half["stage"]["max_steps"] = 6
    run_ranks(1, run_to_end, write_run(tmp_path / "half.yaml", half), timeout_s=90)
    plans = [
        (tmp_path / name / "stage2" / "data.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("whole", "half")
    ]
    assert plans[0] == plans[1]
    assert losses_of(tmp_path / "half" / "stage2") == pytest.approx(
        losses_of(tmp_path / "whole" / "stage2"), rel=1e-5
    )


def test_resume_with_other_data_settings_is_refused(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 1})
    run_ranks(1, run_to_end, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    (tmp_path / "run" / "stage2" / "status.json").unlink()
    for change in ({"token_budget": 128}, {"max_chars": 30}):
        changed = record | {"data": record["data"] | change}
        config = write_run(tmp_path / "changed.yaml", changed)
        message = run_ranks(1, start_and_catch, config, timeout_s=60)[0]
        assert "made with other data settings" in message


def start_and_catch(config_path: Path) -> str:
    from data_tools.errors import CheckpointError

    try:
        start(config_path)
    except CheckpointError as error:
        return str(error)
    return "resumed"


def test_killed_between_evaluations_stops_as_early_as_undisturbed(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    stage = {"number": 2, "max_steps": 20, "early_stopping": {"patience": 2, "min_delta": 1e6}}
    ends = []
    for name in ("whole", "cut"):
        record = run_record(tmp_path / name, model, shards, stage=stage)
        record["evaluation"] |= {"every_steps": 2, "num_samples": 2, "max_new_tokens": 1}
        record["checkpoint"] |= {"every_steps": 2, "keep_last": 1}
        config = write_run(tmp_path / f"{name}.yaml", record)
        if name == "cut":
            run_ranks(1, run_until_step, config, 4, timeout_s=60)
        run_ranks(1, run_to_end, config, timeout_s=60)
        checkpoints = sorted(p.name for p in (tmp_path / name).rglob("step-*"))
        ends.append(checkpoints)
    # The first evaluation is the best, two more end the stage; the best checkpoint is kept.
    assert ends[0] == ["step-00000002", "step-00000006"]
    assert ends[1] == ends[0]


def run_until_step(config_path: Path, step: int) -> None:
    """Train and vanish after a step's checkpoint, as a killed process does."""
    trainer = start(config_path)
    report = trainer._report

    def report_or_die(batches: Any) -> None:
        if trainer.step > step:
            raise KeyboardInterrupt
        report(batches)

    trainer._report = report_or_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_changed_learning_rate_acts_on_resume(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 1})
    run_ranks(1, run_to_end, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    (tmp_path / "run" / "stage2" / "status.json").unlink()
    record["optim"] |= {"lr": 5e-6, "weight_decay": 0.3}
    settings = run_ranks(1, optim_settings, write_run(tmp_path / "c.yaml", record), timeout_s=60)
    assert settings[0] == [(5e-6, 0.3), (5e-6, 0.0)] * 3 + [(5e-6, 0.3)]


def optim_settings(config_path: Path) -> list[tuple[float, float]]:
    trainer = start(config_path)
    groups = sorted(trainer.engine.optimizer.param_groups, key=lambda g: g["name"] == "lm_head")
    return [(g["peak_lr"], g["weight_decay"]) for g in sorted(groups, key=_order)]


def _order(group: dict[str, Any]) -> tuple[bool, str]:
    return group["name"] == "lm_head", group["name"]


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


def test_character_weights_train_and_leave_the_validation_loss_alone(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    found = []
    for prior in (None, {"rarity": 0.25, "critical": 0.5, "fields": {"total": 2.0}}):
        record = run_record(tmp_path / str(bool(prior)), model, shards, loss={"char_prior": prior})
        config = write_run(tmp_path / "c.yaml", record)
        found.append(run_ranks(2, validation_loss_and_curve, config, timeout_s=90)[0])
    (plain_loss, plain_curve), (weighted_loss, weighted_curve) = found
    assert weighted_loss == pytest.approx(plain_loss, rel=1e-6)
    assert weighted_curve != pytest.approx(plain_curve, rel=1e-4)


def validation_loss_and_curve(config_path: Path) -> tuple[float, list[float]]:
    trainer = start(config_path)
    loss = trainer.evaluator.loss(trainer.engine)
    trainer.run()
    return loss, losses_of(trainer.config.folder)


def test_evaluation_reads_the_same_on_1_and_2_ranks(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    found = []
    for world_size in (1, 2):
        record = run_record(tmp_path / f"run{world_size}", model, shards)
        record["evaluation"] |= {"batch_size": 1}  # random weights have ties that padding decides
        config = write_run(tmp_path / f"{world_size}.yaml", record)
        found.append(run_ranks(world_size, evaluate, config, timeout_s=60)[0])
    assert sorted(found[0][1]) == sorted(found[1][1])
    assert len(found[0][1]) == 3
    assert found[1][0] == pytest.approx(found[0][0], rel=RTOL_FP32)


def evaluate(config_path: Path) -> tuple[float, list[tuple[str, str]]]:
    trainer = start(config_path)
    evaluation = trainer.evaluator.run(trainer.engine)
    return evaluation.loss, [(r.key, r.prediction) for r in evaluation.samples]


def test_evaluation_reads_as_the_exported_folder_does(
    tmp_path: Path, model: Path, shards: list[str]
) -> None:
    from data_tools.examples.images import decode
    from data_tools.stream.index import iterate_samples
    from inference.reader import Reader
    from train.export import export

    record = run_record(tmp_path / "run", model, shards, stage={"number": 2, "max_steps": 30})
    record["optim"] |= {"lr": 3e-3}
    config = write_run(tmp_path / "c.yaml", record)
    readings = run_ranks(2, train_and_read, config, timeout_s=120)[0]
    folder = export(tmp_path / "run" / "stage2", dtype="fp32")
    samples = {s.key: s for s in iterate_samples(shards[:1])}
    reader = Reader.load(folder, batch_size=3)
    pages = [[decode(data) for data in samples[key].image_bytes] for key, _ in readings]
    found = reader.read_images([page[0] for page in pages], max_new_tokens=4)
    assert [reading.text for reading in found] == [prediction for _, prediction in readings]
    assert any(prediction for _, prediction in readings)


def train_and_read(config_path: Path) -> list[tuple[str, str]]:
    trainer = start(config_path)
    trainer.run()
    evaluation = trainer.evaluator.run(trainer.engine)
    return [(r.key, r.prediction) for r in evaluation.samples]


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

    data = open_data(config, find_shards(config, Ranks()))
    estimate = estimate_steps(config, data.num_samples, data.samples_per_pack())
    assert estimate == pytest.approx(steps, rel=0.05, abs=1)


def count_steps(config: Config) -> int:
    found = find_shards(config, Ranks())
    measure(config, found)
    data = open_data(config, found)
    planner = data.planner(data.first_state())
    count = 0
    while planner.next_step() is not None:
        count += 1
    return count
