"""Who trains a stage: one start at a time, and an old one that still runs writes nothing more.

RUN/stageN/owner.json names the start that may write. A second submission is refused while the owner
lives. Ranks on a node that lost its network live on while their job is already running again
elsewhere: every start writes into RUN/stageN/starts/NAME of its own, and looks at owner.json before
it writes anything that starts share. Imports no torch.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.errors import LaunchError
from train.status import write_json

OWNER_FILE = "owner.json"
STARTS_FOLDER = "starts"
START_VARIABLE = "LECTERN_START"  # the name of the start that the job script's process has made
HEARTBEAT_COUNTS_S = 60.0  # a start on another host counts as alive for so long
ENDING_PATIENCE_S = 120.0  # for a job that is being ended just now
# What is in none of these states may come back: Slurm also has SIGNALING, RESIZING, SPECIAL_EXIT.
_ENDED_STATES = (
    "gone",
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
_POLL_S = 1.0


@dataclass(frozen=True)
class Start:
    """One start of a stage.

    Attributes:
        name: unique and, sorted, in the order of time.
        job: id of the Slurm job; None by hand.
        restart: how often the job was requeued before.
        host: of the process that made it.
        pid: of that process.
        ticks: when that process began, in clock ticks since its host's boot; None where unknown.
    """

    name: str
    job: str | None
    restart: int
    host: str
    pid: int
    ticks: int | None

    @property
    def what(self) -> str:
        """What messages call it."""
        if self.job is None:
            return f"process {self.pid} on {self.host}"
        return f"job {self.job}" + (f" (restart {self.restart})" if self.restart else "")


def new_start(env: Mapping[str, str] | None = None) -> Start:
    """Return a new start of this process.

    The name holds the time as well, since a controller that was killed gives a job's id to another.
    """
    env = os.environ if env is None else env
    job, restart = env.get("SLURM_JOB_ID"), int(env.get("SLURM_RESTART_COUNT") or 0)
    host, pid = socket.gethostname(), os.getpid()
    suffix = f"{job}.{restart}" if job else f"{host}.{pid}"
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{suffix}"
    return Start(name, job, restart, host, pid, process_ticks(pid))


def read_owner(stage: Path) -> Start | None:
    """Return the start that may write into RUN/stageN; None if there has been none."""
    try:
        return Start(**json.loads((stage / OWNER_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise LaunchError(
            f"{stage / OWNER_FILE} is no record of a start ({error}); delete it if nothing trains "
            "this stage"
        ) from None


def claim(stage: Path, start: Start) -> Path:
    """Make a start the owner of RUN/stageN and return its folder.

    Raises:
        LaunchError: if another start is alive, with the job's id or the process.
    """
    stage.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + ENDING_PATIENCE_S
    while (owner := read_owner(stage)) is not None and owner.name != start.name:
        life = sign_of_life(stage, owner, start)
        if life is None:
            break
        if life != "COMPLETING" or time.monotonic() > deadline:
            raise LaunchError(
                f"{stage} is being trained by {owner.what} already ({life}): nothing was started. "
                f"`touch {stage}/STOP` lets it save and stop, `scancel` ends a job; if it is gone "
                f"for certain, delete {stage / OWNER_FILE}"
            )
        time.sleep(_POLL_S)
    folder = start_folder(stage, start.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stage / OWNER_FILE, asdict(start), is_durable=True)
    return folder


def start_folder(stage: Path, name: str) -> Path:
    """Return the folder of a start: RUN/stageN/starts/NAME."""
    return stage / STARTS_FOLDER / name


def check_owner(stage: Path, name: str) -> None:
    """Let nothing be written by a start that is no longer the owner.

    Raises:
        LaunchError: if another start has taken over.
    """
    owner = read_owner(stage)
    if owner is not None and owner.name != name:
        raise LaunchError(
            f"{stage} was taken over by {owner.what}; this start ({name}) stops and writes nothing "
            "more"
        )


def sign_of_life(stage: Path, owner: Start, mine: Start) -> str | None:
    """Return how an owner is known to live, None if it is gone.

    A job is looked up in Slurm, a process on this host in /proc; what is elsewhere lives while its
    ranks' heartbeats are fresh.
    """
    if owner.job is not None:
        if owner.job == mine.job:
            return None  # Slurm ends a start before the next one of a job
        state = _job_state(owner.job)
        if state is not None:
            return None if state in _ENDED_STATES else state
    if owner.host == mine.host and owner.pid == mine.pid:
        return None  # the same process, once more
    if owner.host == mine.host:
        is_same = process_ticks(owner.pid) == owner.ticks and _is_running(owner.pid)
        return "it runs" if is_same else None
    beats = start_folder(stage, owner.name).glob("rank-*.json")
    age_s = min((time.time() - path.stat().st_mtime for path in beats), default=float("inf"))
    return f"its last sign is {age_s:.0f} s old" if age_s < HEARTBEAT_COUNTS_S else None


def process_ticks(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None if it is gone or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22, proc(5)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _job_state(job: str) -> str | None:
    """Return a job's state, "gone" if Slurm knows it no more, None where Slurm cannot be asked."""
    if shutil.which("scontrol") is None:
        return None
    command = ["scontrol", "-o", "show", "job", job]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None
    if "Invalid job id" in result.stderr:
        return "gone"
    found = re.search(r"\bJobState=(\S+)", result.stdout)
    return found.group(1) if found else None
