"""What became of a run's jobs, and which of them are to be submitted.

`find_jobs` asks Slurm; what follows from the answers is decided by pure functions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import EXIT_AGAIN, EXIT_DATA, EXIT_USER, LaunchError
from launch.pipeline.plan import Job, Plan
from launch.pipeline.record import Record, Submitted, job_name, log_name
from launch.slurm import ACTIVE_STATES, SlurmError, find, show, show_tasks

Action = Literal["skip", "keep", "submit", "replace"]
UNKNOWN = "UNKNOWN"  # Slurm has forgotten the job: it forgets a while after the end


@dataclass(frozen=True)
class View:
    """What Slurm says of a job, the tasks of an array taken together.

    Attributes:
        job_id: of the array, for an array.
        state: in Slurm's words; UNKNOWN if it does not know the job.
        exit_code: of the first task that failed.
        nodes: where it runs or ran last.
        restarts: how often it was put back into the queue.
        reason: why it waits.
        counts: state -> tasks, for an array.
    """

    job_id: str
    state: str = UNKNOWN
    exit_code: int = 0
    nodes: str = ""
    restarts: int = 0
    reason: str = ""
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether it is queued or runs."""
        return self.state in ACTIVE_STATES

    @property
    def is_waiting(self) -> bool:
        """Whether no task of it has started."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Known:
    """What is known of one step.

    Attributes:
        is_done: its result is there.
        submitted: from the record; None if it never was.
        view: what Slurm says of the job that is alive, or else of the recorded one.
    """

    is_done: bool
    submitted: Submitted | None = None
    view: View | None = None

    @property
    def is_alive(self) -> bool:
        """Whether a job of this step is queued or runs."""
        return self.view is not None and self.view.is_alive

    @property
    def has_failed(self) -> bool:
        """Whether it was submitted and has ended without its result."""
        return self.submitted is not None and not self.is_done and not self.is_alive


def find_jobs(plan: Plan, record: Record) -> dict[str, Known]:
    """Ask Slurm for every step's job, also for those that the record does not know.

    Raises:
        SlurmError: if Slurm does not answer.
    """
    known = {}
    for job in plan.jobs:
        name = job_name(plan.run, job.name)
        submitted = record.jobs.get(job.name)
        view = None
        for job_id in reversed(find(name)):
            view = view_of(job_id, name)
            if view.is_alive:
                break
        if submitted is not None and (view is None or not view.is_alive):
            view = view_of(submitted.job_id, name)
        known[job.name] = Known(job.is_done(), submitted, view)
    return known


def view_of(job_id: str, name: str) -> View:
    """Return what Slurm says of a job; of UNKNOWN state if the id is another job's by now.

    Raises:
        SlurmError: if Slurm does not answer.
    """
    return merge_tasks(job_id, name, show_tasks(job_id))


def merge_tasks(job_id: str, name: str, tasks: Sequence[Mapping[str, str]]) -> View:
    """Return the view of a job from what `scontrol show job` says of its tasks."""
    ours = [task for task in tasks if task.get("JobName") == name]
    if not ours:
        return View(job_id)
    counts = Counter(task["JobState"] for task in ours)
    chosen = next((task for task in ours if task["JobState"] == _merged_state(counts)), ours[0])
    reason = chosen.get("Reason", "None")
    return View(
        job_id,
        state=chosen["JobState"],
        exit_code=_exit_code(chosen.get("ExitCode", "0:0")),
        nodes=chosen.get("NodeList", "").replace("(null)", ""),
        restarts=sum(int(task.get("Restarts", "0")) for task in ours),
        reason="" if reason == "None" else reason,
        counts=tuple(counts.most_common()) if len(ours) > 1 else (),
    )


def _merged_state(counts: Mapping[str, int]) -> str:
    """Return the state of an array: alive if a task is, else failed if a task did."""
    alive = [state for state in counts if state in ACTIVE_STATES]
    if alive:
        return next((state for state in alive if state != "PENDING"), "PENDING")
    return next((state for state in counts if state != "COMPLETED"), "COMPLETED")


def _exit_code(text: str) -> int:
    """Return the code of Slurm's CODE:SIGNAL, 128 + signal if a signal ended the job."""
    code, _, number = text.partition(":")
    return int(code) or (128 + int(number) if number not in ("", "0") else 0)


def next_actions(plan: Plan, known: Mapping[str, Known]) -> dict[str, Action]:
    """Return what to do with each step's job.

    What is done is skipped. A job that is alive is kept, unless one before it has to be submitted
    anew: it waits for the old one, which will never complete.

    Raises:
        LaunchError: if such a job runs already.
    """
    actions: dict[str, Action] = {}
    for job in plan.jobs:
        seen = known[job.name]
        is_stale = any(actions[name] in ("submit", "replace") for name in job.depends_on)
        if seen.is_done:
            actions[job.name] = "skip"
        elif not seen.is_alive:
            actions[job.name] = "submit"
        elif not is_stale:
            actions[job.name] = "keep"
        elif seen.view is not None and seen.view.is_waiting:
            actions[job.name] = "replace"
        else:
            raise LaunchError(
                f"{job.name} runs already, though {' and '.join(job.depends_on)} is not done; "
                "`cancel` first, then `resume`"
            )
    return actions


def failure_text(plan: Plan, known: Mapping[str, Known]) -> str:
    """Return what failed, with exit code, log and what to do; "" if nothing did."""
    failed = [job for job in plan.jobs if known[job.name].has_failed]
    if not failed:
        return ""
    first = failed[0]
    text = f"{first.name} {_end(first, known[first.name])}"
    waiting = [job.name for job in plan.dependants(first.name) if not known[job.name].is_done]
    if waiting:
        text += f"\n  {', '.join(waiting)} did not run because of it"
    return f"{text}\n  `resume` submits what is missing"


def _end(job: Job, known: Known) -> str:
    """Return how a job ended, where its log is and what its exit code asks for."""
    assert known.submitted is not None
    view, submitted = known.view, known.submitted
    log = log_name(job, submitted)
    if view is None or view.state == UNKNOWN:
        return (
            f"(job {submitted.job_id}) has ended without its result and Slurm no longer knows "
            f"it; see {log}, if it ever ran"
        )
    advice = {
        EXIT_USER: "something has to be changed: the log says what",
        EXIT_DATA: "the data are bad beyond the configured share: the log names the file",
    }.get(view.exit_code, "the log tells more")
    if view.state == "CANCELLED":
        return f"(job {view.job_id}) was cancelled" + (f"\n  log: {log}" if view.nodes else "")
    if view.exit_code == EXIT_AGAIN:
        return (
            f"(job {view.job_id}) was stopped and can go on (exit code {EXIT_AGAIN})\n  log: {log}"
        )
    if view.state == "COMPLETED":
        advice = f"but {job.result} does not say that it is done"
    return (
        f"(job {view.job_id}) ended as {view.state} with exit code {view.exit_code}: "
        f"{advice}\n  log: {log}"
    )


def check_waited_for(job_ids: Sequence[str], user: str) -> None:
    """Refuse ids that the chain cannot wait for, before anything is submitted.

    Args:
        job_ids: of jobs that do not belong to the chain.
        user: who submits.

    Raises:
        LaunchError: if Slurm does not know one, or it has failed, or is somebody else's.
    """
    for job_id in job_ids:
        try:
            about = show(job_id) if job_id.isdigit() else {}
        except SlurmError as error:
            raise LaunchError(f"--after {job_id}: {error}") from None
        if not about:
            raise LaunchError(f"--after {job_id}: Slurm knows no such job; see `squeue --me`")
        owner = about.get("UserId", "").partition("(")[0]
        if owner != user:
            raise LaunchError(f"--after {job_id}: the job belongs to {owner}, not to {user}")
        state = about.get("JobState", "")
        if state not in ACTIVE_STATES and state != "COMPLETED":
            raise LaunchError(f"--after {job_id}: the job is {state}; the chain would never start")
