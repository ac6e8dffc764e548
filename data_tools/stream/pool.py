"""Loader processes: results in the order of the tasks, within a byte limit, whoever dies meanwhile.

    with WorkerPool(maker, tasks, num_workers=4, max_bytes=2 * 2**30) as pool:
        for result in pool:
            ...

A thread of the trainer's process hands tasks out, receives results and watches deadlines. A worker
that died or hung is replaced and its tasks are done again; results depend on tasks alone, so that
changes nothing but the time it takes.
"""

import math
import multiprocessing
import multiprocessing.util
import os
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Literal, TypeVar

import torch

from data_tools.errors import EXIT_DEFECT, LecternError
from data_tools.stream.wire import Receiving, encode, left_over, receive
from data_tools.stream.worker import IGNORED_SIGNALS, Reply, TaskMaker, run_worker

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_LOSSES = 3  # workers that one task may cost; starts in a row that may fail
TASKS_PER_WORKER = 2  # one is made while the input of the next is read
START_TIMEOUT_S = 600.0  # imports from a busy network disk take their time


class WorkerLostError(LecternError):
    """Loader processes die or hang again and again."""

    exit_code = EXIT_DEFECT


class WorkerPool(Generic[Task, Result]):
    """Makes the results of tasks in worker processes and yields them in the order of the tasks.

    Args:
        maker: makes results; pickled into the workers.
        tasks: are drawn as they can be handed out, in a thread.
        num_workers: processes; 0 makes everything here.
        max_bytes: of results that wait to be taken and of tasks under way; the task that is waited
            for is always let through.
        estimate: bytes of a task's result, before it is there.
        describe: names a task in messages.
        timeout_s: a worker that takes longer for a task is replaced.
        pin: whether tensors are received into pinned memory.
        start_method: of the processes.
    """

    def __init__(
        self,
        maker: TaskMaker,
        tasks: Iterator[Task],
        *,
        num_workers: int,
        max_bytes: int = 2**31,
        estimate: Callable[[Task], int] = lambda _: 0,
        describe: Callable[[Task], str] = repr,
        timeout_s: float = 300.0,
        pin: bool = False,
        start_method: Literal["spawn", "forkserver"] = "spawn",
    ) -> None:
        self._maker, self._tasks = maker, tasks
        self._dispatcher: _Dispatcher | None = None
        self._taken = 0
        if num_workers == 0:
            return
        limits = _Limits(num_workers, max_bytes, estimate, describe, timeout_s)
        self._dispatcher = _Dispatcher(maker, tasks, limits, pin, start_method)
        # Ends the workers when this object is forgotten, and at exit before multiprocessing waits
        # for them.
        self._end = multiprocessing.util.Finalize(self, self._dispatcher.stop, exitpriority=10)
        self._dispatcher.start()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._dispatcher is None:
            task = next(self._tasks)
            made: Result = self._maker.build(task, self._maker.fetch(task))
            return made
        found: Any = self._dispatcher.take(self._taken)
        self._taken += 1
        if isinstance(found, _Failure):
            self.close()
            raise found.error
        result: Result = found
        return result

    def __enter__(self) -> "WorkerPool[Task, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def counters(self) -> dict[str, int]:
        """Workers replaced, reads tried again, most bytes under way at a time."""
        if self._dispatcher is None:
            return {"workers_replaced": 0, "retries": self._maker.num_retries, "queue_bytes": 0}
        return self._dispatcher.counters

    @property
    def worker_pids(self) -> list[int]:
        """Process numbers of the workers that are alive."""
        return [] if self._dispatcher is None else self._dispatcher.worker_pids

    def close(self) -> None:
        """End the workers, whatever they are doing; may be called again."""
        if self._dispatcher is not None:
            self._end()


@dataclass(frozen=True)
class _Limits:
    """See `WorkerPool`."""

    num_workers: int
    max_bytes: int
    estimate: Callable[[Any], int]
    describe: Callable[[Any], str]
    timeout_s: float


@dataclass(frozen=True)
class _Failure:
    """Takes the place of a result."""

    error: BaseException


@dataclass(order=True)
class _Order:
    """A task on its way; `losses` workers were lost with it."""

    number: int
    task: Any = field(compare=False)
    estimate: int = field(compare=False)
    losses: int = field(default=0, compare=False)


@dataclass(eq=False)
class _Worker:
    """A process as its dispatcher sees it; `deadline` is that of its next message."""

    process: BaseProcess
    connection: Connection
    receiving: Receiving
    deadline: float
    outbox: list[memoryview] = field(default_factory=list)
    orders: deque[_Order] = field(default_factory=deque)
    is_ready: bool = False
    num_retries: int = 0

    @property
    def has_room(self) -> bool:
        """Whether another task can be read ahead."""
        return self.is_ready and len(self.orders) < TASKS_PER_WORKER


class _Dispatcher(threading.Thread):
    """The thread that feeds the workers. It knows nothing of the pool, which may be forgotten."""

    def __init__(
        self, maker: TaskMaker, tasks: Iterator[Any], limits: _Limits, pin: bool, method: str
    ) -> None:
        super().__init__(name="loader", daemon=True)
        self._maker = encode(maker)  # once for all workers
        self._tasks, self._limits, self._pin = tasks, limits, pin
        self._context: Any = multiprocessing.get_context(method)
        self._device = torch.cuda.current_device() if pin and torch.cuda.is_available() else None
        self._workers: list[_Worker] = []
        self._again: list[_Order] = []  # a heap
        self._drawn: _Order | None = None  # but not handed out
        self._num_drawn = 0
        self._num_failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        # Shared with the consumer's thread, under this lock:
        self._changed = threading.Condition()
        self._results: dict[int, tuple[Any, int]] = {}
        self._next_number = 0  # that the consumer will take
        self._end_number = math.inf  # of the tasks
        self._bytes = 0
        self._failure: _Failure | None = None
        self._is_stopped = False
        self._counters = {"workers_replaced": 0, "retries": 0, "queue_bytes": 0}

    # What the consumer's thread calls.

    def take(self, number: int) -> Any:
        """Wait for a result; StopIteration behind the last one."""
        with self._changed:
            self._next_number = number
            self._wake()
            while self._is_stopped or number not in self._results:
                if number >= self._end_number or self._is_stopped:
                    raise StopIteration
                if self._failure is not None:
                    return self._failure
                self._changed.wait()
            result, size = self._results.pop(number)
            self._bytes -= size
            self._next_number = number + 1
            self._wake()
            return result

    def stop(self) -> None:
        """End the thread and its workers."""
        with self._changed:
            self._is_stopped = True
            self._results.clear()
            self._wake()
            self._changed.notify_all()
        self.join()

    @property
    def counters(self) -> dict[str, int]:
        with self._changed:
            return dict(self._counters)

    @property
    def worker_pids(self) -> list[int]:
        return [worker.process.pid for worker in list(self._workers) if worker.process.pid]

    def _wake(self) -> None:
        """Let the thread look around; under the lock."""
        if self._wake_in >= 0:
            try:
                os.write(self._wake_in, b"\0")
            except BlockingIOError:
                return  # it has been told often enough

    # The thread.

    def run(self) -> None:
        try:
            if self._device is not None:  # or pinning would open a context on the first GPU
                torch.cuda.set_device(self._device)
            for _ in range(self._limits.num_workers):
                self._start_worker()
            while not self._is_stopped:
                self._hand_out()
                for key, events in self._selector.select(self._patience_s()):
                    self._on_event(key.data, events)
                self._replace_hung()
        except BaseException as error:
            with self._changed:
                self._failure = _Failure(error)
        finally:
            for worker in self._workers:
                self._end_worker(worker)
            self._workers.clear()
            self._selector.close()
            with self._changed:
                os.close(self._wake_in)
                os.close(self._wake_out)
                self._wake_in = -1
                self._changed.notify_all()

    def _start_worker(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=run_worker, args=(theirs,), daemon=True)
        # A worker inherits that these are blocked, until it ignores them. multiprocessing unblocks
        # them when it starts its tracker, so that comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        process.start()
        theirs.close()
        os.set_blocking(ours.fileno(), False)
        worker = _Worker(
            process,
            ours,
            receive(ours.fileno(), self._pin),
            time.monotonic() + max(START_TIMEOUT_S, self._limits.timeout_s),
        )
        self._workers.append(worker)
        self._selector.register(ours.fileno(), selectors.EVENT_READ, worker)
        self._post(worker, self._maker)

    def _hand_out(self) -> None:
        """Give tasks to the workers with the fewest, as far as the byte limit allows."""
        while free := [worker for worker in self._workers if worker.has_room]:
            worker = min(free, key=lambda worker: len(worker.orders))
            order = self._again[0] if self._again else self._draw()
            if order is None:
                return
            if order.losses and worker.orders:
                return  # it starts alone, or two that were lost together would be again
            if self._again:
                heappop(self._again)
            else:
                with self._changed:
                    over = self._bytes + order.estimate > self._limits.max_bytes
                    if over and order.number != self._next_number:
                        return
                    self._add_bytes(order.estimate)
                self._drawn = None
            if not worker.orders:
                worker.deadline = time.monotonic() + self._limits.timeout_s
            worker.orders.append(order)
            self._post(worker, encode((order.number, order.task)))

    def _draw(self) -> _Order | None:
        """Return the next task that no worker has had, or None at the end."""
        if self._drawn is None and self._num_drawn < self._end_number:
            try:
                task = next(self._tasks)
                self._drawn = _Order(self._num_drawn, task, self._limits.estimate(task))
                self._num_drawn += 1
            except StopIteration:
                self._end_tasks()
            except Exception as error:  # of the plan: the consumer gets it in its place
                self._finish(self._num_drawn, _Failure(error), 0)
                self._num_drawn += 1
                self._end_tasks()
        return self._drawn

    def _end_tasks(self) -> None:
        with self._changed:
            self._end_number = self._num_drawn
            self._changed.notify_all()

    def _post(self, worker: _Worker, message: list[memoryview]) -> None:
        """Send a message as soon as the worker takes it."""
        worker.outbox += message
        events = selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(worker.connection.fileno(), events, worker)

    def _on_event(self, worker: _Worker | None, events: int) -> None:
        if worker is None:
            os.read(self._wake_out, 65536)
            return
        try:
            if events & selectors.EVENT_WRITE:
                sent = os.writev(worker.connection.fileno(), worker.outbox[:16])
                worker.outbox = left_over(worker.outbox, sent)
                if not worker.outbox:
                    self._selector.modify(worker.connection.fileno(), selectors.EVENT_READ, worker)
            if events & selectors.EVENT_READ:
                self._on_bytes(worker)
        except (EOFError, OSError):
            self._replace(worker, "died")

    def _on_bytes(self, worker: _Worker) -> None:
        try:
            next(worker.receiving)
        except StopIteration as stop:
            reply, size = stop.value
            worker.receiving = receive(worker.connection.fileno(), self._pin)
            self._on_reply(worker, reply, size)

    def _on_reply(self, worker: _Worker, reply: Reply, size: int) -> None:
        if reply.number is None:
            if reply.error is not None:
                raise reply.error
            worker.is_ready, worker.deadline = True, math.inf
            self._num_failed_starts = 0
            return
        order = worker.orders.popleft()
        assert order.number == reply.number
        waits = bool(worker.orders)
        worker.deadline = time.monotonic() + self._limits.timeout_s if waits else math.inf
        with self._changed:
            self._counters["retries"] += reply.num_retries - worker.num_retries
            self._add_bytes(size - order.estimate)
        worker.num_retries = reply.num_retries
        result = reply.result if reply.error is None else _Failure(reply.error)
        self._finish(order.number, result, size)

    def _finish(self, number: int, result: Any, size: int) -> None:
        with self._changed:
            self._results[number] = (result, size)
            self._changed.notify_all()

    def _add_bytes(self, size: int) -> None:
        """Count bytes under way; under the lock."""
        self._bytes += size
        self._counters["queue_bytes"] = max(self._counters["queue_bytes"], self._bytes)

    def _patience_s(self) -> float | None:
        deadline = min((worker.deadline for worker in self._workers), default=math.inf)
        return None if deadline == math.inf else max(0.0, deadline - time.monotonic())

    def _replace_hung(self) -> None:
        for worker in list(self._workers):
            if time.monotonic() > worker.deadline:
                self._replace(worker, f"gave no answer for {self._limits.timeout_s:.0f} s")

    def _replace(self, worker: _Worker, why: str) -> None:
        """End a worker, start another one, and have the tasks done again."""
        self._workers.remove(worker)
        code = self._end_worker(worker)
        why = f"{why} (signal {-code})" if why == "died" and code and code < 0 else why
        if not worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts == MAX_LOSSES:
                raise WorkerLostError(
                    f"{MAX_LOSSES} loader processes in a row could not start; the last one {why}. "
                    "Is the memory full, or a disk gone? Lower data.num_workers, then start again"
                )
        with self._changed:
            self._counters["workers_replaced"] += 1
        for order in worker.orders:
            order.losses += 1
            if order.losses < MAX_LOSSES:
                heappush(self._again, order)
            else:
                self._finish(order.number, _Failure(self._lost(order, why)), order.estimate)
        self._start_worker()

    def _lost(self, order: _Order, why: str) -> WorkerLostError:
        return WorkerLostError(
            f"{MAX_LOSSES} loader processes were lost with the same pack; the last one {why}. "
            f"It holds {self._limits.describe(order.task)}. Signal 9 mostly means that the memory "
            "ran out: lower data.num_workers or data.queue_gb. Else look at these samples with "
            "`python -m data_tools.check SHARDS`"
        )

    def _end_worker(self, worker: _Worker) -> int | None:
        self._selector.unregister(worker.connection.fileno())
        worker.receiving.close()
        worker.connection.close()
        worker.process.kill()  # they ignore anything gentler, and have nothing to put away
        worker.process.join()
        code = worker.process.exitcode
        worker.process.close()
        return code
