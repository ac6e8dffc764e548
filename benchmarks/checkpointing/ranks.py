"""What each rank of the checkpoint benchmark does: save in both ways, or load one checkpoint.

Started by `benchmarks.checkpoint`, one process a rank, over gloo:

    python -m benchmarks.checkpointing.ranks SCENARIO FOLDER --rank R --world N --layers L
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import nn

from train.checkpoint import CheckpointSaver, SaveSettings, load_checkpoint
from train.checkpoint.files import bytes_of
from train.collectives import gather_json

WIDTH = 4096  # of a square layer: 16.8 M parameters
TAG = "step"


class Stack(nn.Module):
    """Square linear layers: little to compute, much to save."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        return self.model(inputs).square().mean()


def build_engine(layers: int, universal: bool = False) -> Any:
    """Return a ZeRO-3 engine in float32, partitioned over the ranks."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if universal:
        config["checkpoint"] = {"load_universal": True}
    torch.manual_seed(0)
    model = Stack(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, steps: int) -> None:
    """Make optimizer steps."""
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, WIDTH)))
        engine.step()


def local_state(engine: Any) -> list[torch.Tensor]:
    """Return this rank's master weights and moments."""
    state = []
    for p in engine.module.model.parameters():
        state.append(safe_get_local_fp32_param(p).detach().clone())
        state += [
            safe_get_local_optimizer_state(p, kind).clone() for kind in ("exp_avg", "exp_avg_sq")
        ]
    return state


def measure_saves(folder: Path, layers: int, rounds: int, steps: int) -> dict[str, Any]:
    """Save in both ways, interleaved, and time what training waits for and all that it costs."""
    engine = build_engine(layers)
    train(engine, 2)
    saver = CheckpointSaver(engine, folder / "ours", SaveSettings(keep_last=1, on_error="stop"))
    saver.save(1, {})
    saver.wait()
    engine.save_checkpoint(str(folder / "theirs"), tag=TAG)  # of the same state, for the loads

    times: dict[str, list[float]] = {
        name: [] for name in ("plain", "ours", "theirs", "ours_blocked", "theirs_blocked")
    }
    trial = CheckpointSaver(engine, folder / "trial", SaveSettings(keep_last=1, on_error="stop"))
    trial.save(1, {})  # takes its memory, once a run
    trial.wait()
    for number in range(rounds):
        times["plain"].append(_timed(lambda: train(engine, steps)))

        def ours(step: int = number + 2) -> None:
            times["ours_blocked"].append(_timed(lambda: trial.save(step, {})))
            train(engine, steps)
            trial.wait()

        def theirs() -> None:
            save = partial(engine.save_checkpoint, str(folder / "trial-theirs"), tag=TAG)
            times["theirs_blocked"].append(_timed(save))
            train(engine, steps)

        times["ours"].append(_timed(ours))
        times["theirs"].append(_timed(theirs))
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "trial-theirs")
        dist.barrier()
    saver.close()
    trial.close()
    return {name: statistics.median(values) for name, values in times.items()} | {"rounds": times}


def measure_load(folder: Path, layers: int, kind: str) -> dict[str, Any]:
    """Load a checkpoint into a fresh engine; return the seconds and a digest of each rank's state.

    Args:
        folder: of the benchmark.
        layers: of the model.
        kind: "ours", "theirs", or "universal" (theirs, converted for another world size).
    """
    engine = build_engine(layers, universal=kind == "universal")
    load: Callable[[], Any] = {
        "ours": partial(load_checkpoint, engine, folder / "ours" / "step-00000001"),
        "theirs": partial(engine.load_checkpoint, str(folder / "theirs"), tag=TAG),
        "universal": partial(engine.load_checkpoint, str(folder), tag="universal"),
    }[kind]
    seconds = _timed(load)
    digest = hashlib.sha256()
    for tensor in local_state(engine):
        digest.update(bytes_of(tensor.contiguous()))
    return {"seconds": seconds, "digests": gather_json(digest.hexdigest())}


def _timed(action: Callable[[], Any]) -> float:
    """Return the seconds that the slowest rank takes."""
    dist.barrier()
    start = time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def main() -> None:
    """Join the group, run one scenario, and let rank 0 write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=["save", "ours", "theirs", "universal"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(options.rank),
        "LOCAL_RANK": str(options.rank),
        "WORLD_SIZE": str(options.world),
        "LOCAL_SIZE": str(options.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # only read, the FileStore is used
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = dist.FileStore(str(options.store), options.world)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=options.rank,
        world_size=options.world,
        timeout=timedelta(minutes=20),
    )
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if options.scenario == "save":
        result = measure_saves(options.folder, options.layers, options.rounds, options.steps)
    else:
        result = measure_load(options.folder, options.layers, options.scenario)
    if options.rank == 0:
        (options.folder / f"{options.scenario}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # DeepSpeed's engines are slow to fall apart


if __name__ == "__main__":
    main()
