"""The inside of a loader process: reads for the next task while it makes the present one.

A thread receives tasks and does their input; the main thread makes the results and sends them, in
the order of the tasks. The process ends with the trainer, whichever way that ends.
"""

import contextlib
import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from data_tools.errors import LecternError
from data_tools.stream.wire import can_travel, receive_now, send

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class TaskMaker(Protocol):
    """What makes results of tasks; it is pickled into the workers."""

    @property
    def num_retries(self) -> int:
        """How often input was tried again."""

    def fetch(self, task: Any) -> Any:
        """Do the input of a task; runs in a thread of its own."""

    def build(self, task: Any, fetched: Any) -> Any:
        """Make the result of a task from what was fetched."""


class Reply(NamedTuple):
    """What a worker says.

    Attributes:
        number: of the task; None: the worker is ready, or could not start.
        result: of the task.
        error: in place of a result.
        num_retries: of the worker so far.
    """

    number: int | None
    result: Any = None
    error: Exception | None = None
    num_retries: int = 0


class _Failed(NamedTuple):
    """Input that failed."""

    error: Exception


def run_worker(connection: Connection) -> None:
    """Serve a trainer: the first message holds the maker, every other one a task."""
    _live_quietly()
    descriptor = connection.fileno()
    # A trainer that is gone needs no answer.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            maker: TaskMaker = receive_now(descriptor)
        except (EOFError, ConnectionResetError):
            return
        except Exception as error:
            send(descriptor, Reply(None, error=_portable(error)))
            return
        fetched: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
        thread = threading.Thread(target=_fetch, args=(descriptor, maker, fetched), daemon=True)
        thread.start()
        send(descriptor, Reply(None))
        while True:
            _answer(descriptor, maker, *fetched.get())


def _answer(descriptor: int, maker: TaskMaker, number: int, task: Any, data: Any) -> None:
    try:
        if isinstance(data, _Failed):
            raise data.error
        reply = Reply(number, maker.build(task, data), None, maker.num_retries)
    except Exception as error:
        reply = Reply(number, None, _portable(error), maker.num_retries)
    send(descriptor, reply)


def _fetch(
    descriptor: int, maker: TaskMaker, fetched: "queue.SimpleQueue[tuple[int, Any, Any]]"
) -> None:
    while True:
        try:
            number, task = receive_now(descriptor)
        except (EOFError, OSError):
            os._exit(0)  # the trainer is gone, whatever the main thread is doing
        data: Any
        try:
            data = maker.fetch(task)
        except Exception as error:
            data = _Failed(error)
        fetched.put((number, task, data))


def _live_quietly() -> None:
    """One thread each, deaf to the signals that ask the trainer to save, dead with the trainer."""
    import cv2
    import torch

    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # They were blocked until here, so that none could end the worker while it started.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled; a defect carries its traceback as a note."""
    if not isinstance(error, LecternError):
        error.add_note("In a loader process:\n" + "".join(traceback.format_exception(error)))
    if can_travel(error):
        return error
    # Errors of other packages may need more than one argument.
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        plain.add_note(note)
    return plain
