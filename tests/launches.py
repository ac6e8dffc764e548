"""Start the real launchers in tests: each in its own process group, with a hard timeout."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from train.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def launcher(kind: str, ranks: int = 2) -> list[str]:
    """Return the command that starts `train/main.py` on some ranks."""
    script = "train/main.py"
    if kind == "python":
        return [sys.executable, script]
    if kind == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node", str(ranks), script]
    return [str(BIN / "deepspeed"), "--quiet", "--num_gpus", str(ranks), "--master_port",
            str(free_port()), script]  # fmt: skip


def environment() -> dict[str, str]:
    """Return a clean environment: no launcher's variables, one thread a rank, no GPU."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    extra = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: v for name, v in env.items() if not name.startswith("SLURM_")} | extra


def run(command: list[str], *, timeout_s: float, cwd: Path = ROOT) -> Outcome:
    """Run a command to its end; kill its whole group when it takes too long."""
    process = start(command, cwd=cwd)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        stdout, stderr = process.communicate()
        raise AssertionError(
            f"no end after {timeout_s} s: {' '.join(command)}\n{stdout}\n{stderr}"
        ) from None
    return Outcome(process.returncode, stdout, stderr)


def start(command: list[str], cwd: Path = ROOT) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_when(
    process: subprocess.Popen,
    condition: Callable[[], bool],
    timeout_s: float,
    delay_s: float = 0.0,
) -> None:
    """SIGKILL a process group as soon as a condition holds, or a while later."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_tree(process)
            stdout, stderr = process.communicate()
            raise AssertionError(f"the condition never held\n{stdout}\n{stderr}")
        time.sleep(0.02)
    time.sleep(delay_s)
    kill_tree(process)
    process.communicate()


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a launcher and all that it started; torchrun gives each rank a session of its own."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
