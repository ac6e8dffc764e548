"""Start a command in a process group of its own, and end the whole group with it.

A launcher such as deepspeed starts ranks that outlive it when only it is killed. A signal that asks
us to end (TERM, HUP, INT) therefore ends the group first.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data_tools.errors import EXIT_AGAIN, EXIT_DEFECT, LaunchError
from train.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 30  # from TERM to KILL: the ranks save a checkpoint
KILL_S = 5  # what is killed may stay as a zombie where nobody waits for it
POLL_S = 0.1
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, advice: str = ""
) -> None:
    """Run a command to its end, its output on our own; call it from the main thread.

    Args:
        command: and its arguments.
        environment: ours by default.
        advice: what to do or to read when it fails.

    Raises:
        LaunchError: if it fails, with its exit code.
        SystemExit: if a signal asked us to end, with 128 + its number; the command and all that it
            started have been ended.
    """
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    with _noted_signals() as noted:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment or os.environ), start_new_session=True
        )
        try:
            while process.poll() is None and not noted:
                time.sleep(POLL_S)
            if noted:
                name = signal.Signals(noted[0]).name
                print(f"{name}: ending {command[0]} and its group", file=sys.stderr, flush=True)
        finally:
            if process.returncode != 0:
                end_group(process)
    if noted:
        print("Interrupted: type the command again to go on.", file=sys.stderr)
        sys.exit(128 + noted[0])
    if process.returncode != 0:
        raise _failure(process.returncode, command, advice)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Collect the numbers of ending signals instead of dying of them.

    One that is ignored already (nohup) stays ignored.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    caught = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    try:
        for number in caught:
            signal.signal(number, note)
        yield noted
    finally:
        for number in caught:
            signal.signal(number, before[number])


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started: TERM, then KILL to whatever is left after a while.

    The group outlives its leader, so the group is what is looked at.
    """
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILL_S)):
        deadline = time.monotonic() + patience_s
        is_there = _signal_group(process, number)
        while is_there and time.monotonic() < deadline:
            time.sleep(POLL_S)
            is_there = _signal_group(process, 0)


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Send a signal (0: none) to a group; return whether anybody is there."""
    process.poll()  # a leader that nobody has waited for would count as there
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _failure(code: int, command: Sequence[str], advice: str) -> LaunchError:
    """Return the error of a command's exit code, negative for a signal."""
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if code == EXIT_AGAIN:
        advice = "It was interrupted and has saved: type the command again to go on"
    error = LaunchError(
        f"{' '.join(command)} {end}. {advice or 'Its own message stands above'}; what is done is "
        "skipped the next time"
    )
    error.exit_code = code if 0 < code < 126 else EXIT_DEFECT
    return error


def python(*arguments: str) -> list[str]:
    """Return the command that runs this interpreter."""
    return [sys.executable, *arguments]


def train_command(config: str, ranks: int | None, overrides: Sequence[str] = ()) -> list[str]:
    """Return the command that trains a stage on this machine through deepspeed's launcher.

    Args:
        config: path of the stage's YAML.
        ranks: processes to start; None leaves it to deepspeed (one a GPU, one on a CPU machine).
        overrides: `key.path=value`.
    """
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet"]
    launcher += ["--master_port", str(free_port())]
    count = [] if ranks is None else ["--num_gpus", str(ranks)]
    return [*launcher, *count, "train/main.py", "--config", config, *overrides]
