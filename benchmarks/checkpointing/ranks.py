"""What each rank of the checkpoint benchmark does: save, load, and load at another world size.

Started by `benchmarks.checkpoint`, one process a rank, over gloo:

    python -m benchmarks.checkpointing.ranks SCENARIO FOLDER --rank R --world N --layers L
"""

import argparse
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


def measure_loads(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """Load in both ways at the world size of the save; their states must be equal."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    is_equal = True
    for _ in range(rounds):
        engine = build_engine(layers)
        checkpoint = folder / "ours" / "step-00000001"
        times["ours"].append(_timed(partial(load_checkpoint, engine, checkpoint)))
        ours = local_state(engine)
        engine.destroy()
        engine = build_engine(layers)
        load = partial(engine.load_checkpoint, str(folder / "theirs"), tag=TAG)
        times["theirs"].append(_timed(load))
        theirs = local_state(engine)
        is_equal &= all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        engine.destroy()
    return {name: statistics.median(values) for name, values in times.items()} | {
        "is_equal": is_equal,
        "rounds": times,
    }


def measure_elastic(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """Load at another world size: ours directly, theirs from the converted checkpoint."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    is_equal = True
    for _ in range(rounds):
        engine = build_engine(layers)
        checkpoint = folder / "ours" / "step-00000001"
        times["ours"].append(_timed(partial(load_checkpoint, engine, checkpoint)))
        ours = local_state(engine)
        engine.destroy()
        engine = build_engine(layers, universal=True)
        load = partial(engine.load_checkpoint, str(folder), tag="universal")
        times["theirs"].append(_timed(load))
        is_equal &= all(torch.equal(a, b) for a, b in zip(ours, local_state(engine), strict=True))
        engine.destroy()
    return {name: statistics.median(values) for name, values in times.items()} | {
        "is_equal": is_equal,
        "rounds": times,
    }


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
    parser.add_argument("scenario", choices=["save", "load", "elastic"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, required=True)
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
    store = dist.FileStore(str(options.folder / f"{options.scenario}.store"), options.world)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=options.rank,
        world_size=options.world,
        timeout=timedelta(minutes=20),
    )
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    scenarios: dict[str, Callable[[], dict[str, Any]]] = {
        "save": lambda: measure_saves(
            options.folder, options.layers, options.rounds, options.steps
        ),
        "load": lambda: measure_loads(options.folder, options.layers, options.rounds),
        "elastic": lambda: measure_elastic(options.folder, options.layers, options.rounds),
    }
    result = scenarios[options.scenario]()
    if options.rank == 0:
        (options.folder / f"{options.scenario}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # DeepSpeed's engines are slow to fall apart


if __name__ == "__main__":
    main()
