"""One srun step of a job: started in the background, signals passed on, watched until it ends.

Slurm warns either the batch process or the steps, never reliably both: what the batch process gets
is passed on to the ranks, and saving twice does no harm.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data_tools.errors import EXIT_AGAIN, LaunchError
from launch import slurm
from launch.allocation import Allocation
from launch.verdict import Ending, ending_of

POLL_S = 0.2
SRUN_STARTS_S = 1.0  # USR1 would end it before it catches signals
WARN_AGAIN_S = 15.0  # srun drops what comes before its tasks run
REQUEUE_PATIENCE_S = 3600.0  # a controller is moved or upgraded in that time
LEAVE_PATIENCE_S = 900  # for Slurm to end this process; its KillWait is 30 s by default
RANK_SCRIPT = "slurm/rank.sh"
# What a stop signal ended before it could catch it had nothing to save yet.
STOPPED_EARLY = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


class JobSignals:
    """What Slurm has sent to the batch process.

    Attributes:
        must_save: USR1 came: a time limit or a preemption is near.
        is_ending: TERM came: Slurm ends the job, KILL follows after its KillWait.
    """

    def __init__(self) -> None:
        self.must_save = False
        self.is_ending = False

    @property
    def have_come(self) -> bool:
        """Whether either of them came."""
        return self.must_save or self.is_ending

    @contextmanager
    def caught(self) -> Iterator["JobSignals"]:
        """Note the signals meanwhile instead of dying of them."""

        def note(number: int, frame: FrameType | None) -> None:
            self.must_save = self.must_save or number == signal.SIGUSR1
            self.is_ending = self.is_ending or number == signal.SIGTERM

        before = {n: signal.signal(n, note) for n in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def job_id(env: Mapping[str, str] | None = None) -> str:
    """Return what Slurm's commands call this job.

    The last task of an array carries the id of the whole array, so a task needs both numbers.
    """
    env = os.environ if env is None else env
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def read_count(name: str, default: int, env: Mapping[str, str] | None = None) -> int:
    """Return a number from the environment, at least 1.

    Raises:
        LaunchError: if it is none.
    """
    text = (os.environ if env is None else env).get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(f"{name}={text}: expected a whole number from 1 on, see slurm/site.sh")
    return int(text)


def run_step(
    command: Sequence[str],
    signals: JobSignals,
    *,
    environment: Mapping[str, str] | None = None,
    look: Callable[[], int | None] | None = None,
) -> int:
    """Run a step to its end and return srun's exit code, 128 + N for a signal.

    Args:
        command: of srun.
        signals: of this job; USR1 is passed on to the step, again and again until it has ended.
        environment: added to ours.
        look: called several times a second meanwhile; a signal that it returns is sent to srun.
    """
    say(f"+ {shlex.join(command)}")
    process = subprocess.Popen(command, env=os.environ | dict(environment or {}))
    next_warning = time.monotonic() + SRUN_STARTS_S
    while process.poll() is None:
        if signals.must_save and time.monotonic() > next_warning:
            next_warning = time.monotonic() + WARN_AGAIN_S
            process.send_signal(signal.SIGUSR1)  # srun hands it on to all tasks, see srun(1)
        number = look() if look is not None else None
        if number is not None:
            process.send_signal(number)
        time.sleep(POLL_S)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def find_ending(allocation: Allocation, signals: JobSignals) -> Ending:
    """Ask Slurm what it does to this job; "" if it goes on, or the controller does not answer.

    A job that is being ended asks until it is: only then it is known whether to queue it again.
    """
    deadline = time.monotonic() + LEAVE_PATIENCE_S
    while True:
        try:
            job = slurm.show(job_id())
        except slurm.SlurmError as error:
            say(f"the state of job {job_id()} is not known ({error})")
            if not signals.is_ending:
                return ""
            if time.monotonic() > deadline or not isinstance(error, slurm.ControllerAwayError):
                return "requeued"
        else:
            return ending_of(job, allocation.restart, was_told=signals.is_ending)


def rank_command(command: Sequence[str], folder: Path) -> list[str]:
    """Return what each rank of a step runs so that `first_failure` and `step_id` know of it."""
    return ["bash", RANK_SCRIPT, str(folder.absolute()), *command]


def first_failure(folder: Path) -> int | None:
    """Return the exit code of the rank that failed first; None if none was noted."""
    codes = folder / "codes"
    if not codes.exists():
        return None
    # Ranks of several nodes append to it: NFS may lose or tear a line, a full disk cut it off.
    words = codes.read_text(encoding="utf-8", errors="replace").split()
    failed = [int(word) for word in words if word.isdecimal() and int(word) != 0]
    if not failed:
        return None
    return EXIT_AGAIN if failed[0] in STOPPED_EARLY else failed[0]


def step_id(folder: Path) -> str | None:
    """Return the id of the ranks' step, as `123.0`; None before it has begun."""
    path = folder / "step"
    number = path.read_text().strip() if path.exists() else ""
    return f"{os.environ['SLURM_JOB_ID']}.{number}" if number else None


def put_back(is_ours_to_do: bool, bad_nodes: Sequence[str] = ()) -> int:
    """Queue this job again under its own id and wait to be ended; return only if that fails.

    Args:
        is_ours_to_do: False where Slurm is at it already.
        bad_nodes: that the next start is to avoid.
    """
    job = job_id()
    if is_ours_to_do and not requeue(job):
        return EXIT_AGAIN
    if bad_nodes:  # refused while the job runs; now it is pending, and we have KillWait left
        try:
            slurm.exclude(job, bad_nodes)
            say(f"job {job} avoids {', '.join(bad_nodes)} from now on")
        except slurm.SlurmError as error:
            say(f"job {job} does not avoid {', '.join(bad_nodes)} ({error})")
    time.sleep(LEAVE_PATIENCE_S)
    return EXIT_AGAIN


def requeue(job: str) -> bool:
    """Queue a job of ours again, however long the controller is away; return whether it is.

    What became of the job meanwhile is looked at first: its next start may run already, which must
    not be ended, or somebody has cancelled it.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    deadline = time.monotonic() + REQUEUE_PATIENCE_S
    was_away = False
    while True:
        try:
            if was_away:
                ending = ending_of(slurm.show(job), restart, was_told=False)
                if ending in ("requeued", "cancelled"):
                    return True
            slurm.requeue(job)
            return True
        except slurm.SlurmError as error:
            was_away = isinstance(error, slurm.ControllerAwayError)
            if not was_away or time.monotonic() > deadline:
                say(f"{error}. Submit the job again to go on")
                return False
            say(f"{error}: job {job} tries again to go back into the queue")


def say(text: str) -> None:
    """Write a line into the job's log, with the time as the trainer writes it."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
