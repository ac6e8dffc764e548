"""The chain of a run on this machine, without Slurm: the same commands as the jobs'."""

import shlex

from data_tools.errors import EXIT_DONE, LaunchError
from launch.pipeline.jobs import find_jobs
from launch.pipeline.plan import Job, Plan, check_paths
from launch.pipeline.record import hold_lock, read_record
from launch.process import python, run, train_command
from launch.slurm import is_available
from launch.starts import STOP_FILE


def run_here(plan: Plan, ranks: int | None) -> int:
    """Run what is missing of the chain; return the exit code.

    Args:
        plan: of the run.
        ranks: processes a stage; None: one a GPU.

    Raises:
        ConfigError: if a path that the first step needs is missing.
        LaunchError: if a job of the chain is queued or running, or a step fails.
    """
    check_paths(plan)
    with hold_lock(plan):
        _refuse_jobs(plan)
        for job in plan.jobs:
            if job.is_done():
                print(f"{job.name:<9} done already", flush=True)
                continue
            if job.is_stage and job.stage_dir is not None:
                (job.stage_dir / STOP_FILE).unlink(missing_ok=True)
            run(command_here(job, ranks), advice=_advice(job))
            if not job.is_done():
                raise LaunchError(
                    f"{job.name} ended without an error, but {job.result} does not say that it is "
                    "done; see its messages above"
                )
            print(f"{job.name:<9} done", flush=True)
    return EXIT_DONE


def show_commands_here(plan: Plan, ranks: int | None) -> int:
    """Print the commands of the chain; run nothing."""
    for job in plan.jobs:
        note = ": done already" if job.is_done() else ""
        print(f"# {job.name}{note}\n{shlex.join(command_here(job, ranks))}\n")
    return EXIT_DONE


def command_here(job: Job, ranks: int | None) -> list[str]:
    """Return the command that does a job's work on this machine."""
    if job.is_stage:
        config, *overrides = job.arguments
        return train_command(config, ranks, overrides)
    return python("-m", job.module, *job.arguments)


def _advice(job: Job) -> str:
    if not job.is_stage:
        return ""
    return f"Read its message above; {job.stage_dir}/log.jsonl holds the values up to there"


def _refuse_jobs(plan: Plan) -> None:
    """Refuse to run beside the run's own jobs."""
    record = read_record(plan.run)
    if not record.jobs or not is_available():
        return
    alive = [name for name, known in find_jobs(plan, record).items() if known.is_alive]
    if alive:
        raise LaunchError(
            f"{', '.join(alive)} of this run: queued or running as Slurm jobs; `cancel` them "
            "first, or let them do it"
        )
