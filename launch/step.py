"""One srun step of a job: started in the background, signals passed on, watched until it ends.

Slurm warns either the batch process or the steps, never reliably both: what the batch process gets
is passed on to the ranks, and saving twice does no harm.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data_tools.errors import EXIT_AGAIN
from launch import slurm
from launch.allocation import Allocation, shown
from launch.verdict import Ending, ending_of

POLL_S = 0.2
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


def run_step(
    command: Sequence[str],
    signals: JobSignals,
    *,
    environment: Mapping[str, str] | None = None,
    look: Callable[[], None] | None = None,
) -> int:
    """Run a step to its end and return srun's exit code, 128 + N for a signal.

    Args:
        command: of srun.
        signals: of this job; USR1 is passed on to the step.
        environment: added to ours.
        look: called several times a second meanwhile.
    """
    say(f"+ {shown(command)}")
    process = subprocess.Popen(command, env=os.environ | dict(environment or {}))
    is_passed_on = False
    while process.poll() is None:
        if signals.must_save and not is_passed_on:
            is_passed_on = True
            process.send_signal(signal.SIGUSR1)  # srun hands it on to all tasks, see srun(1)
        if look is not None:
            look()
        time.sleep(POLL_S)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def find_ending(allocation: Allocation, signals: JobSignals) -> Ending:
    """Ask Slurm what it does to this job; "" if it goes on, or the controller does not answer."""
    try:
        job = slurm.show(job_id())
    except slurm.SlurmError as error:
        say(f"the state of job {job_id()} is not known ({error})")
        return "requeued" if signals.is_ending else ""
    return ending_of(job, allocation.restart, was_told=signals.is_ending)


def rank_command(command: Sequence[str], folder: Path) -> list[str]:
    """Return what each rank of a step runs so that `first_failure` and `step_id` know of it."""
    return ["bash", RANK_SCRIPT, str(folder.absolute()), *command]


def first_failure(folder: Path) -> int | None:
    """Return the exit code of the rank that failed first; None if none was noted."""
    codes = folder / "codes"
    if not codes.exists():
        return None
    failed = [int(line) for line in codes.read_text().split() if line != "0"]
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
    try:
        if is_ours_to_do:
            slurm.requeue(job)
        if bad_nodes:  # refused while the job runs; now it is pending, and we have KillWait left
            slurm.exclude(job, bad_nodes)
            say(f"job {job} avoids {', '.join(bad_nodes)} from now on")
    except slurm.SlurmError as error:
        say(f"{error}. Submit the job again to go on")
        return EXIT_AGAIN
    time.sleep(LEAVE_PATIENCE_S)
    return EXIT_AGAIN


def say(text: str) -> None:
    """Write a line into the job's log."""
    print(text, file=sys.stderr, flush=True)
