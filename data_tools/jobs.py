"""Independent jobs in a pool of processes, with a progress bar on a terminal and lines in a log."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from data_tools.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

LOG_INTERVAL_S = 15.0


def num_usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, label: str
) -> Iterator[Result]:
    """Yield the results in order of completion; `function` and the jobs must be picklable.

    With one worker, or one job, everything runs in this process. Workers are spawned, never forked,
    so that they inherit no threads.

    Raises:
        DataError: if a worker was killed, usually for want of memory.
    """
    workers = max(1, min(workers, len(jobs)))
    results = _run_here(function, jobs) if workers == 1 else _run_pool(function, jobs, workers)
    yield from _show_progress(results, len(jobs), label)


def _run_here(function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    for job in jobs:
        yield function(job)


def _run_pool(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_die_on_interrupt)
    try:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; type the command again with "
            "a smaller --workers to go on where it stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _die_on_interrupt() -> None:
    """Let Ctrl-C end a worker without a traceback; half-written files keep their temporary name."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _show_progress(results: Iterator[Result], total: int, label: str) -> Iterator[Result]:
    is_terminal = sys.stderr.isatty()
    last_s = time.monotonic()
    for number, result in enumerate(
        tqdm(results, total=total, desc=label, disable=not is_terminal), start=1
    ):
        if not is_terminal and time.monotonic() - last_s > LOG_INTERVAL_S:
            last_s = time.monotonic()
            print(f"{label}: {number} of {total}", file=sys.stderr, flush=True)
        yield result
