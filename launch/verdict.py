"""What becomes of a job whose ranks have ended: finished, queued again, or given up; and why."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import EXIT_AGAIN, EXIT_DATA, EXIT_DEFECT, EXIT_DONE, EXIT_USER

MAX_FAILURES = 3  # unless LECTERN_MAX_FAILURES says otherwise
FRUITLESS = (
    "interrupted before there was a newer checkpoint: more time is needed (sbatch --time), an "
    "earlier warning (--signal=B:USR1@900), or a smaller checkpoint.every_steps"
)
PERMANENT_CODES = {
    EXIT_USER: "something to change, see the message above",
    EXIT_DATA: "the data is bad beyond data.max_hole_share",
}
Ending = Literal["", "preemption", "cancelled", "time limit", "requeued"]
_GOES_ON = ("RUNNING", "SIGNALING")


@dataclass(frozen=True)
class Ended:
    """How a start of a stage ended.

    Attributes:
        code: exit code of the rank that failed first; 0 if none has.
        is_done: whether the stage says that it is done.
        must_save: whether Slurm warned the job of its end.
        ending: what Slurm does to the job at this moment, see `ending_of`.
        is_stopped: whether somebody has put a file STOP into the stage's folder.
        problem: what was found besides: a hang, bad nodes; empty if nothing.
        has_progress: whether this start made a newer checkpoint.
    """

    code: int
    is_done: bool = False
    must_save: bool = False
    ending: Ending = ""
    is_stopped: bool = False
    problem: str = ""
    has_progress: bool = True


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Attributes:
        action: `done` and `stop` end the job with `exit_code`, `requeue` puts it back into the
            queue, `leave` waits for Slurm, which ends this start and decides itself.
        exit_code: of the job.
        is_failure: whether the start counts against the cap.
        reason: for people.
    """

    action: Literal["done", "stop", "requeue", "leave"]
    exit_code: int
    is_failure: bool
    reason: str


def ending_of(job: Mapping[str, str], restart: int, *, was_told: bool) -> Ending:
    """Return what Slurm does to a job; "" if it goes on.

    The state is COMPLETING whatever the cause (measured on Slurm 22.05). A job that goes back into
    the queue (by an operator, preemption, a lost node) has its next restart counted by then; one at
    its time limit says so; what is left was cancelled, and must not be queued again. Preemption
    warns the steps of a job that runs on until the grace is over. A batch process that somebody has
    sent a signal by hand runs on as well.

    Args:
        job: what Slurm knows of it.
        restart: of this start.
        was_told: whether the batch process has got SIGTERM.
    """
    if int(job.get("Restarts", "0")) > restart:
        return "requeued"
    state = job.get("JobState")
    if state in _GOES_ON or (state != "COMPLETING" and not was_told):
        return "" if job.get("PreemptTime", "None") == "None" else "preemption"
    return "time limit" if job.get("Reason") == "TimeLimit" else "cancelled"


def decide(ended: Ended, num_failures: int, max_failures: int) -> Verdict:
    """Return what becomes of the job.

    Args:
        ended: how this start ended.
        num_failures: starts of this job before that failed without a newer checkpoint since.
        max_failures: so many such starts in all end the job.
    """
    if ended.is_done:  # whatever became of the processes: the last checkpoint was durable by then
        return Verdict("done", EXIT_DONE, False, "the stage has trained to its end")
    if ended.ending == "cancelled":
        return Verdict("leave", EXIT_AGAIN, False, "the job was cancelled")
    if ended.ending == "requeued":
        return Verdict("leave", EXIT_AGAIN, False, "Slurm has queued the job again")
    if ended.code in PERMANENT_CODES and not ended.problem:
        return Verdict("stop", ended.code, True, PERMANENT_CODES[ended.code])
    if ended.is_stopped:
        return Verdict(
            "stop",
            ended.code or EXIT_AGAIN,
            False,
            "a file STOP asked for it; submit again to go on",
        )
    is_interrupted = (
        ended.code == EXIT_AGAIN or ended.must_save or ended.ending in ("time limit", "preemption")
    )
    if is_interrupted and not ended.problem:
        if ended.has_progress or ended.ending == "preemption":
            return Verdict("requeue", EXIT_AGAIN, False, "interrupted, to go on from the last save")
        what = FRUITLESS
    else:
        what = ended.problem or _meaning(ended.code)
    if num_failures + 1 < max_failures:
        left = max_failures - num_failures - 1
        again = f"{what}; {left} more starts without a newer checkpoint are allowed"
        return Verdict("requeue", ended.code or EXIT_DEFECT, True, again)
    capped = f"{what}; {num_failures + 1} starts failed without a newer checkpoint: given up"
    return Verdict("stop", ended.code or EXIT_DEFECT, True, capped)


def _meaning(code: int) -> str:
    """Return an exit code in words."""
    if code == EXIT_DONE:
        return "the ranks ended without finishing the stage"
    if code == 128 + signal.SIGKILL:
        return f"a rank was killed (code {code}; out of memory?)"
    if code > 128:
        number = code - 128
        names = {number.value: number.name for number in signal.Signals}
        return f"a rank was ended by {names.get(number, number)} (code {code})"
    return f"a rank failed with code {code}"
