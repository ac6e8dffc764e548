"""The pool of loader processes: order, bytes, and whatever can happen to a worker."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.errors import EXIT_DEFECT, DataError, LecternError, StorageError
from data_tools.stream.pool import WorkerLostError, WorkerPool
from data_tools.stream.wire import encode, left_over, receive, receive_now, send
from tests.data_tools.pool_makers import BrokenMaker, Job, JobMaker, UnstartableMaker

pytestmark = pytest.mark.timeout(120)


def pool_of(jobs: Any, num_workers: int = 2, **options: Any) -> WorkerPool[Job, dict[str, Any]]:
    maker = options.pop("maker", JobMaker())
    return WorkerPool(maker, iter(jobs), num_workers=num_workers, **options)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that is dead but not reaped counts as alive."""
    return Path(f"/proc/{pid}").exists()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_tasks(num_workers: int) -> None:
    jobs = [Job(n, size=n % 3 * 50_000, seconds=0.02 * (n % 4 == 0)) for n in range(24)]
    with pool_of(jobs, num_workers) as pool:
        results = list(pool)
        assert next(pool, None) is None
    assert [result["value"] for result in results] == list(range(24))
    for job, result in zip(jobs, results, strict=True):
        assert torch.equal(
            result["pixels"], torch.full((job.size,), job.value % 251, dtype=torch.uint8)
        )
        assert result["numbers"].tolist() == [[job.value, 1], [2, 3]]
        assert result["weights"].item() == 0.5 * job.value
        assert result["nothing"].shape == (0, 3) and result["nothing"].dtype == torch.int32
    pids = {result["pid"] for result in results}
    assert len(pids) <= max(1, num_workers) and (os.getpid() in pids) == (num_workers == 0)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_are_ended_and_reaped_by_close_also_in_the_middle_of_something(
    method: Any,
) -> None:
    pool = pool_of((Job(n, seconds=60.0 * (n > 1)) for n in count()), start_method=method)
    assert next(pool)["value"] == 0
    pids = pool.worker_pids
    assert len(pids) == 2 and all(map(is_alive, pids))
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 3.0
    assert method == "forkserver" or not any(map(is_alive, pids))
    wait_until(lambda: not any(map(is_alive, pids)))
    assert pool.worker_pids == [] and next(pool, None) is None
    pool.close()


def test_a_forgotten_pool_leaves_nothing_behind() -> None:
    pool = pool_of(Job(n) for n in count())
    next(pool)
    pids = pool.worker_pids
    open_files = len(os.listdir("/proc/self/fd"))
    del pool
    gc.collect()
    assert not any(map(is_alive, pids))
    assert len(os.listdir("/proc/self/fd")) < open_files


ENDLESS = """
import os, signal, sys, time
from itertools import count
from data_tools.stream.pool import WorkerPool
from tests.data_tools.pool_makers import Job, JobMaker
if __name__ == "__main__":
    pool = WorkerPool(JobMaker(), (Job(n, seconds=0.3) for n in count()), num_workers=2)
    next(pool)
    print(*pool.worker_pids, flush=True)
    if sys.argv[1] == "leave":
        sys.exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["leave", "killed"])
def test_workers_end_with_their_trainer(way: str, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, str(script), way],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    pids = [int(pid) for pid in found.stdout.split()]
    assert len(pids) == 2, found.stderr
    assert way == "killed" or (found.returncode == 0 and not found.stderr)
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("where", ["fetch", "build"])
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_lost_worker_is_replaced_and_its_tasks_are_done_again(
    fault: str, where: str, tmp_path: Path
) -> None:
    once = str(tmp_path / "once")
    jobs = [Job(n, fault=fault if n == 3 else "", where=where, once=once) for n in range(8)]
    with pool_of(jobs, timeout_s=1.0) as pool:
        assert [result["value"] for result in pool] == list(range(8))
        assert pool.counters["workers_replaced"] == 1
        assert len(pool.worker_pids) == 2


def test_a_worker_killed_from_outside_changes_nothing() -> None:
    with pool_of(Job(n, size=3_000_000, seconds=0.02) for n in range(20)) as pool:
        values = [next(pool)["value"]]
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        values += [result["value"] for result in pool]
        assert values == list(range(20))
        assert pool.counters["workers_replaced"] == 1


@pytest.mark.parametrize("fault, why", [("kill", "died .signal 9."), ("stop", "no answer for 1 s")])
def test_a_task_that_costs_three_workers_stops_and_is_named(fault: str, why: str) -> None:
    jobs = [Job(0), Job(1), Job(2, fault=fault), Job(3), Job(4)]
    with pool_of(jobs, timeout_s=1.0, describe=lambda job: f"job {job.value}") as pool:
        assert [next(pool)["value"], next(pool)["value"]] == [0, 1]
        with pytest.raises(WorkerLostError, match=f"3 loader processes .*{why}.*job 2") as caught:
            next(pool)
        assert caught.value.exit_code == EXIT_DEFECT
        assert pool.counters["workers_replaced"] == 3
        assert pool.worker_pids == []


def test_neighbours_of_a_deadly_task_are_not_blamed() -> None:
    """One worker takes two tasks at a time: the one before the killer survives."""
    jobs = [Job(0, seconds=0.5), Job(1, fault="kill", where="fetch"), Job(2)]
    with pool_of(jobs, 1) as pool:
        assert next(pool)["value"] == 0
        with pytest.raises(WorkerLostError, match="value=1"):
            next(pool)


@pytest.mark.parametrize(
    "fault, where, kind, message",
    [
        ("data", "build", DataError, "the page is blank"),
        ("storage", "fetch", StorageError, "the store is closed"),
        ("defect", "fetch", ValueError, "a defect"),
        ("awkward", "build", RuntimeError, "AwkwardError: an awkward error"),
    ],
)
def test_errors_arrive_in_their_place_with_type_and_message(
    fault: str, where: str, kind: type[Exception], message: str
) -> None:
    jobs = [Job(n, fault=fault if n == 2 else "", where=where) for n in range(5)]
    with pool_of(jobs) as pool:
        assert [next(pool)["value"], next(pool)["value"]] == [0, 1]
        with pytest.raises(kind) as caught:
            next(pool)
        assert type(caught.value) is kind and str(caught.value) == message
        notes = "".join(getattr(caught.value, "__notes__", []))
        is_defect = not isinstance(caught.value, LecternError)
        assert ("_go_wrong" in notes) == is_defect
        assert pool.worker_pids == []


def test_an_error_of_the_plan_arrives_behind_the_results_before_it() -> None:
    def jobs() -> Iterator[Job]:
        yield Job(0)
        raise DataError("no plan")

    with pool_of(jobs()) as pool:
        assert next(pool)["value"] == 0
        with pytest.raises(DataError, match="no plan"):
            next(pool)


def test_workers_that_cannot_start_are_an_error_not_an_endless_loop() -> None:
    never = pytest.raises(WorkerLostError, match="3 loader processes in a row could not start")
    with pool_of([Job(0)], 1, maker=UnstartableMaker()) as pool, never:
        next(pool)
    broken = pytest.raises(LecternError, match="the tokenizer is missing")
    with pool_of([Job(0)], maker=BrokenMaker()) as pool, broken:
        next(pool)


def test_signals_of_the_scheduler_change_nothing() -> None:
    with pool_of(Job(n, seconds=0.02) for n in range(30)) as pool:
        values = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            wait_until(lambda: len(pool.worker_pids) == 2)
            for pid in pool.worker_pids:  # the first time while they start
                os.kill(pid, number)
            values.append(next(pool)["value"])
        pids = pool.worker_pids
        values += [result["value"] for result in pool]
        assert values == list(range(30)) and pool.worker_pids == pids
        assert pool.counters["workers_replaced"] == 0


def test_bytes_that_wait_are_bounded_and_the_next_result_always_comes() -> None:
    size, drawn = 1_000_000, []

    def jobs() -> Iterator[Job]:
        for n in range(30):
            drawn.append(n)
            yield Job(n, size=size)

    with pool_of(jobs(), max_bytes=5 * size, estimate=lambda job: job.size) as pool:
        next(pool)
        time.sleep(1.0)
        assert len(drawn) <= 8, "nothing is taken, so little is made"
        assert [result["value"] for result in pool] == list(range(1, 30))
        assert 2 * size < pool.counters["queue_bytes"] <= 5.1 * size
    with pool_of(jobs(), max_bytes=10, estimate=lambda job: job.size) as pool:
        assert len(list(pool)) == 30


def test_counters_add_up_over_workers() -> None:
    with pool_of(Job(n) for n in range(12)) as pool:
        list(pool)
        assert pool.counters["retries"] == 12


def test_the_next_task_is_read_while_the_present_one_is_made(tmp_path: Path) -> None:
    mark = tmp_path / "read"
    jobs = [Job(0), Job(1, seconds=1.0), Job(2, fault="data", where="fetch", once=str(mark))]
    with pool_of(jobs, 1) as pool:
        next(pool)
        started = time.monotonic()
        wait_until(mark.exists)
        assert time.monotonic() - started < 0.8
        assert next(pool)["value"] == 1


def test_a_message_survives_any_cut() -> None:
    message = {"a": torch.arange(100_000), "b": ["x", torch.zeros(3, 0), torch.tensor(2.5)]}
    out, into = os.pipe()
    os.set_blocking(out, False)
    parts, receiving = encode(message), receive(out)
    found: Any = None
    while found is None:
        if parts:
            step = [part[:7777] for part in parts[:3]]
            parts = left_over(parts, os.writev(into, step[:1]))
        try:
            next(receiving)
        except StopIteration as stop:
            found, size = stop.value
    assert torch.equal(found["a"], message["a"]) and found["b"][2].item() == 2.5
    assert found["b"][1].shape == (3, 0) and size > 800_000
    os.close(into)
    with pytest.raises(EOFError):
        receive_now(out)
    os.close(out)


def test_tensors_of_any_kind_travel() -> None:
    kept = [
        torch.tensor([True, False]),
        torch.arange(6).view(2, 3).T,
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.tensor(7, dtype=torch.int32),
    ]
    out, into = os.pipe()
    send(into, kept)
    for one, other in zip(kept, receive_now(out), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.shape == other.shape
    os.close(out)
    os.close(into)


def test_one_buffer_takes_all_tensors_of_a_message_pinned_if_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    empty = torch.empty

    def record(*size: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        made.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", record)
    out, into = os.pipe()
    send(into, {"a": torch.ones(3), "b": torch.ones(4, dtype=torch.uint8)})
    receiving = receive(out, pin=True)
    with pytest.raises(StopIteration) as stop:
        next(receiving)
    found = stop.value.value[0]
    assert made == [True]
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()
    os.close(out)
    os.close(into)
