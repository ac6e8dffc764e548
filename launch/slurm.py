"""Slurm's own commands, called and read: submit, show, find, requeue, cancel.

The controller is away now and then (a restart, a failover): what fails because of that is tried
again. Nothing here needs accounting (`sacct`).
"""

import getpass
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

from data_tools.errors import LaunchError

FINAL_STATES = frozenset(
    (
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "BOOT_FAIL",
        "DEADLINE",
    )
)
ACTIVE_STATES = frozenset(
    (
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "REQUEUED",
        "REQUEUE_HOLD",
    )
)
FIRST_PAUSE_S = 1.0  # doubles with every try
SITE_FACTS = (
    "SLURM_VERSION",
    "KillWait",
    "SlurmdTimeout",
    "JobRequeue",
    "PreemptMode",
    "ProctrackType",
    "SlurmctldParameters",
)
CLIENT_TIMEOUT_S = 120  # Slurm's own MessageTimeout may be 100 s
_AWAY = re.compile(
    r"Unable to contact slurm controller|Connection refused|Connection timed out|Socket timed out"
    r"|controller not responding|Zero Bytes were transmitted|Communication connection failure"
    r"|backup controller .* standby|Munge|Protocol authentication error",
    re.IGNORECASE,
)
_UNKNOWN_JOB = re.compile(r"Invalid job id", re.IGNORECASE)


class SlurmError(LaunchError):
    """One of Slurm's commands refused or failed."""


class ControllerAwayError(SlurmError):
    """The controller did not answer, however often it was asked."""


def is_available() -> bool:
    """Whether jobs can be submitted from this machine."""
    return all(shutil.which(program) for program in ("sbatch", "scontrol", "squeue"))


def ask(*command: str, tries: int = 5) -> str:
    """Run one of Slurm's commands and return what it prints.

    Args:
        command: and its arguments.
        tries: while the controller does not answer, with pauses of 1, 2, 4 ... seconds between.

    Raises:
        ControllerAwayError: if it never answered.
        SlurmError: with what the command said.
    """
    pause_s = FIRST_PAUSE_S
    for is_last in [False] * (tries - 1) + [True]:
        code, printed, said = _call(command)
        if code == 0:
            return printed
        # Slurm ends every process of a job: a command of ours that ran just then as well.
        is_away = code == -signal.SIGTERM or _AWAY.search(said)
        if is_last or not is_away:
            kind = ControllerAwayError if is_away else SlurmError
            raise kind(f"{' '.join(command)}: {said or f'failed with code {code}'}")
        time.sleep(pause_s)
        pause_s *= 2
    raise AssertionError("unreachable")


def _call(command: Sequence[str]) -> tuple[int, str, str]:
    """Run a command; return its exit code, what it printed and what it complained of."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"there is no {command[0]} on this machine; is Slurm there?") from None
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer in {CLIENT_TIMEOUT_S} s: controller not responding"
    return result.returncode, result.stdout, result.stderr.strip()


def submit(options: Sequence[str], script: str, arguments: Sequence[str]) -> str:
    """Submit a job script and return the job's id.

    Not tried again: a controller that did not answer may have taken the job all the same.

    Raises:
        SlurmError: with sbatch's message.
    """
    printed = ask("sbatch", "--parsable", *options, script, *arguments, tries=1)
    return printed.split(";")[0].strip()  # "id;cluster" where several are federated


def show(job_id: str) -> dict[str, str]:
    """Return what Slurm knows of a job (JobState, Reason, Restarts, ...); {} if it knows none.

    Raises:
        SlurmError: if the controller does not answer.
    """
    found = show_tasks(job_id)
    return found[0] if found else {}


def show_tasks(job_id: str) -> list[dict[str, str]]:
    """Return what Slurm knows of each task of an array, or of a job that is none.

    Raises:
        SlurmError: if the controller does not answer.
    """
    try:
        printed = ask("scontrol", "-o", "show", "job", job_id)
    except SlurmError as error:
        if _UNKNOWN_JOB.search(str(error)):
            return []
        raise
    fields = r"(?:^|\s)([A-Za-z_:/]+)=(\S*)"
    return [dict(re.findall(fields, line)) for line in printed.splitlines() if line.strip()]


def find(name: str) -> list[str]:
    """Return the ids of this user's queued and running jobs of a name, oldest first.

    An array is one job, whatever its tasks are called.
    """
    printed = ask("squeue", "-h", "-u", getpass.getuser(), "-n", name, "-o", "%F")
    return sorted(set(printed.split()), key=int)


def cancel(job_id: str, *options: str) -> None:
    """Cancel a job, or do what the options of scancel say; a job that has ended is fine.

    Raises:
        SlurmError: if it is refused.
    """
    ask("scancel", *options, job_id)


def requeue(job_id: str) -> None:
    """Put a job back into the queue under its own id; ends it first if it runs.

    Raises:
        SlurmError: if it is refused, as for a job that was submitted with --no-requeue.
    """
    try:
        ask("scontrol", "requeue", job_id)
    except SlurmError as error:
        if "pending execution" not in str(error):  # it is in the queue already
            raise


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Keep a pending job away from nodes, besides those it avoids already.

    Raises:
        SlurmError: if it is refused, as for a running job.
    """
    before = show(job_id).get("ExcNodeList", "(null)")
    avoided = [*([] if before == "(null)" else [before]), *nodes]
    ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(avoided)}")


def hostnames(nodelist: str) -> list[str]:
    """Return the nodes of a list as n[1-4,7]."""
    return ask("scontrol", "show", "hostnames", nodelist).split()


def site_facts() -> str:
    """Return what this cluster does to jobs that end, in a line: it decides how they recover."""
    try:
        printed = ask("scontrol", "show", "config", tries=1)
    except SlurmError as error:
        return f"the cluster's settings are not known ({error})"
    values = dict(re.findall(r"^(\w+)\s*=\s*(.*\S)", printed, re.MULTILINE))
    return "; ".join(f"{name} {values[name]}" for name in SITE_FACTS if name in values)
