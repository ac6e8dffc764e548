"""Progress of a long command on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_INTERVAL_S = 15.0


class Progress:
    """Counts what is done, of a total if that is known; a context manager."""

    def __init__(
        self, total: int | None, unit: str, *, log_interval_s: float = LOG_INTERVAL_S
    ) -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=unit, disable=not self._is_terminal)
        self._log_interval_s = log_interval_s
        self._last_s = time.monotonic()

    def update(self, count: int) -> None:
        """Note that `count` more are done."""
        self._done += count
        self._bar.update(count)
        if not self._is_terminal and time.monotonic() - self._last_s >= self._log_interval_s:
            self._last_s = time.monotonic()
            of_total = "" if self._total is None else f" of {self._total}"
            print(f"{self._unit}s: {self._done}{of_total}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
