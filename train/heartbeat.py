"""What each rank is doing, told every few seconds, and its Python stacks when it is asked.

A thread of each rank writes RUN/stageN/starts/NAME/rank-00003.json. It also writes while the main
thread waits in a collective, and stops with the process: so whoever reads the files (the watchdog,
launch/watchdog.py) can tell the rank that stopped from those that wait for it. SIGUSR2 writes the
stacks of all threads into stacks-00003.txt, without Python's help, so in a deadlock as well.
"""

import faulthandler
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.status import write_json

STEPS_LOOKED_AT = 50
STEPS_NEEDED = 5  # the first steps compile, allocate and fill caches
BEATS_MISSED = 4
STEP_PHASES = ("waiting for data", "agreeing on the step", "forward and backward", "optimizer step")
ENDING = "ending"  # no more signs of life are to be expected
PATIENT_PHASES = ("preparing the data",)  # measuring a large data set takes hours


@dataclass(frozen=True)
class Limits:
    """How long a rank may do the same thing before that counts as a hang.

    Attributes:
        interval_s: between two signs of life.
        factor: times the median step, for what a step is made of,
        min_s: but at least so long.
        long_s: for everything else: loading, evaluating, saving.
    """

    interval_s: float = 5.0
    factor: float = 10.0
    min_s: float = 900.0
    long_s: float = 1800.0

    @property
    def silence_s(self) -> float:
        """How long a rank may show no sign of life, whatever it does."""
        return max(self.min_s, BEATS_MISSED * self.interval_s)

    def of(self, phase: str, step_s: float | None) -> float | None:
        """Return the seconds for a phase; None: as long as the process lives.

        Args:
            phase: of the rank.
            step_s: median of its last steps; None if there were too few.
        """
        if phase in PATIENT_PHASES:
            return None
        if phase in STEP_PHASES and step_s is not None:
            return max(self.factor * step_s, self.min_s)
        return max(self.long_s, self.min_s)


class Heartbeat:
    """The heartbeat of one rank.

    Args:
        folder: of the start.
        rank: of this process.
        limits: how often, and what counts as a hang; told along, for the watchdog.
    """

    def __init__(self, folder: Path, rank: int, limits: Limits) -> None:
        self._path = folder / f"rank-{rank:05d}.json"
        self._limits = limits
        self._durations_s: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
        self._step_began_s: float | None = None
        self._record: dict[str, Any] = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": 0,
            "silence_s": limits.silence_s,
        }
        self._is_closed = threading.Event()
        self._stacks = (folder / f"stacks-{rank:05d}.txt").open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self.phase("starting")
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        """Say what this rank does from now on."""
        enough = len(self._durations_s) >= STEPS_NEEDED
        step_s = statistics.median(self._durations_s) if enough else None
        changes = {"phase": name, "since": time.time(), "allowed_s": self._limits.of(name, step_s)}
        self._record = self._record | changes

    def begin_step(self) -> None:
        """Start the clock of a step; the time of evaluations and saves is none of a step's."""
        self._step_began_s = time.monotonic()
        self.phase("waiting for data")

    def end_step(self, step: int) -> None:
        """Say that a step is done."""
        if self._step_began_s is not None:
            self._durations_s.append(time.monotonic() - self._step_began_s)
        self._record = self._record | {"step": step}

    def close(self) -> None:
        """Write the last sign of life and stop."""
        self._is_closed.set()
        self._thread.join()
        self.phase(ENDING)
        self._beat()
        faulthandler.unregister(signal.SIGUSR2)
        # Without a handler a late signal of the watchdog would end a rank that is about to leave.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._stacks.close()

    def _run(self) -> None:
        while not self._is_closed.wait(self._limits.interval_s):
            self._beat()

    def _beat(self) -> None:
        try:
            write_json(self._path, self._record | {"time": time.time()})
        except OSError:
            return  # a full or absent disk must not end training; the file's age tells of it
