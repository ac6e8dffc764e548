"""Run a command once a node, or once a rank, with a time limit, and tell the answers apart.

In a job it is one step of srun, whose `--label` says which task a line is from; a task that hangs
does not keep back the answers of the others. Without a job it is one process, or several, here.
"""

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

_LABEL = re.compile(rb"^ *(\d+): ?")
_END_S = 5.0  # from srun's TERM to its KILL


@dataclass
class Answer:
    """What a task said.

    Attributes:
        out: its stdout.
        err: its stderr.
        time_s: when its stdout last said something, in seconds since 1970.
    """

    out: str = ""
    err: str = ""
    time_s: float = 0.0


@dataclass
class Answers:
    """What all tasks said, by number of the task.

    Attributes:
        tasks: those that said anything.
        is_late: the time was over before all had ended; they were ended then.
        begin_s: when they were started, in seconds since 1970.
        told: what srun itself said.
    """

    tasks: dict[int, Answer]
    is_late: bool
    begin_s: float
    told: str = ""

    def task(self, number: int) -> Answer:
        """Return the answer of a task; an empty one if it said nothing."""
        return self.tasks.get(number, Answer())


class Step:
    """Processes that have been started and are to be waited for.

    Args:
        commands: one of srun with `--label`, or one a task.
        limit_s: seconds from now, after which what still runs is ended.
        environments: of each command.
        is_labelled: whether srun's labels tell the tasks apart.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        limit_s: float,
        environments: Sequence[Mapping[str, str]],
        *,
        is_labelled: bool,
    ) -> None:
        self._is_labelled = is_labelled
        self._begin_s = time.time()
        self._deadline = time.monotonic() + limit_s
        self._processes = [
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            for command, environment in zip(commands, environments, strict=True)
        ]

    def wait(self) -> Answers:
        """Collect the answers until all have ended or the time is over."""
        found = Answers({}, False, self._begin_s)
        rests: dict[tuple[int, str], bytes] = {}
        with selectors.DefaultSelector() as selector:
            for number, process in enumerate(self._processes):
                for name, stream in (("out", process.stdout), ("err", process.stderr)):
                    assert stream is not None
                    selector.register(stream, selectors.EVENT_READ, (number, name))
            while selector.get_map():
                left_s = self._deadline - time.monotonic()
                events = selector.select(max(0.0, left_s))
                # What came in time is read, also when nobody has been waiting for it.
                if left_s <= 0 and (not events or left_s < -_END_S):
                    break
                for key, _ in events:
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    lines = (rests.pop(key.data, b"") + data).splitlines(keepends=True)
                    if data and lines and not lines[-1].endswith(b"\n"):
                        rests[key.data] = lines.pop()
                    for line in lines:
                        self._take(found, key.data[0], key.data[1], line)
            found.is_late = bool(selector.get_map())
        self._end(found.is_late)
        return found

    def _take(self, found: Answers, process: int, name: str, line: bytes) -> None:
        """Add a line to the answer of its task."""
        task = process
        if self._is_labelled:
            label = _LABEL.match(line)
            if label is None:
                found.told += line.decode("utf-8", "replace")
                return
            # srun also breaks long lines; joined again, they are what the task has written.
            task, line = int(label[1]), line[label.end() :].rstrip(b"\n")
            line += b"\n" if name == "err" else b""
        answer = found.tasks.setdefault(task, Answer())
        text = line.decode("utf-8", "replace")
        if name == "out":
            answer.out, answer.time_s = answer.out + text, time.time()
        else:
            answer.err += text

    def _end(self, is_late: bool) -> None:
        """Let all end that are done, end what hangs, and close what they wrote to."""
        if is_late:
            self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        while any(p.poll() is None for p in self._processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._signal(signal.SIGKILL)  # a group outlives its leader
        for process in self._processes:
            process.wait()
        for process in self._processes:
            for stream in (process.stdout, process.stderr):
                _close(stream)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        stream.close()


def labelled(command: Sequence[str]) -> list[str]:
    """Return an srun command whose output says which task a line is from."""
    program, *arguments = command
    return [program, "--label", *arguments]
