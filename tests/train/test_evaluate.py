"""Evaluation in training: the same on any ranks, and as the exported folder reads."""

from pathlib import Path

import pytest

from tests.builders import run_record, write_run
from tests.harness import run_ranks
from tests.train.trainers import losses_of, start

RTOL_FP32 = 1e-6  # sums in another order; measured below 3e-8


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
    own = tmp_path / "own.yaml"
    own.write_text("{name: own, task: text, language: en, prompt: Read}", encoding="utf-8")
    record["task"] = {"templates": [{"name": str(own)}]}
    config = write_run(tmp_path / "c.yaml", record)
    readings = run_ranks(2, train_and_read, config, timeout_s=120)[0]
    folder = export(tmp_path / "run" / "stage2", dtype="fp32")
    own.unlink()  # the export must be readable where the file is not
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
