"""Ranks that save and are killed: the real writer and reader around a stand-in for training.

Each rank owns slices of a few tensors and changes them by a fixed rule, saves after every step in
the way of the trainer, and goes on from the newest whole checkpoint when it is started again, at
any world size. Ranks meet at a barrier as training does at its collectives.
"""

import ctypes
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import SliceReader, newest_valid, read_manifest
from train.checkpoint.manifest import Manifest, step_folder_name
from train.checkpoint.retention import Retention
from train.checkpoint.save import prepare
from train.checkpoint.shards import partition
from train.checkpoint.snapshot import Snapshot
from train.checkpoint.write import Destination, write_rank

SHAPES = {"fp32|a": (300, 41), "fp32|b": (3,), "exp_avg|a": (300, 41), "fp32|c": (1,)}
PR_SET_PDEATHSIG = 1
NAME_BYTES = 64


def first_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def advance(values: torch.Tensor, step: int) -> None:
    """One step of the stand-in for training; element by element, so at any world size the same."""
    values.mul_(1.0009765625).add_(step / 64)


def run_rank(
    folder: Path, rank: int, world_size: int, last_step: int, barrier: Any, name: Any
) -> None:
    """Go on from the newest whole checkpoint and save after each step, up to `last_step`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    step, slices = _load(folder, rank, world_size)
    while step < last_step:
        step += 1
        for _, values in slices.values():
            advance(values, step)
        final = folder / step_folder_name(step)
        if rank == 0:
            name.value = (prepare(final) or "").encode()
        barrier.wait()
        temporary = name.value.decode()
        if temporary:
            destination = Destination(
                folder / temporary, final, None, None, Retention(last=2), timeout_s=30
            )
            thread = threading.Thread(
                target=write_rank,
                args=(
                    _snapshot(slices),
                    _manifest(step, world_size),
                    rank,
                    destination,
                    threading.Event(),
                ),
            )
            thread.start()
            thread.join()
        barrier.wait()


def _load(
    folder: Path, rank: int, world_size: int
) -> tuple[int, dict[str, tuple[tuple[int, int], torch.Tensor]]]:
    newest = newest_valid(folder)
    ranges = {
        key: partition(torch.Size(shape).numel(), world_size, rank) for key, shape in SHAPES.items()
    }
    if newest is None:
        state = first_state()
        return 0, {k: (ends, state[k].reshape(-1)[slice(*ends)]) for k, ends in ranges.items()}
    manifest = read_manifest(newest)
    reader = SliceReader(newest, manifest)
    return manifest.step, {k: (ends, reader.read(k, *ends)) for k, ends in ranges.items()}


def _snapshot(slices: dict[str, tuple[tuple[int, int], torch.Tensor]]) -> Snapshot:
    return Snapshot(
        {key: (torch.float32, (len(values),)) for key, (_, values) in slices.items()},
        {key: (list(SHAPES[key]), *ends) for key, (ends, _) in slices.items()},
        [values.clone() for _, values in slices.values()],
    )


def _manifest(step: int, world_size: int) -> Manifest:
    return Manifest(
        step=step,
        world_size=world_size,
        shards=[],
        groups=[],
        optimizer_steps=[],
        counters={},
        state={"step": step},
        parameters={},
    )


def start_ranks(folder: Path, world_size: int, last_step: int) -> list[Any]:
    context = multiprocessing.get_context("fork")
    barrier, name = context.Barrier(world_size), context.Array("c", NAME_BYTES)
    ranks = [
        context.Process(
            target=run_rank,
            args=(folder, rank, world_size, last_step, barrier, name),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def crash_once(folder: Path, draw: random.Random, last_step: int, longest_s: float) -> bool:
    """Start 1 to 3 ranks and kill one or all of them at a random time; return whether any was."""
    ranks = start_ranks(folder, draw.randint(1, 3), last_step)
    victims = ranks if draw.random() < 0.5 else [draw.choice(ranks)]
    time.sleep(draw.uniform(0.0, longest_s))
    killed = [rank for rank in victims if rank.is_alive()]
    for rank in killed:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        if killed:
            rank.join(0.05)  # the others wait at the barrier, as a collective would
            rank.kill()
        rank.join()
    return bool(killed)


def expected_state(last_step: int) -> dict[str, torch.Tensor]:
    state = first_state()
    for step in range(1, last_step + 1):
        for values in state.values():
            advance(values, step)
    return state


def final_state(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    newest = newest_valid(folder)
    assert newest is not None
    manifest = read_manifest(newest)
    reader = SliceReader(newest, manifest)
    return manifest.step, {
        key: reader.read(key, 0, torch.Size(shape).numel()).view(shape)
        for key, shape in SHAPES.items()
    }
