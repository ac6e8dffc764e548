"""What the tests of the pool have its workers do; in a module that the workers can import."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import DataError, LecternError, StorageError


class AwkwardError(Exception):
    """Cannot be made from its message alone, so it does not survive pickling."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


ERRORS: dict[str, Exception] = {
    "data": DataError("the page is blank"),
    "storage": StorageError("the store is closed"),
    "defect": ValueError("a defect"),
    "awkward": AwkwardError("an awkward", "error"),
}


@dataclass(frozen=True)
class Job:
    """A task: which value it gives, and what goes wrong on the way.

    Attributes:
        value: of the result.
        size: of its tensor, in bytes.
        seconds: that it takes.
        fault: what happens; "kill" and "stop" happen to the process.
        where: "fetch" or "build".
        once: file that is there once the fault has happened; "" lets it happen every time.
    """

    value: int
    size: int = 10
    seconds: float = 0.0
    fault: str = ""
    where: str = "build"
    once: str = ""


class JobMaker:
    """Does jobs."""

    def __init__(self) -> None:
        self.num_retries = 0

    def fetch(self, task: Job) -> int:
        self.num_retries += 1
        self._go_wrong(task, "fetch")
        return task.value

    def build(self, task: Job, fetched: int) -> dict[str, Any]:
        time.sleep(task.seconds)
        self._go_wrong(task, "build")
        filled = torch.full((task.size,), fetched % 251, dtype=torch.uint8)
        return {
            "value": fetched,
            "pid": os.getpid(),
            "pixels": filled,
            "numbers": torch.tensor([[fetched, 1], [2, 3]]),
            "weights": torch.tensor([0.5 * fetched]),
            "nothing": torch.empty((0, 3), dtype=torch.int32),
        }

    def _go_wrong(self, task: Job, where: str) -> None:
        if not task.fault or where != task.where:
            return
        if task.once:
            if Path(task.once).exists():
                return
            Path(task.once).touch()
        if task.fault in ERRORS:
            raise ERRORS[task.fault]
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "fault": signal.SIGSEGV}
        os.kill(os.getpid(), number[task.fault])
        time.sleep(30)


class UnstartableMaker(JobMaker):
    """Kills every process that it is unpickled in."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.kill, (_Here(), signal.SIGKILL)


class _Here(int):
    """The number of the process that it is unpickled in."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getpid, ()


class BrokenMaker(JobMaker):
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise LecternError("the tokenizer is missing")
