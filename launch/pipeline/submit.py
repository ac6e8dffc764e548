"""Submit, resume and cancel the chain of a run as Slurm jobs."""

import getpass
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import EXIT_AGAIN, EXIT_DONE, ConfigError, LaunchError
from launch.pipeline.jobs import (
    Action,
    Known,
    check_waited_for,
    failure_text,
    find_jobs,
    next_actions,
    view_of,
)
from launch.pipeline.plan import Job, Plan, check_paths
from launch.pipeline.record import (
    Record,
    Submitted,
    git_revision,
    has_changed,
    hold_lock,
    job_name,
    log_pattern,
    read_record,
)
from launch.process import ROOT
from launch.slurm import SlurmError, cancel, submit
from launch.starts import STOP_FILE

SITE_FILE = "slurm/site.sh"
CONFIRM_S = 10.0  # slurmctld writes its state 5 s or more late; what it had not written is lost
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
# The site asks for GPUs for the stages; these steps compute on CPUs.
CPU_STEPS = ("shard", "convert1", "convert2")
GPU_VARIABLES = ("SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK", "SBATCH_GRES")


def submit_chain(plan: Plan, config: str, *, is_resume: bool, after: Sequence[str] = ()) -> int:
    """Submit what is missing of a chain; return the exit code.

    Args:
        plan: of the run.
        config: path of pipeline.yaml, for the record.
        is_resume: also submit what has failed or was cancelled.
        after: ids of further jobs that must complete before the chain starts.

    Raises:
        ConfigError: if a path that the first job needs is missing.
        LaunchError: if a job of the chain has failed (and this is no resume), an id of `after`
            cannot be waited for, or Slurm has forgotten a job right after taking it.
    """
    check_paths(plan)
    with hold_lock(plan):
        take_up_site()
        record = read_record(plan.run)
        record.config = config
        known = find_jobs(plan, record)
        failure = failure_text(plan, known)
        if failure and not is_resume:
            raise LaunchError(failure)
        actions = next_actions(plan, known)
        if "submit" in actions.values() or "replace" in actions.values():
            check_waited_for(after, getpass.getuser())
        submitted = _carry_out(plan, record, known, actions, after)
        if submitted:
            _confirm(plan, record, submitted)
        else:
            print("nothing to submit")
    return EXIT_DONE


def _carry_out(
    plan: Plan,
    record: Record,
    known: dict[str, Known],
    actions: dict[str, Action],
    after: Sequence[str],
) -> list[str]:
    """Do what was decided, in order; return the names of the steps that were submitted."""
    for job in reversed(plan.jobs):
        view = known[job.name].view
        if actions[job.name] == "replace" and view is not None:
            cancel(view.job_id)
    ids: dict[str, str] = {}  # of the steps that others wait for
    submitted: list[str] = []
    for job in plan.jobs:
        if actions[job.name] == "skip":
            print(f"{job.name:<9} done already{_change_note(job, record)}")
            continue
        view = known[job.name].view
        if actions[job.name] == "keep" and view is not None:
            ids[job.name] = view.job_id
            _adopt(plan, job, record, view.job_id)
            print(f"{job.name:<9} job {view.job_id}, {view.state}{_change_note(job, record)}")
            continue
        waits_for = [ids[name] for name in job.depends_on if name in ids]
        is_first = not submitted and not ids
        if after and not is_first and not submitted:
            print("--after is ignored: the first job of the chain was submitted before")
        ids[job.name] = _submit(plan, job, record, [*(after if is_first else ()), *waits_for])
        submitted.append(job.name)
        suffix = f", after {', '.join(waits_for)}" if waits_for else ""
        print(f"{job.name:<9} job {ids[job.name]} submitted{suffix}", flush=True)
    return submitted


def _submit(plan: Plan, job: Job, record: Record, waits_for: Sequence[str]) -> str:
    if job.is_stage and job.stage_dir is not None and (job.stage_dir / STOP_FILE).exists():
        (job.stage_dir / STOP_FILE).unlink()
        print(f"{job.name:<9} {job.stage_dir / STOP_FILE} removed, which had stopped it")
    (ROOT / "logs").mkdir(exist_ok=True)  # without it a job fails and leaves no log
    options = sbatch_words(plan, job, waits_for)
    try:
        with site_of(job):
            job_id = submit(options, job.script, job.arguments)
    except SlurmError as error:
        raise type(error)(
            f"{job.name} was not submitted: {error}\n  what was stays queued; type the same again "
            "when this is mended (`sbatch:` in the YAML, slurm/site.sh)"
        ) from None
    before = record.jobs.get(job.name)
    earlier = (*before.earlier, before.job_id) if before else ()
    record.add(
        job.name,
        Submitted(
            job_id,
            job_name(plan.run, job.name),
            job.script,
            job.arguments,
            tuple(options),
            tuple(waits_for),
            round(time.time(), 3),
            git_revision(),
            earlier,
        ),
    )
    return job_id


def sbatch_words(plan: Plan, job: Job, waits_for: Sequence[str]) -> list[str]:
    """Return the options of sbatch for a job; what the YAML says comes last and wins.

    Args:
        plan: of the run.
        job: to submit.
        waits_for: ids that must complete before it starts. One job of a name at a time is Slurm's
            own guard (singleton) against two submissions.
    """
    afterok = f"afterok:{':'.join(waits_for)}," if waits_for else ""
    return [
        f"--job-name={job_name(plan.run, job.name)}",
        f"--comment={plan.run.resolve()}",
        f"--output={log_pattern(job)}",
        f"--dependency={afterok}singleton",
        "--kill-on-invalid-dep=yes",
        *job.options,
    ]


def _adopt(plan: Plan, job: Job, record: Record, job_id: str) -> None:
    """Record a job that was found by its name: we were interrupted between sbatch and record."""
    before = record.jobs.get(job.name)
    if before is not None and before.job_id == job_id:
        return
    earlier = (*before.earlier, before.job_id) if before else ()
    name = job_name(plan.run, job.name)
    adopted = Submitted(job_id, name, job.script, job.arguments, job.options, earlier=earlier)
    record.add(job.name, adopted)


def _change_note(job: Job, record: Record) -> str:
    submitted = record.jobs.get(job.name)
    if submitted is None or not has_changed(job, submitted):
        return ""
    return "; submitted with other arguments or options, which this does not change"


def _confirm(plan: Plan, record: Record, names: Sequence[str]) -> None:
    """Look again for new jobs: a controller that dies right after taking one forgets it."""
    print(
        f"looking in {CONFIRM_S:g} s whether Slurm has kept them ...", file=sys.stderr, flush=True
    )
    time.sleep(CONFIRM_S)
    for name in names:
        job_id = record.jobs[name].job_id
        if view_of(job_id, job_name(plan.run, name)).state == "UNKNOWN":
            error = LaunchError(
                f"{name}: Slurm has forgotten job {job_id}, which it had just taken (was its "
                "controller restarted?); `resume` submits it again"
            )
            error.exit_code = EXIT_AGAIN
            raise error
    print("it has; `status` follows them, their logs are in logs/", file=sys.stderr)


def cancel_chain(plan: Plan) -> int:
    """Cancel the jobs of a run, dependants first; let a stage that runs save before it ends.

    Raises:
        LaunchError: if another command changes the run's jobs just now.
    """
    with hold_lock(plan):
        known = find_jobs(plan, read_record(plan.run))
        alive = [job for job in reversed(plan.jobs) if known[job.name].is_alive]
        for job in alive:
            _cancel(job, known[job.name])
        if not alive:
            print("nothing is queued or running")
        else:
            print("`resume` goes on from here")
    return EXIT_DONE


def _cancel(job: Job, known: Known) -> None:
    assert known.view is not None
    job_id = known.view.job_id
    if job.is_stage and job.stage_dir is not None and not known.view.is_waiting:
        job.stage_dir.mkdir(parents=True, exist_ok=True)
        (job.stage_dir / STOP_FILE).touch()
        cancel(job_id, "--batch", "--signal=USR1")
        print(f"{job.name:<9} job {job_id} told to save and to end; `status` shows when it has")
    else:
        cancel(job_id)
        print(f"{job.name:<9} job {job_id} cancelled ({known.view.state.lower()} until now)")


def show_commands(plan: Plan) -> int:
    """Print each sbatch command, and each script once; submit nothing, ask Slurm nothing."""
    take_up_site()
    shown: set[str] = set()
    for job in plan.jobs:
        if job.is_done():
            print(f"# {job.name}: done already\n")
            continue
        waits_for = [f"ID-OF-{name}" for name in job.depends_on if not plan[name].is_done()]
        words = ["sbatch", "--parsable", *sbatch_words(plan, job, waits_for), job.script]
        with site_of(job):
            site = {k: v for k, v in os.environ.items() if k.startswith("SBATCH_")}
        print(f"# {job.name}")
        for name, value in sorted(site.items()):
            print(f"# from the environment: {name}={value}")
        print(shlex.join([*words, *job.arguments]) + "\n")
        if job.script not in shown:
            print(_indented((ROOT / job.script).read_text(encoding="utf-8")))
        shown.add(job.script)
    return EXIT_DONE


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())


def take_up_site(root: Path = ROOT) -> None:
    """Take what slurm/site.sh exports into our environment, as `source` in a shell does.

    Inside an interactive allocation its SLURM_* would reach the jobs: they are dropped.

    Raises:
        ConfigError: if site.sh fails.
    """
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        if name not in KEPT_VARIABLES:
            del os.environ[name]
    if not (root / SITE_FILE).exists():
        return
    result = subprocess.run(
        ["bash", "-c", f"set -a; . {SITE_FILE} >&2 || exit; env -0"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise ConfigError(f"{SITE_FILE} failed: {result.stderr.strip() or 'without a message'}")
    pairs = (entry.partition("=") for entry in result.stdout.split("\0") if "=" in entry)
    os.environ.update({name: value for name, _, value in pairs if name not in ("_", "SHLVL")})


@contextmanager
def site_of(job: Job) -> Iterator[None]:
    """Hide the site's wish for GPUs from a job that needs none; its own options may have some."""
    hidden = GPU_VARIABLES if job.name in CPU_STEPS else ()
    kept = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
