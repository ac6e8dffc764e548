"""Interleaved rounds of CPU time: what disturbs the machine disturbs all contenders alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.loading.contenders import Contender


@dataclass(frozen=True)
class Timing:
    """CPU seconds of a contender for one pass over a page set, one number a round."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest minus fastest round, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Time one pass of every contender in each round; the order turns from round to round."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            gc.collect()
            start_s = clock()
            drain(contender.run())
            seconds[contender.name].append(clock() - start_s)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def drain(items: Iterator[Any]) -> int:
    """Take every item, keep none of them, and return how many there were."""
    return sum(1 for _ in items)
