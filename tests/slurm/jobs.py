"""A job of a test: what Slurm and its log say of it, and the processes of its ranks."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

FINAL_STATES = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    ]
)
TRAINERS = ("train/main.py", "train.main")


def wait_until(
    condition: Callable[[], object], timeout_s: float, what: Callable[[], str], pause_s: float = 0.1
) -> None:
    """Wait until a condition holds; `what` says what is the case if it never does.

    Raises:
        TimeoutError: with the words of `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what()}")
        time.sleep(pause_s)


@dataclass(frozen=True)
class Job:
    """A submitted job, or with `task` one task of an array.

    Attributes:
        number: its id; NUMBER_INDEX for a task of an array.
        log_path: where its batch script writes.
        run: runs a command as on the login node and returns its stdout.
    """

    number: str
    log_path: Path
    run: Callable[..., str]

    def task(self, index: int) -> "Job":
        """Return a task of this array job."""
        number = f"{self.number}_{index}"
        return Job(number, self.log_path.with_stem(number), self.run)

    @property
    def log(self) -> str:
        if not self.log_path.exists():
            return ""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def show(self) -> dict[str, str]:
        """Return what Slurm knows of the job, JobState and ExitCode among it."""
        text = self.run("scontrol", "-o", "show", "job", self.number)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def wait(self, timeout_s: float = 120) -> tuple[str, str]:
        """Return (state, exit code) of the ended job, such as ("FAILED", "2:0")."""
        wait_until(lambda: self.state in FINAL_STATES, timeout_s, lambda: self._story(""), 0.3)
        about = self.show()
        return about["JobState"], about["ExitCode"]

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Wait until the log holds a text; the job must not end without it."""

        def is_there() -> bool:
            has_ended = self.state in FINAL_STATES  # asked first: then the log is complete
            if text not in self.log:
                assert not has_ended, self._story(text)
                return False
            return True

        wait_until(is_there, timeout_s, lambda: self._story(text), 0.2)

    def wait_for_state(self, *states: str, timeout_s: float = 60) -> None:
        """Wait until Slurm reports one of some states."""
        wait_until(
            lambda: self.state in states, timeout_s, lambda: self._story(" or ".join(states))
        )

    def _story(self, wanted: str) -> str:
        about = self.show()
        told = f"{about['JobState']} {about['ExitCode']} {about['Reason']}"
        return f"job {self.number} is {told}, wanted {wanted or 'its end'}; its log:\n{self.log}"

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of the job on all nodes, its batch script among them."""
        return find_processes({"SLURM_JOB_ID": self._id()})

    def rank_process(self, rank: int, timeout_s: float = 60) -> int:
        """Return the process id of a rank's trainer as soon as it runs."""
        wanted = {"SLURM_JOB_ID": self._id(), "SLURM_PROCID": str(rank)}
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = _trainers(find_processes(wanted))
            return bool(found)

        wait_until(is_there, timeout_s, lambda: self._story(f"a trainer of rank {rank}"))
        return found[0].pid

    def signal_rank(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank's trainer: KILL as for lack of memory, STOP as for a hang."""
        os.kill(self.rank_process(rank), number)

    def _id(self) -> str:
        return self.show()["JobId"]


def find_processes(environment: dict[str, str]) -> list[psutil.Process]:
    """Return the living processes that were started with these variables."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended, or is not ours
        if environment.items() <= environ.items():
            found.append(process)
    return found


def _trainers(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return the trainers themselves: neither the shell around one nor its loader's workers."""
    found = {}
    for process in processes:
        try:
            command = process.cmdline()
            if "python" in Path(command[0]).name and any(n in command[1:3] for n in TRAINERS):
                found[process.pid] = process.ppid()
        except (psutil.NoSuchProcess, IndexError):
            continue  # it has ended, or is about to
    return [process for process in processes if found.get(process.pid, 0) not in {0, *found}]
