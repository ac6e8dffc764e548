"""RUN/pipeline.json: which jobs were submitted for a run, and the lock of who changes that.

The file is replaced after every sbatch, so that a pipeline that is interrupted knows its jobs.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.errors import LaunchError
from launch.pipeline.plan import Job, Plan
from launch.process import ROOT
from train.status import write_json

RECORD_FILE = "pipeline.json"
LOCK_FILE = "pipeline.lock"
VERSION = 1


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted.

    Attributes:
        job_id: of Slurm.
        job_name: unique to run and step.
        script: that sbatch got.
        arguments: of the script.
        options: of sbatch.
        after: ids that it waits for.
        time: of the submission, in seconds since 1970.
        git: revision of the clone then; "" where it was found by its name later.
        earlier: ids of the same step before.
    """

    job_id: str
    job_name: str
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    after: tuple[str, ...] = ()
    time: float = 0.0
    git: str = ""
    earlier: tuple[str, ...] = ()


@dataclass
class Record:
    """The content of RUN/pipeline.json."""

    run: Path
    config: str = ""
    jobs: dict[str, Submitted] = field(default_factory=dict)

    def add(self, name: str, submitted: Submitted) -> None:
        """Note a submission and write the file."""
        self.jobs[name] = submitted
        self.write()

    def write(self) -> None:
        """Replace RUN/pipeline.json."""
        content = {
            "version": VERSION,
            "run": str(self.run),
            "config": self.config,
            "jobs": {name: asdict(job) for name, job in self.jobs.items()},
        }
        self.run.mkdir(parents=True, exist_ok=True)
        write_json(self.run / RECORD_FILE, content, is_durable=True)


def read_record(run: Path) -> Record:
    """Return what was submitted for a run; empty if nothing was.

    Raises:
        LaunchError: if the file is damaged or of another version.
    """
    path = run / RECORD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, expected {VERSION}")
        jobs = {name: _submitted(entry) for name, entry in content["jobs"].items()}
    except FileNotFoundError:
        return Record(run)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LaunchError(
            f"{path} cannot be read ({error}); move it away: jobs that are queued or running are "
            "found by their names"
        ) from None
    return Record(run, content["config"], jobs)


def _submitted(entry: dict[str, Any]) -> Submitted:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
    }
    return Submitted(**values)


def job_name(run: Path, step: str) -> str:
    """Return the name of a step's job, unique to the run folder: `stage1-invoices-3fa9c1`.

    The step comes first: squeue shows eight characters.
    """
    path = str(run.resolve())
    digest = hashlib.sha256(path.encode("utf-8")).hexdigest()[:6]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.resolve().name)[:40]
    return f"{step}-{name}-{digest}"


def log_pattern(job: Job) -> str:
    """Return where a job's output goes, in sbatch's words; the folder lies in the clone."""
    return "logs/%x-%A_%a.out" if job.is_array else "logs/%x-%j.out"


def log_name(job: Job, submitted: Submitted) -> str:
    """Return a submitted job's log file, `*` for the tasks of an array."""
    name = log_pattern(job).replace("%x", submitted.job_name)
    return name.replace("%A_%a", f"{submitted.job_id}_*").replace("%j", submitted.job_id)


def has_changed(job: Job, submitted: Submitted) -> bool:
    """Whether a step would be submitted with other arguments, or further options, now."""
    is_same = (job.script, job.arguments) == (submitted.script, submitted.arguments)
    return not is_same or not set(job.options) <= set(submitted.options)


@contextmanager
def hold_lock(plan: Plan) -> Iterator[None]:
    """Let one process at a time change a run's jobs; the system frees the lock of a dead one.

    Raises:
        LaunchError: if another one is at it; the message names its host, process and job.
    """
    plan.run.mkdir(parents=True, exist_ok=True)
    path = plan.run / LOCK_FILE
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"another pipeline command is at work on this run{_holder(path)}: wait for it, or "
                f"end it; its lock is {path}"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{path} cannot be locked ({error}); make sure of it yourself", file=sys.stderr)
        file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        json.dump(holder | {"time": round(time.time())}, file)
        file.flush()
        yield


def _holder(path: Path) -> str:
    """Return who holds a lock, for a message; "" if that is not written yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        job = f", job {holder['job']}" if holder.get("job") else ""
        return f" (process {holder['pid']} on {holder['host']}{job})"
    except (OSError, ValueError, KeyError):
        return ""


@cache
def git_revision() -> str:
    """Return the clone's revision, `+` behind it if files have changed; "" without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()
