"""What the job of a stage does: claim it, check the nodes, start the ranks, decide what follows.

    sbatch slurm/stage1.sh [CONFIG] [key.path=value ...]     # its job runs python -m launch.stage

Ends with 0 when the stage is done, with 2 and 65 when the user must change something. Else the job
goes back into the queue under its own id, so that jobs that wait for it go on waiting, up to
LECTERN_MAX_FAILURES starts in a row that made no newer checkpoint. docs/slurm.md has the table.
"""

import argparse
import os
import time
from pathlib import Path

from data_tools.errors import EXIT_DEFECT, EXIT_DONE, EXIT_USER, run_command
from launch import slurm
from launch.allocation import Allocation, from_environment
from launch.preflight.run import run_preflight
from launch.starts import STOP_FILE, StartRecord, count_failures, newest_step, read_starts
from launch.step import (
    JobSignals,
    find_ending,
    first_failure,
    put_back,
    rank_command,
    run_step,
    say,
    step_id,
)
from launch.verdict import MAX_FAILURES, Ended, Verdict, decide
from launch.watchdog import Hang, Watchdog, report
from train.config import Config, load_config
from train.ownership import START_VARIABLE, check_owner, claim, new_start
from train.status import read_status


class StageJob:
    """One start of a stage as a job.

    Args:
        config: of the stage.
        arguments: its YAML and the overrides, as they were typed.
        allocation: what the job was granted.

    Raises:
        LaunchError: if another start trains the stage.
    """

    def __init__(self, config: Config, arguments: list[str], allocation: Allocation) -> None:
        self._config, self._arguments, self._allocation = config, arguments, allocation
        self._stage = config.folder
        self._signals = JobSignals()
        self._start = new_start()
        self._folder = claim(self._stage, self._start)
        self._watchdog = Watchdog(self._folder)
        self._problem = ""
        self._bad_nodes: dict[str, str] = {}
        self._is_stopped = self._is_ending_told = False
        self._max_failures = int(os.environ.get("LECTERN_MAX_FAILURES") or MAX_FAILURES)
        job, step = allocation.job, newest_step(self._stage)
        self._before = read_starts(self._stage)
        self._num_failures = count_failures(self._before, job, step)
        self._record = StartRecord(
            self._start.name, job, allocation.restart, allocation.nodes, time.time(), step
        )
        self._record.write(self._stage)
        (self._stage / STOP_FILE).unlink(missing_ok=True)

    def run(self) -> int:
        """Run the stage; return the exit code of the job, if Slurm does not end it before."""
        with self._signals.caught():
            if self._num_failures >= self._max_failures:
                verdict = self._capped()
            else:
                verdict = self._check_nodes() or self._train()
            return self._conclude(verdict)

    def _capped(self) -> Verdict:
        """Return the verdict on a job whose starts died without a word, again and again."""
        reason = (
            f"{self._num_failures} starts failed without a newer checkpoint: given up. The last: "
            f"{self._before[-1].reason}"
        )
        return Verdict("stop", EXIT_DEFECT, True, reason)

    def _check_nodes(self) -> Verdict | None:
        """Run the preflight; return what to do if the ranks must not start on these nodes.

        With LECTERN_MIN_NODES, spare nodes make up for bad ones.
        """
        if os.environ.get("LECTERN_PREFLIGHT") == "off":
            return None

        config, *overrides = self._arguments
        found = run_preflight(config, overrides, self._allocation, self._folder)
        for line in found.verdicts:
            say(f"{line}")
        if found.exit_code == EXIT_DONE:
            return None
        if found.exit_code == EXIT_USER:
            return self._decide(EXIT_USER)
        self._bad_nodes = found.bad_nodes
        healthy = self._allocation.on(
            [n for n in self._allocation.nodes if n not in found.bad_nodes]
        )
        enough = int(os.environ.get("LECTERN_MIN_NODES") or len(self._allocation.nodes))
        if found.bad_nodes and len(healthy.nodes) >= enough:
            say(f"going on without {', '.join(found.bad_nodes)}")
            self._allocation = healthy
            return None
        bad = "; ".join(f"{node}: {reason}" for node, reason in found.bad_nodes.items())
        self._problem = f"bad nodes: {bad}" if bad else ""
        return self._decide(found.exit_code)

    def _train(self) -> Verdict:
        """Start one task a rank and watch them to their end."""
        allocation = self._allocation
        say(f"{allocation}")
        command = [allocation.container.python, "train/main.py", "--config", *self._arguments]
        code = run_step(
            allocation.step(rank_command(command, self._folder)),
            self._signals,
            environment={
                START_VARIABLE: self._start.name,
                "MASTER_ADDR": allocation.master_addr,
                "MASTER_PORT": str(allocation.master_port),
            },
            look=self._look,
        )
        return self._decide(first_failure(self._folder) or code)

    def _look(self) -> None:
        """Look after the ranks while they run."""
        if self._signals.is_ending and not self._is_ending_told:
            self._is_ending_told = True
            # Written now: KILL may come before the ranks have saved.
            self._record.finish(self._stage, None, "leave", False, "Slurm ended it")
        if not self._is_stopped and (self._stage / STOP_FILE).exists():
            self._is_stopped = self._signals.must_save = True
            say(f"{self._stage / STOP_FILE}: the ranks save, then this job ends")
        hang = None if self._problem else self._watchdog.look()
        if hang is not None:
            self._end_hang(hang)

    def _end_hang(self, hang: Hang) -> None:
        """Show the stacks of a run that hangs, and end its ranks."""
        self._problem = f"hang, {hang.first}"
        say("\n".join(report(hang, self._folder, lambda: self._signal_ranks("USR2"))))
        self._signal_ranks("KILL")

    def _signal_ranks(self, name: str) -> None:
        step = step_id(self._folder)
        try:
            if step is not None:
                slurm.cancel(step, f"--signal={name}")
        except slurm.SlurmError as error:
            say(f"{name} could not be sent to step {step} ({error})")

    def _decide(self, code: int) -> Verdict:
        ended = Ended(
            code=code,
            is_done=_is_done(self._stage),
            must_save=self._signals.must_save,
            ending=find_ending(self._allocation, self._signals),
            is_stopped=self._is_stopped,
            problem=self._problem,
        )
        return decide(ended, self._num_failures, self._max_failures)

    def _conclude(self, verdict: Verdict) -> int:
        """Record the verdict and carry it out."""
        check_owner(self._stage, self._start.name)  # a start that was replaced decides nothing
        self._record.finish(
            self._stage,
            verdict.exit_code,
            verdict.action,
            verdict.is_failure,
            verdict.reason,
            self._bad_nodes,
        )
        say(f"{verdict.action}: {verdict.reason}")
        if verdict.action in ("requeue", "leave"):
            return put_back(verdict.action == "requeue", sorted(self._bad_nodes))
        return verdict.exit_code


def _is_done(stage: Path) -> bool:
    return read_status(stage).get("state") == "done"


def main() -> int:
    """Run the job of a stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--default", required=True, help="the configuration if none is named")
    parser.add_argument("arguments", nargs="*", metavar="[CONFIG] key.path=value")
    options = parser.parse_args()
    arguments = options.arguments
    if not arguments or "=" in arguments[0]:
        arguments = [options.default, *arguments]
    config = load_config(arguments[0], arguments[1:])
    if _is_done(config.folder):
        say(f"{config.folder} is done already; a fresh run.dir trains again")
        return EXIT_DONE
    allocation = from_environment()
    if allocation.restart == 0:
        say(slurm.site_facts())
    return StageJob(config, arguments, allocation).run()


if __name__ == "__main__":
    run_command(main)
