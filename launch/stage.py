"""What the job of a stage does: claim it, check the nodes, start the ranks, decide what follows.

    sbatch slurm/stage1.sh [CONFIG] [key.path=value ...]     # its job runs python -m launch.stage

Ends with 0 when the stage is done, with 2 and 65 when the user must change something. Else the job
goes back into the queue under its own id, so that jobs that wait for it go on waiting, up to
LECTERN_MAX_FAILURES starts in a row that made no newer checkpoint. docs/slurm.md has the table.
"""

import argparse
import os
import re
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from data_tools.errors import (
    EXIT_AGAIN,
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_USER,
    LaunchError,
    run_command,
)
from launch import slurm
from launch.allocation import Allocation, from_environment
from launch.preflight.run import run_preflight
from launch.starts import STOP_FILE, StartRecord, count_failures, newest_step, read_starts
from launch.step import (
    JobSignals,
    find_ending,
    first_failure,
    job_id,
    put_back,
    rank_command,
    read_count,
    requeue,
    run_step,
    say,
    step_id,
)
from launch.verdict import MAX_FAILURES, Ended, Ending, Verdict, decide
from launch.watchdog import Hang, Watchdog, report
from train.config import Config, load_config
from train.ownership import START_VARIABLE, check_owner, claim, new_start
from train.status import read_status

KILL_PATIENCE_S = 60.0  # for ranks that hang to end, before srun itself is made to end them
START_FACTOR = 2  # times what a collective may take: until the last rank shows a sign of life
_SIGNALLED = re.compile(r"CANCELLED AT|Terminated|User defined signal")


class StageJob:
    """One start of a stage as a job.

    Args:
        config: of the stage.
        arguments: its YAML and the overrides, as they were typed.
        allocation: what the job was granted.
        signals: that the job has got so far, and gets.

    Raises:
        LaunchError: if another start trains the stage, or a setting of slurm/site.sh is wrong.
    """

    def __init__(
        self, config: Config, arguments: list[str], allocation: Allocation, signals: JobSignals
    ) -> None:
        self._config, self._arguments, self._allocation = config, arguments, allocation
        self._stage = config.folder
        self._signals = signals
        self._max_failures = read_count("LECTERN_MAX_FAILURES", MAX_FAILURES)
        self._min_nodes = read_count("LECTERN_MIN_NODES", len(allocation.nodes))
        self._start = new_start()
        self._folder = claim(self._stage, self._start)
        self._killed_s: float | None = None  # when the ranks were, because they hang
        self._problem = self._complaint = ""
        self._bad_nodes: dict[str, str] = {}
        self._is_stop_told = self._is_ending_told = self._is_queued = False
        job, step = allocation.job, newest_step(self._stage)
        self._before = read_starts(self._stage)
        self._num_failures = count_failures(self._before, job, step)
        self._record = StartRecord(
            self._start.name, job, allocation.restart, allocation.nodes, time.time(), step
        )
        self._record.write(self._stage)

    def run(self) -> int:
        """Run the stage; return the exit code of the job, if Slurm does not end it before."""
        say(f"{self._allocation}")
        if self._num_failures >= self._max_failures:
            return self._conclude(self._capped())
        verdict = self._warned() or self._check_nodes() or self._warned() or self._train()
        return self._conclude(verdict)

    def _capped(self) -> Verdict:
        """Return the verdict on a job whose starts died without a word, again and again."""
        reason = (
            f"{self._num_failures} starts failed without a newer checkpoint: given up. The last: "
            f"{self._before[-1].reason}"
        )
        return Verdict("stop", EXIT_DEFECT, True, reason)

    def _warned(self) -> Verdict | None:
        """Return what to do if the job was told to end before its ranks have started."""
        if self._signals.have_come or self._is_stopped():
            return self._decide(EXIT_AGAIN)
        return None

    def _check_nodes(self) -> Verdict | None:
        """Run the preflight; return what to do if the ranks must not start on these nodes.

        With LECTERN_MIN_NODES, spare nodes make up for bad ones.
        """
        if os.environ.get("LECTERN_PREFLIGHT") == "off":
            return None

        config, *overrides = self._arguments
        try:
            found = run_preflight(config, overrides, self._allocation, self._folder)
        except OSError as error:
            self._problem = f"the preflight could not be made ({error})"
            return self._decide(EXIT_DEFECT)
        for line in found.verdicts:
            say(f"{line}")
        if found.exit_code == EXIT_DONE:
            return None
        if found.exit_code == EXIT_USER:
            return self._decide(EXIT_USER)
        was_signalled = any(map(_SIGNALLED.search, found.bad_nodes.values()))
        if was_signalled or self._signals.have_come or find_ending(self._allocation, self._signals):
            return self._decide(EXIT_AGAIN)  # no node is to blame for what Slurm ended
        healthy = self._allocation.on(
            [n for n in self._allocation.nodes if n not in found.bad_nodes]
        )
        if healthy.nodes or len(self._allocation.nodes) == 1:
            self._bad_nodes = found.bad_nodes  # what ails all nodes alike is not theirs
        if found.bad_nodes and len(healthy.nodes) >= self._min_nodes:
            self._allocation = healthy
            say(f"going on without {', '.join(found.bad_nodes)}: {healthy}")
            return None
        bad = "; ".join(f"{node}: {reason}" for node, reason in found.bad_nodes.items())
        self._problem = f"bad nodes: {bad}" if bad else ""
        return self._decide(found.exit_code)

    def _train(self) -> Verdict:
        """Start one task a rank and watch them to their end."""
        allocation = self._allocation
        command = [allocation.container.python, "train/main.py", "--config", *self._arguments]
        may_take_s = max(self._config.parallel.timeout_s, self._config.monitor.watchdog.min_s)
        watchdog = Watchdog(
            self._folder, start_s=START_FACTOR * may_take_s, num_ranks=allocation.num_ranks
        )
        code = run_step(
            allocation.step(rank_command(command, self._folder)),
            self._signals,
            environment={
                START_VARIABLE: self._start.name,
                "MASTER_ADDR": allocation.master_addr,
                "MASTER_PORT": str(allocation.master_port),
            },
            look=partial(self._look, watchdog),
        )
        return self._decide(first_failure(self._folder) or code)

    def _look(self, watchdog: Watchdog) -> int | None:
        """Look after the ranks while they run; return a signal that srun is to get."""
        if self._signals.is_ending and not self._is_ending_told:
            self._is_ending_told = True
            self._prepare_end()
        if not self._is_stop_told and self._is_stopped():
            self._is_stop_told = self._signals.must_save = True
            say(f"{self._stage / STOP_FILE}: the ranks save, then this job ends")
        if self._killed_s is not None:
            return self._force_end(time.monotonic() - self._killed_s)
        try:
            hang = watchdog.look()
            if hang is not None:  # the next start of this job has steps of the same numbers
                check_owner(self._stage, self._start.name)
        except OSError as error:
            hang = None
            self._complain(f"the ranks cannot be watched ({error})")
        if hang is not None:
            self._end_hang(hang)
        return None

    def _prepare_end(self) -> None:
        """Do now what KILL, which may come before the ranks have saved, would prevent.

        At a time limit Slurm itself would not queue the job again, and it takes a requeue while it
        waits for the processes to end. At the cap the ranks must save first.
        """
        ending = find_ending(self._allocation, self._signals)
        if not ending:  # somebody has sent TERM to the batch process alone
            self._signals.must_save = True
            return
        verdict = decide(self._ended(EXIT_AGAIN, ending), self._num_failures, self._max_failures)
        self._write_end(verdict)
        if ending == "time limit" and verdict.action == "requeue":
            self._is_queued = requeue(job_id())

    def _end_hang(self, hang: Hang) -> None:
        """Show the stacks of a run that hangs, and end its ranks."""
        self._problem = f"hang, {hang.first}"
        self._killed_s = time.monotonic()
        say("\n".join(report(hang, self._folder, lambda: self._signal_ranks("USR2"))))
        self._signal_ranks("KILL")

    def _force_end(self, waited_s: float) -> int | None:
        """Return what to send to srun where the controller, or the step's id, was not there."""
        if waited_s < KILL_PATIENCE_S:
            return None
        # To srun TERM means to kill the step; KILL leaves that to the end of the job.
        return signal.SIGTERM if waited_s < 2 * KILL_PATIENCE_S else signal.SIGKILL

    def _is_stopped(self) -> bool:
        try:
            return (self._stage / STOP_FILE).exists()
        except OSError as error:
            self._complain(f"{self._stage} cannot be read ({error})")
            return False

    def _complain(self, text: str) -> None:
        """Say what is wrong with the file system, once."""
        if text != self._complaint:
            self._complaint = text
            say(text)

    def _signal_ranks(self, name: str) -> None:
        step = step_id(self._folder)
        try:
            if step is not None:
                slurm.cancel(step, f"--signal={name}")
        except slurm.SlurmError as error:
            say(f"{name} could not be sent to step {step} ({error})")

    def _decide(self, code: int) -> Verdict:
        # Queued again by ourselves: what Slurm says now is no longer why.
        ending = "time limit" if self._is_queued else find_ending(self._allocation, self._signals)
        return decide(self._ended(code, ending), self._num_failures, self._max_failures)

    def _ended(self, code: int, ending: Ending) -> Ended:
        return Ended(
            code=code,
            is_done=_is_done(self._stage),
            must_save=self._signals.must_save,
            ending=ending,
            is_stopped=self._is_stopped(),
            problem=self._problem,
            has_progress=newest_step(self._stage) > self._record.step_before,
        )

    def _conclude(self, verdict: Verdict) -> int:
        """Record the verdict and carry it out."""
        try:
            check_owner(self._stage, self._start.name)  # a start that was replaced decides nothing
        except OSError as error:
            self._complain(f"{self._stage} cannot be read ({error})")
        self._write_end(verdict)
        say(f"{verdict.action}: {verdict.reason}")
        if verdict.action in ("requeue", "leave"):
            return put_back(verdict.action == "requeue", sorted(self._bad_nodes))
        with suppress(OSError):  # obeyed; the next job must not find it
            (self._stage / STOP_FILE).unlink(missing_ok=True)
        return verdict.exit_code

    def _write_end(self, verdict: Verdict) -> None:
        """Record how this start ended; a full disk must not keep the job from going on."""
        try:
            self._record.finish(
                self._stage,
                verdict.exit_code,
                verdict.action,
                verdict.is_failure,
                verdict.reason,
                self._bad_nodes,
            )
        except OSError as error:
            self._complain(f"the end of this start is not recorded ({error})")


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
    with JobSignals().caught() as signals:
        try:
            job = StageJob(config, arguments, allocation, signals)
        except OSError as error:
            raise LaunchError(
                f"{config.folder} cannot be written ({error}): mend that, then submit again"
            ) from error
        return job.run()


if __name__ == "__main__":
    run_command(main)
