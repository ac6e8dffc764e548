"""The trainer inside `run_ranks`, and what its files say."""

import json
from pathlib import Path

import deepspeed
import torch

from train.checkpoint import newest_checkpoint
from train.config import load_config
from train.engine import build_engine, start_distributed
from train.loop import Trainer, prepare_data
from train.presence import appear
from train.ranks import Ranks
from train.shards import find_shards
from train.signals import StopSignal


def start(config_path: Path) -> Trainer:
    """Build the trainer of a rank inside `run_ranks`."""
    import torch.distributed as dist

    config = load_config(config_path)
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())
    device = start_distributed(config, ranks)
    presence = appear(config, ranks, StopSignal())
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    data = prepare_data(config, find_shards(config, ranks), ranks, checkpoint)
    trainer = Trainer(config, data, build_engine(config, device), ranks, device, presence)
    trainer.resume(checkpoint)
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
