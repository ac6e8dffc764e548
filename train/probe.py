"""Is this fit to train on: the device, its kernels, and the way to the other ranks. JSON out.

    python -m train.probe                                     # one process
    torchrun --nproc-per-node 8 -m train.probe                # one node
    srun --ntasks-per-node=8 python -m train.probe --timeout 60 --json 'probe-{rank}.json'

Every rank reports its device, a matrix product against the same in float64 on the CPU, the
attention kernels that training would use against plain SDPA in values and gradients, and sums over
all ranks: small ones for their latency, large ones for their bandwidth. Who does not arrive is
named. The file is rewritten with every phase, so that it also tells where a rank hangs.

Exit codes: 0 fit; 2 wrong options; 70 this rank's device or kernels are wrong; 71 ranks are
missing, or an exchange between them failed or took too long.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data_tools.errors import EXIT_DEFECT, EXIT_DONE, ConfigError, run_command
from train.ranks import Ranks, export_ranks, find_ranks
from train.status import write_json

EXIT_ALONE = 71
DEFAULT_TIMEOUT_S = 60.0
ARRIVAL_SHARE = 0.7  # of the time that is left, after which who is not there is named
# srun ends all ranks when the first one fails: until then the others must have said what they miss.
LINGER_S = 2.0
OWN_PHASES = ("start", "device", "kernels")  # a failure in them is this rank's own


@dataclass
class Result:
    """What a rank found, as it is written.

    Attributes:
        rank: of the process.
        node: name of its host.
        phase: what it was doing last: "start", "device", "kernels", "arrival", "all-reduce" or
            "done".
        state: "busy", "fit", "wrong" (its device or kernels) or "alone" (without the others).
        problem: what is the matter; "" if nothing.
        missing: ranks that did not arrive.
        device: what it is.
        kernels: name -> largest errors, by part.
        all_reduce: latency_us, algbw_gb_s and busbw_gb_s; empty without other ranks.
    """

    rank: int
    node: str = field(
        default_factory=lambda: os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    )
    phase: str = "start"
    state: str = "busy"
    problem: str = ""
    missing: list[int] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    all_reduce: dict[str, float] = field(default_factory=dict)


class Watch:
    """Writes the result with every phase, and ends the process when the time is over.

    A hang is in native code: only a thread of its own still runs then.

    Args:
        result: to be written.
        path: of the file; None writes the result to stdout, at the end.
        timeout_s: for everything.
    """

    def __init__(self, result: Result, path: Path | None, timeout_s: float) -> None:
        self.result, self._path, self.timeout_s = result, path, timeout_s
        self.deadline = time.monotonic() + timeout_s
        self._timer = threading.Timer(timeout_s, self._stop)
        self._timer.daemon = True

    def __enter__(self) -> "Watch":
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()

    def left_s(self) -> float:
        """Return the seconds that are left; a little even when there are none."""
        return max(0.1, self.deadline - time.monotonic())

    def enter(self, phase: str) -> None:
        """Say what comes now."""
        self.result.phase = phase
        if self._path is not None:
            self._write()

    def fail(self, problem: str, missing: list[int] | None = None) -> int:
        """Say what is the matter in this phase; return the exit code."""
        is_own = self.result.phase in OWN_PHASES
        self.result.state = "wrong" if is_own else "alone"
        self.result.problem, self.result.missing = problem, missing or []
        self._write()
        return EXIT_DEFECT if is_own else EXIT_ALONE

    def succeed(self) -> None:
        """Say that everything is as it has to be."""
        self.result.phase, self.result.state = "done", "fit"
        self._write()

    def _write(self) -> None:
        if self._path is None:
            print(json.dumps(asdict(self.result)), flush=True)
        else:
            write_json(self._path, asdict(self.result))

    def _stop(self) -> None:
        code = self.fail(f"{self.result.phase}: not done within {self.timeout_s:g} s")
        os._exit(code)


def probe(ranks: Ranks, watch: Watch) -> int:
    """Go through all phases; return the exit code."""
    result = watch.result
    try:
        watch.enter("device")
        from train import exchange, kernel_checks

        device = kernel_checks.find_device(ranks.local_rank)
        result.device = kernel_checks.describe(device)
        watch.enter("kernels")
        result.kernels = kernel_checks.check_kernels(device)
        if problem := kernel_checks.judge(result.kernels):
            return watch.fail(problem)
        if ranks.world_size > 1:
            watch.enter("arrival")
            store, missing = exchange.arrive(ranks, ARRIVAL_SHARE * watch.left_s())
            if missing:
                names = ", ".join(map(str, missing))
                return watch.fail(f"ranks that did not arrive: {names}", missing)
            watch.enter("all-reduce")
            result.all_reduce = exchange.all_reduce(ranks, device, store, watch.left_s())
            exchange.leave(ranks, store)
    except Exception as error:  # a driver or a library that fails is a finding, too
        traceback.print_exc()
        return watch.fail(f"{result.phase}: {type(error).__name__}: {error}")
    watch.succeed()
    return EXIT_DONE


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: if the time is not above 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="S", help="for everything"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="for the result, {rank} in it replaced; default: stdout"
    )
    options = parser.parse_args(arguments)
    if options.timeout <= 0:
        raise ConfigError(f"--timeout {options.timeout:g}: expected seconds above 0")
    return options


def main() -> int:
    """Probe this rank; return the exit code."""
    options = parse_arguments()
    ranks = find_ranks()
    export_ranks(ranks, os.environ)
    path = None
    if options.json is not None:
        path = Path(options.json.replace("{rank}", f"{ranks.rank:05d}"))
    with Watch(Result(ranks.rank), path, options.timeout) as watch:
        code = probe(ranks, watch)
    if code == EXIT_ALONE:
        time.sleep(LINGER_S)
    sys.stdout.flush()
    # Without the clean-up of a process group in which somebody may be missing.
    os._exit(code)


if __name__ == "__main__":
    run_command(main)
