"""Notice a run that hangs, name the rank that stopped first, show the others' stacks, end it.

    python -m launch.watchdog RUN/stage1          # beside a run by hand: watches and tells
    python -m launch.watchdog RUN/stage1 --kill   # and ends its ranks on this host

The jobs of slurm/ watch by themselves. Each rank tells what it does, since when, and how long that
may take (monitor.watchdog, train/heartbeat.py). A run hangs when a rank shows no sign of life for
too long, or when no rank has begun anything new for longer than all of them may. Ages are measured
by this process's clock, from when a file changed: the clocks of nodes differ.
"""

import argparse
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.errors import EXIT_DEFECT, EXIT_DONE, run_command
from train.ownership import OWNER_FILE, read_owner, start_folder
from train.status import read_status

LOOK_EVERY_S = 1.0
LONGEST_LOOK_S = 10.0
ENDING = "ending"  # as train/heartbeat.py names the phase after which no sign of life comes
DUMP_PATIENCE_S = 10.0
STACKS_EVERY_S = 0.2
INNER_FRAMES = 8  # of a main thread in the log, besides our own code; its file has everything


@dataclass(frozen=True)
class Rank:
    """What is known of a rank.

    Attributes:
        record: its last heartbeat.
        silent_s: since that changed.
        still_s: since the rank has begun something new.
    """

    record: dict[str, Any]
    silent_s: float
    still_s: float

    @property
    def is_silent(self) -> bool:
        """Whether its heartbeat has stopped."""
        return self.silent_s > self.record["silence_s"] and self.record["phase"] != ENDING

    def __str__(self) -> str:
        """Return who it is and what it was doing."""
        record = self.record
        return (
            f"rank {record['rank']} on {record['host']} (process {record['pid']}), step "
            f"{record['step']}, {record['phase']} for {self.still_s:.0f} s"
        )


@dataclass(frozen=True)
class Hang:
    """A run that hangs.

    Attributes:
        first: the rank to look at first, and why.
        reason: one sentence.
        ranks: all of them.
    """

    first: Rank
    reason: str
    ranks: tuple[Rank, ...]


def judge(ranks: Sequence[Rank]) -> Hang | None:
    """Tell whether a run hangs, and which rank the others wait for.

    Named is the rank whose heartbeat stopped first; where all hearts beat, the one that is behind:
    in an earlier step or doing something else than most.
    """
    silent = sorted((rank for rank in ranks if rank.is_silent), key=lambda rank: -rank.silent_s)
    if silent:
        first = silent[0]
        more = f" ({len(silent) - 1} more later)" if len(silent) > 1 else ""
        reason = f"its heartbeat stopped first, {first.silent_s:.0f} s ago{more}"
        return Hang(first, reason, tuple(ranks))
    if not ranks or not all(_is_overdue(rank) for rank in ranks):
        return None
    phases = [rank.record["phase"] for rank in ranks]
    common = max(sorted(set(phases)), key=phases.count)
    behind = [rank for rank in ranks if rank.record["phase"] != common]
    first = min(behind or ranks, key=lambda rank: (rank.record["step"], -rank.still_s))
    if behind:
        reason = f"{len(ranks) - len(behind)} of {len(ranks)} ranks are at: {common}"
    else:
        reason = f"every heart beats, all ranks are at: {common}; look at the network"
    return Hang(first, reason, tuple(ranks))


def _is_overdue(rank: Rank) -> bool:
    allowed_s = rank.record["allowed_s"]
    return allowed_s is not None and rank.still_s > allowed_s


class Watchdog:
    """Watches one start of a stage through the files of its ranks.

    Args:
        folder: RUN/stageN/starts/NAME.
        clock: seconds that only grow.
        start_s: until every rank must have shown a sign of life; None where that is not known.
        num_ranks: of the run; 0 where it is not known.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        start_s: float | None = None,
        num_ranks: int = 0,
    ) -> None:
        self._folder, self._clock = folder, clock
        self._seen: dict[int, tuple[dict[str, Any], float, float]] = {}
        if start_s is not None:
            self._seen = {n: (_absent(n, start_s), 0.0, 0.0) for n in range(num_ranks)}
        self._last_look: float | None = None
        self._now = 0.0

    def look(self) -> Hang | None:
        """Read the heartbeats, at most once a second; tell whether the run hangs.

        The time that this process itself stood still (a stalled file system, a suspended job) does
        not count: the ranks stood still as well, and have had no time to beat since.
        """
        clock = self._clock()
        passed_s = LOOK_EVERY_S if self._last_look is None else clock - self._last_look
        if passed_s < LOOK_EVERY_S:
            return None
        self._last_look = clock
        self._now += min(passed_s, LONGEST_LOOK_S)
        now = self._now
        for path in sorted(self._folder.glob("rank-*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # looked at again in a second
            number = record["rank"]
            before, beaten, begun = self._seen.get(number, (None, now, now))
            if before is None or before["time"] != record["time"]:
                beaten = now
            if before is None or _mark(before) != _mark(record):
                begun = now
            self._seen[number] = (record, beaten, begun)
        ranks = [
            Rank(record, now - beaten, now - begun) for record, beaten, begun in self._seen.values()
        ]
        return judge(sorted(ranks, key=lambda rank: rank.record["rank"]))


def _absent(number: int, start_s: float) -> dict[str, Any]:
    """Return the record of a rank that has not written one."""
    return {
        "rank": number,
        "host": "an unknown host",
        "pid": "unknown",
        "step": 0,
        "phase": "starting, without a sign of life",
        "since": 0.0,
        "time": 0.0,
        "allowed_s": None,
        "silence_s": start_s,
    }


def _mark(record: dict[str, Any]) -> tuple[int, str, float]:
    return record["step"], record["phase"], record["since"]


def report(hang: Hang, folder: Path, ask_for_stacks: Callable[[], None]) -> list[str]:
    """Return the lines that tell of a hang, every rank's stacks among them.

    Args:
        hang: that was found.
        folder: of the start.
        ask_for_stacks: sends SIGUSR2 to all ranks.
    """
    paths = {r.record["rank"]: folder / f"stacks-{r.record['rank']:05d}.txt" for r in hang.ranks}
    before = {number: _size(path) for number, path in paths.items()}
    ask_for_stacks()
    deadline = time.monotonic() + DUMP_PATIENCE_S
    sizes, seen = before, dict[int, int]()
    # Until every rank has written, and none has written more since the last look.
    while time.monotonic() < deadline and (
        sizes != seen or not all(sizes[number] > before[number] for number in paths)
    ):
        time.sleep(STACKS_EVERY_S)
        seen, sizes = sizes, {number: _size(path) for number, path in paths.items()}
    lines = [f"hang: {hang.first}: {hang.reason}"]
    for rank in hang.ranks:
        number = rank.record["rank"]
        lines.append(f"--- {rank}")
        stacks = _read_from(paths[number], before[number])
        lines += main_stack(stacks) or ["  no stacks: the process does not answer"]
    lines.append(f"--- all stacks: {folder}/stacks-*.txt")
    return lines


def main_stack(stacks: str) -> list[str]:
    """Return the main thread's innermost frames and, further out, those that are no library's.

    Args:
        stacks: as faulthandler writes them: threads apart, the main one last, inner frames first.
    """
    frames = re.split(r"^(?:Current t|T)hread .*$", stacks, flags=re.MULTILINE)[-1].splitlines()
    frames = [frame for frame in frames if frame.strip()]
    outer = [f for f in frames[INNER_FRAMES:] if "site-packages" not in f and "lib/python" not in f]
    return frames[:INNER_FRAMES] + outer


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, start: int) -> str:
    """Return a file's text from a byte on; nothing if it cannot be read."""
    try:
        return path.read_bytes()[start:].decode("utf-8", "replace")
    except OSError:
        return ""


def main() -> int:
    """Watch a run that was started by hand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", type=Path, metavar="RUN/stageN")
    parser.add_argument("--kill", action="store_true", help="end the ranks on this host")
    arguments = parser.parse_args()
    if read_owner(arguments.stage) is None:
        print(f"{arguments.stage}: waiting for a start", flush=True)
    while (owner := read_owner(arguments.stage)) is None:
        time.sleep(LOOK_EVERY_S)
    folder = start_folder(arguments.stage, owner.name)
    print(f"watching {folder}", flush=True)
    watchdog = Watchdog(folder)
    while not has_ended(arguments.stage):
        hang = watchdog.look()
        if hang is not None:
            print("\n".join(report(hang, folder, partial(signal_here, hang, signal.SIGUSR2))))
            if arguments.kill:
                signal_here(hang, signal.SIGKILL)
            return EXIT_DEFECT
        time.sleep(LOOK_EVERY_S)
    print(f"{arguments.stage}: {read_status(arguments.stage)['state']}")
    return EXIT_DONE


def has_ended(stage: Path) -> bool:
    """Whether the present start of a stage says that it has ended; an earlier one's word is old."""
    status = read_status(stage)
    began_s = (stage / OWNER_FILE).stat().st_mtime
    return status.get("state", "running") != "running" and status["time"] > began_s


def signal_here(hang: Hang, number: int) -> None:
    """Send a signal to the ranks of a run that are on this host."""
    for rank in hang.ranks:
        if rank.record["host"] == socket.gethostname():
            with suppress(ProcessLookupError):
                os.kill(rank.record["pid"], number)


if __name__ == "__main__":
    run_command(main)
