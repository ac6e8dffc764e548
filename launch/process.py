"""Start a command in a process group of its own, and end the whole group with it.

A launcher such as deepspeed starts ranks that outlive it when only it is killed.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.errors import LaunchError
from train.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 30


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end, its output on our own.

    Raises:
        LaunchError: if it fails, with its exit code.
    """
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment or os.environ), start_new_session=True
    )
    try:
        code = process.wait()
    except BaseException:
        end_group(process)
        raise
    if code != 0:
        error = LaunchError(f"exit code {code} from: {' '.join(command)}")
        error.exit_code = code if 0 < code < 126 else 70
        raise error


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started: TERM, then KILL after a while."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def python(*arguments: str) -> list[str]:
    """Return the command that runs this interpreter."""
    return [sys.executable, *arguments]


def train_command(config: str, ranks: int | None, overrides: Sequence[str] = ()) -> list[str]:
    """Return the command that trains a stage on this machine through deepspeed's launcher.

    Args:
        config: path of the stage's YAML.
        ranks: processes to start; None leaves it to deepspeed (one a GPU, one on a CPU machine).
        overrides: `key.path=value`.
    """
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet"]
    launcher += ["--master_port", str(free_port())]
    count = [] if ranks is None else ["--num_gpus", str(ranks)]
    return [*launcher, *count, "train/main.py", "--config", config, *overrides]
