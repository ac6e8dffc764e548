"""What a start of a stage shows of itself and obeys: its claim, its heartbeat, the stop signal."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

from train.collectives import on_main
from train.config import Config
from train.heartbeat import Heartbeat, Limits
from train.ownership import START_VARIABLE, check_owner, claim, new_start, start_folder
from train.ranks import Ranks
from train.signals import StopSignal


@dataclass(frozen=True)
class Presence:
    """This rank's part of a start.

    Attributes:
        stop: whether somebody wants the state saved and the ranks gone.
        heart: tells what this rank does.
        check_owner: raises where another start has taken the stage over.
    """

    stop: StopSignal
    heart: Heartbeat
    check_owner: Callable[[], None]


def appear(config: Config, ranks: Ranks, stop: StopSignal) -> Presence:
    """Claim the stage, once for all ranks, and let the heart beat; a collective.

    Raises:
        LaunchError: on every rank, if another start trains the stage.
    """
    name = on_main(lambda: _claim(config))
    watchdog = config.monitor.watchdog
    limits = Limits(
        interval_s=watchdog.heartbeat_s,
        factor=watchdog.factor,
        min_s=watchdog.min_s,
        long_s=config.parallel.timeout_s,
    )
    heart = Heartbeat(start_folder(config.folder, name), ranks.rank, limits)
    return Presence(stop, heart, functools.partial(check_owner, config.folder, name))


def _claim(config: Config) -> str:
    """Return the name of this start: the job's, who has claimed the stage, or one of our own."""
    name = os.environ.get(START_VARIABLE)
    if name:
        check_owner(config.folder, name)
        return name
    start = new_start()
    claim(config.folder, start)
    return start.name
