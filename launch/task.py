"""Run any other command as a job: warned of its end it may save, and is queued again on code 75.

    python -m launch.task COMMAND ARGUMENT ...      # what slurm/convert.sh and the like end with

One task on the first node, with all of its GPUs and cores, in the container that the site names.
The command's exit code is the job's. It must be one that goes on where it was interrupted.
"""

import sys

from data_tools.errors import EXIT_AGAIN, LaunchError, run_command
from launch.allocation import from_environment
from launch.step import JobSignals, find_ending, put_back, run_step, say
from launch.verdict import Ended, decide


def run_task(command: list[str]) -> int:
    """Run a command as this job's only step; return the exit code of the job.

    Args:
        command: its first word is replaced by the container's Python if it is ours.
    """
    allocation = from_environment()
    if command[0] == sys.executable:
        command = [allocation.container.python, *command[1:]]
    node = allocation.on(allocation.nodes[:1])
    with JobSignals().caught() as signals:
        code = run_step(node.step(command, per_node=1), signals)
        ending = find_ending(allocation, signals)
        if code != EXIT_AGAIN and not ending:
            return code
        verdict = decide(Ended(EXIT_AGAIN, ending=ending), num_failures=0, max_failures=1)
        say(f"{verdict.action}: {verdict.reason}")
        return put_back(verdict.action == "requeue")


def main() -> int:
    """Run the command that stands behind the module's name."""
    if len(sys.argv) < 2:
        raise LaunchError("which command? python -m launch.task COMMAND ARGUMENT ...")
    return run_task(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
