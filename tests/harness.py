"""Run a function on several ranks: one forked process each, gloo, no hang.

    results = run_ranks(2, scenario, tmp_path, timeout_s=60)

The parent pays for the imports once; each rank forks from it, joins a gloo group over a FileStore
and calls `scenario(tmp_path)`. A rank that raises, dies or outlives the time limit fails the test
with the traceback (of a hang: the stack) of every rank. Put many scenarios into one call: setting
up a group costs more than most of them.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import deepspeed
import deepspeed.ops
import torch
import torch._dynamo  # torch.optim imports it late: once here, not once per rank
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401  (same reason)

from tests.harness_settings import FOUR_ZERO_SETTINGS  # noqa: F401  (tests import it from here)

GRACE_S = 5.0  # what the other ranks get to end after one has failed
PR_SET_PDEATHSIG = 1

# The op is compiled at the first init_distributed on a CPU and is of no use to training.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Call `function(*args)` on each rank; return the results, by rank (they must pickle).

    Raises:
        RankError: with what every failed or unfinished rank had to say.
    """
    if dist.is_initialized():
        raise RuntimeError("run_ranks must not be called inside a process group")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, folder, sender, timeout_s, function, args),
                daemon=True,
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            outcomes = _collect([receiver for _, receiver in ranks], timeout_s)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()
        codes = [process.exitcode for process, _ in ranks]
        return _results(outcomes, codes, folder, timeout_s)


def _collect(receivers: list[Connection], timeout_s: float) -> dict[int, tuple[bool, Any]]:
    """Return rank -> (succeeded, result or traceback) of the ranks that answered in time."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    silent = dict(enumerate(receivers))
    deadline = time.monotonic() + timeout_s
    while silent and (remaining := deadline - time.monotonic()) > 0:
        for ready in wait(list(silent.values()), timeout=remaining):
            rank = next(r for r, receiver in silent.items() if receiver is ready)
            del silent[rank]
            try:
                outcomes[rank] = pickle.loads(ready.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                outcomes[rank] = (False, "died without a word")
        if any(not succeeded for succeeded, _ in outcomes.values()):
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return outcomes


def _results(
    outcomes: dict[int, tuple[bool, Any]],
    codes: list[int | None],
    folder: Path,
    timeout_s: float,
) -> list[Any]:
    if len(outcomes) == len(codes) and all(succeeded for succeeded, _ in outcomes.values()):
        return [outcomes[rank][1] for rank in range(len(codes))]
    parts = []
    for rank, code in enumerate(codes):
        succeeded, told = outcomes.get(rank, (False, f"not ended (time limit {timeout_s} s)"))
        if not succeeded:
            log = folder / f"rank{rank}.log"
            output = log.read_text(errors="replace") if log.exists() else ""
            if len(output) > 4000:  # the stack of a hang begins with the innermost call
                output = f"{output[:2000]}\n...\n{output[-2000:]}"
            parts.append(f"--- rank {rank}, exit code {code}\n{told}\n--- its output\n{output}")
    raise RankError("\n".join(parts))


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    sender: Connection,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # no orphan may go on writing into the folders of the next test
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _log_to(folder / f"rank{rank}.log")
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(timeout_s - 1, 0.5), exit=False)
    try:
        _join_group(rank, world_size, folder, timeout_s)
        outcome = (True, function(*args))
        payload = pickle.dumps(outcome)
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(payload)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no atexit handlers: they belong to the parent


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _join_group(rank: int, world_size: int, folder: Path, timeout_s: float) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # only read, the FileStore is used
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
