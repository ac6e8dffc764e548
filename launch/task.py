"""Run any other command as a job: warned of its end it may save, interrupted it is queued again.

    python -m launch.task COMMAND ARGUMENT ...      # what slurm/convert.sh and the like end with

One task on the first node, with all of its GPUs and cores, in the container that the site names.
The command's exit code is the job's, but for 75 (saved, start me again) and for what Slurm ends:
then the job goes back into the queue. A command that does not save and reaches its time limit is
started LECTERN_MAX_FAILURES times.
"""

import signal
import sys

from data_tools.errors import EXIT_AGAIN, EXIT_DONE, LaunchError, run_command
from launch.allocation import Allocation, from_environment
from launch.step import (
    STOPPED_EARLY,
    JobSignals,
    find_ending,
    job_id,
    put_back,
    read_count,
    requeue,
    run_step,
    say,
)
from launch.verdict import MAX_FAILURES, Ended, Ending, Verdict, decide


def run_task(command: list[str]) -> int:
    """Run a command as this job's only step; return the exit code of the job.

    Args:
        command: its first word is replaced by the container's Python if it is ours.
    """
    allocation = from_environment()
    if command[0] == sys.executable:
        command = [allocation.container.python, *command[1:]]
    node = allocation.on(allocation.nodes[:1])
    read_count("LECTERN_MAX_FAILURES", MAX_FAILURES)  # said before there is anything to lose
    with JobSignals().caught() as signals:
        at_limit = _AtTheLimit(allocation, signals)
        code = run_step(node.step(command, per_node=1), signals, look=at_limit.look)
        if code == EXIT_DONE:
            return code
        ending = "time limit" if at_limit.is_queued else find_ending(allocation, signals)
        if not ending and code not in (EXIT_AGAIN, *STOPPED_EARLY):
            return code
        verdict = judge(code, ending, allocation.restart)
        say(f"{verdict.action}: {verdict.reason}")
        if verdict.action == "stop":
            return verdict.exit_code
        return put_back(verdict.action == "requeue")


class _AtTheLimit:
    """Queues a job again at its time limit: KILL may come before the command has ended."""

    def __init__(self, allocation: Allocation, signals: JobSignals) -> None:
        self._allocation, self._signals = allocation, signals
        self._is_told = False
        self.is_queued = False

    def look(self) -> None:
        """Queue the job again once Slurm has told it of its end."""
        if not self._signals.is_ending or self._is_told:
            return
        self._is_told = True
        ending = find_ending(self._allocation, self._signals)
        if not ending:  # somebody has sent TERM to the batch process alone
            self._signals.must_save = True
        if ending == "time limit":
            verdict = judge(128 + signal.SIGKILL, ending, self._allocation.restart)
            self.is_queued = verdict.action == "requeue" and requeue(job_id())


def judge(code: int, ending: Ending, restart: int) -> Verdict:
    """Return what becomes of a job whose command was interrupted.

    Args:
        code: of the command.
        ending: what Slurm does to the job.
        restart: how often it was requeued before.
    """
    if ending == "time limit" and code != EXIT_AGAIN:
        problem = "the time limit came before the end; ask for more with sbatch --time"
        max_failures = read_count("LECTERN_MAX_FAILURES", MAX_FAILURES)
        return decide(Ended(code, problem=problem), restart, max_failures)
    return decide(Ended(EXIT_AGAIN, ending=ending), num_failures=0, max_failures=1)


def main() -> int:
    """Run the command that stands behind the module's name."""
    if len(sys.argv) < 2:
        raise LaunchError("which command? python -m launch.task COMMAND ARGUMENT ...")
    return run_task(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
