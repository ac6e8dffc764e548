"""The whole schedule of a run: shards, stage 1, stage 2, their exports, the report.

    python -m launch.pipeline configs/pipeline.yaml --dry-run     # the commands and scripts
    python -m launch.pipeline configs/pipeline.yaml               # submit the jobs
    python -m launch.pipeline configs/pipeline.yaml status        # step, loss, speed, remaining
    python -m launch.pipeline configs/pipeline.yaml resume        # submit what is missing
    python -m launch.pipeline configs/pipeline.yaml cancel        # a stage saves before it ends
    python -m launch.pipeline configs/quickstart/pipeline.yaml --local --ranks 2    # without Slurm

Paths in the YAML are relative to the clone. What is done is skipped; typed twice, nothing is
submitted twice. slurm/site.sh is read by the command itself; `sbatch:` in the YAML wins over it.
"""

import argparse
import os
import sys

from data_tools.errors import EXIT_DONE, ConfigError, LaunchError, run_command
from launch.pipeline.local import run_here, show_commands_here
from launch.pipeline.plan import load_plan
from launch.pipeline.status import as_json, chain_status, table
from launch.pipeline.submit import cancel_chain, show_commands, submit_chain
from launch.process import ROOT
from launch.slurm import is_available

VERBS = ("submit", "status", "cancel", "resume")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    Raises:
        ConfigError: if options contradict each other or a configuration is wrong.
        LaunchError: if jobs are wanted and Slurm is not there, or a job has failed.
    """
    options = _parse(arguments)
    config = os.path.abspath(options.config)
    os.chdir(ROOT)
    plan = load_plan(config, options.set)
    if options.verb == "status":
        rows, missing = chain_status(plan)
        print((as_json(plan, rows, missing) if options.json else table(rows, missing)), end="")
        return EXIT_DONE
    if options.local:
        here = show_commands_here if options.dry_run else run_here
        return here(plan, options.ranks)
    if options.dry_run:
        return show_commands(plan)
    if not is_available():
        raise LaunchError(
            "sbatch, squeue and scontrol are not in PATH: call this on a login node, or run the "
            "chain on this machine with --local"
        )
    if options.verb == "cancel":
        return cancel_chain(plan)
    print(f"run {plan.run}", file=sys.stderr)
    is_resume = options.verb == "resume"
    return submit_chain(plan, config, is_resume=is_resume, after=options.after)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="pipeline.yaml")
    parser.add_argument("verb", nargs="?", choices=VERBS, default="submit")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument("--local", action="store_true", help="run the chain on this machine")
    parser.add_argument("--ranks", type=int, help="with --local; default: one a GPU")
    parser.add_argument("--json", action="store_true", help="of status")
    parser.add_argument(
        "--after", action="append", default=[], metavar="JOBID", help="that must complete first"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.ranks is not None and (not options.local or options.ranks < 1):
        raise ConfigError("--ranks belongs to --local, and must be at least 1")
    if options.json and options.verb != "status":
        raise ConfigError("--json belongs to status")
    if options.local and (options.verb == "cancel" or options.after):
        raise ConfigError("--local: end the command itself (Ctrl-C) instead; it has no --after")
    if options.dry_run and options.verb in ("status", "cancel"):
        raise ConfigError(f"--dry-run belongs to submit and resume, not to {options.verb}")
    return options


if __name__ == "__main__":
    run_command(main)
