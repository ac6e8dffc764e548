"""Are all ranks there, and how fast are sums over them: arrival, latency, bandwidth."""

import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from train.ranks import Ranks

LATENCY_ROUNDS, BANDWIDTH_ROUNDS = 20, 5
LARGE_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
POLL_S = 0.05
LEAVE_S = 5.0


def arrive(ranks: Ranks, timeout_s: float) -> tuple[dist.Store | None, list[int]]:
    """Wait for all ranks at rank 0's store.

    Returns:
        The store, and the ranks that are not there when the time is over; without rank 0 nobody
        knows of the others.

    Raises:
        RuntimeError: on rank 0, if its port is taken.
    """
    deadline = time.monotonic() + timeout_s
    if not ranks.is_main and not _answers(ranks.master_addr, ranks.master_port, deadline):
        return None, [0]
    try:
        store = dist.TCPStore(
            ranks.master_addr,
            ranks.master_port,
            ranks.world_size,
            is_master=ranks.is_main,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        missing = _wait_for_all(ranks, store, "arrived", deadline)
    except RuntimeError:
        if ranks.is_main:
            raise
        return None, [0]
    return store, missing


def _answers(host: str, port: int, deadline: float) -> bool:
    """Wait until somebody listens there; the store's own patience is longer than it is told."""
    while time.monotonic() < deadline:
        try:
            left_s = max(POLL_S, deadline - time.monotonic())
            with socket.create_connection((host, port), timeout=left_s):
                return True
        except OSError:
            time.sleep(POLL_S)
    return False


def leave(ranks: Ranks, store: dist.Store | None) -> None:
    """Keep rank 0, whose store the others use, until all are done."""
    if store is not None:
        patience_s = LEAVE_S if ranks.is_main else 0.0
        _wait_for_all(ranks, store, "left", time.monotonic() + patience_s)


def _wait_for_all(ranks: Ranks, store: dist.Store, what: str, deadline: float) -> list[int]:
    """Say at the store that this rank has come so far; return those that have not, at the end."""
    store.set(f"{what}/{ranks.rank}", "yes")
    missing = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"{what}/{rank}"])]
        if missing:
            time.sleep(POLL_S)
    return missing


def all_reduce(
    ranks: Ranks, device: torch.device, store: dist.Store | None, timeout_s: float
) -> dict[str, float]:
    """Join a process group of all ranks and measure its all-reduce.

    Returns:
        latency_us of one number; algbw_gb_s, bytes of a large tensor over the time, and busbw_gb_s,
        that times 2 (n - 1) / n: what each link carries, whatever the number of ranks n
        (nccl-tests, doc/PERFORMANCE.md).

    Raises:
        RuntimeError: if a sum is wrong, or an exchange fails or takes longer than `timeout_s`.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("probe", store) if store is not None else None,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    small = torch.empty(1, device=device)
    large = torch.empty(LARGE_BYTES[device.type] // 4, device=device)  # float32
    _timed(ranks, small, 1)  # connections are made by the first one
    latency_s = _timed(ranks, small, LATENCY_ROUNDS)
    _timed(ranks, large, 1)
    algbw = LARGE_BYTES[device.type] / 1e9 / _timed(ranks, large, BANDWIDTH_ROUNDS)
    return {
        "latency_us": round(1e6 * latency_s, 1),
        "algbw_gb_s": round(algbw, 3),
        "busbw_gb_s": round(algbw * 2 * (ranks.world_size - 1) / ranks.world_size, 3),
    }


def _timed(ranks: Ranks, tensor: torch.Tensor, rounds: int) -> float:
    """Sum a tensor over all ranks so many times; return the seconds of one.

    Raises:
        RuntimeError: if the sum is wrong.
    """
    elapsed_s = 0.0
    for _ in range(rounds):
        tensor.fill_(ranks.rank + 1)
        _finish(tensor)
        start_s = time.perf_counter()
        dist.all_reduce(tensor)
        _finish(tensor)
        elapsed_s += time.perf_counter() - start_s
    wanted = ranks.world_size * (ranks.world_size + 1) // 2
    lowest, highest = float(tensor.min()), float(tensor.max())
    if (lowest, highest) != (wanted, wanted):
        raise RuntimeError(f"the sum over all ranks is {lowest:g} to {highest:g}, not {wanted}")
    return elapsed_s / rounds


def _finish(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
