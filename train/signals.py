"""SIGTERM and SIGUSR1 mean "save and stop": before a time limit, a preemption, a maintenance.

Slurm sends either of them, once or several times, to every process of a step. Until training runs
there is nothing to save, so the process ends at once; after that the signal is noted, and all ranks
agree on it before their next step.
"""

import os
import signal
import sys

from data_tools.errors import EXIT_AGAIN

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Catches the signals from its creation on.

    Attributes:
        number: of the signal that came; None: none has.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_training = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def has_come(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def defer(self) -> None:
        """From now on a signal waits until the ranks agree on it."""
        self._is_training = True

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        if not self._is_training:
            name = signal.Signals(number).name
            # Not sys.exit: a thread or a collective under way could keep the process for minutes.
            os.write(sys.stderr.fileno(), f"{name} during the start: nothing to save\n".encode())
            os._exit(EXIT_AGAIN)
