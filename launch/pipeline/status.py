"""The chain of a run as a table: state, place, step, loss, speed, remaining time, restarts.

What Slurm says and what the run's files say are put together; without Slurm the files alone.
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import EXIT_AGAIN
from launch.pipeline.jobs import UNKNOWN, Known, View, find_jobs
from launch.pipeline.plan import Job, Plan
from launch.pipeline.record import log_name, read_record
from launch.slurm import SlurmError, is_available
from train.status import read_status

NUM_LINES = 200  # of log.jsonl that the speed is taken from
COLUMNS = ("job", "state", "id", "nodes", "step", "loss", "tokens/s", "left", "restarts", "why")


@dataclass(frozen=True)
class Row:
    """One step of the chain.

    Attributes:
        step: of the chain.
        state: done; "stopped" if it was told to save and end; Slurm's word while it knows the job,
            else what the files say; "-" for nothing.
        job_id: of Slurm; "" for none.
        nodes: where it runs.
        train_step: optimizer steps done; None where nothing is trained.
        total_steps: of the stage, as estimated.
        loss: of the last log line.
        tokens_per_s: likewise.
        remaining_s: at the median speed of the last log lines, from the last status on.
        restarts: how often the job or the training started again.
        reason: why it waits, or how it ended.
        log: log file in the clone.
    """

    step: str
    state: str
    job_id: str = ""
    nodes: str = ""
    train_step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    remaining_s: float | None = None
    restarts: int | None = None
    reason: str = ""
    log: str = ""


def chain_status(plan: Plan) -> tuple[list[Row], str]:
    """Return the rows of a run, and why Slurm's side is missing ("" if it is not)."""
    record, missing = read_record(plan.run), ""
    known = {job.name: Known(job.is_done(), record.jobs.get(job.name)) for job in plan.jobs}
    if is_available():
        try:
            known = find_jobs(plan, record)
        except SlurmError as error:
            missing = str(error)
    else:
        missing = "Slurm is not on this machine"
    return [_row(job, known[job.name]) for job in plan.jobs], missing


def _row(job: Job, known: Known) -> Row:
    status = read_status(job.stage_dir) if job.is_stage and job.stage_dir else {}
    view = known.view
    state, reason = state_of(known, str(status.get("state", "")), str(status.get("error", "")))
    restarts = status.get("restarts") if view is None or view.state == UNKNOWN else view.restarts
    log = log_name(job, known.submitted) if known.submitted and known.submitted.job_id else ""
    row = Row(
        step=job.name,
        state=state,
        job_id=view.job_id if view else known.submitted.job_id if known.submitted else "",
        nodes=view.nodes if view else str(status.get("host", "")),
        restarts=restarts,
        reason=reason,
        log=log,
    )
    return _with_progress(row, status, job.stage_dir) if status and job.stage_dir else row


def _with_progress(row: Row, status: Mapping[str, Any], folder: Path) -> Row:
    step, total = status.get("step"), status.get("total_steps")
    remaining_s = None
    if row.state != "done" and step is not None and total is not None:
        step_s = seconds_per_step(_last_lines(folder / "log.jsonl"))
        remaining_s = None if step_s is None else round(max(0, total - step) * step_s, 1)
    return Row(
        **asdict(row)
        | {
            "train_step": step,
            "total_steps": total,
            "loss": status.get("loss"),
            "tokens_per_s": status.get("tokens_per_s"),
            "remaining_s": remaining_s,
        }
    )


def state_of(known: Known, file_state: str, error: str) -> tuple[str, str]:
    """Return (state, reason) of a step.

    Args:
        known: of the step.
        file_state: of status.json; "" where there is none.
        error: of status.json.
    """
    view = known.view
    if known.is_done:
        return "done", ""
    if view is not None and view.state != UNKNOWN:
        if view.state == "FAILED" and view.exit_code == EXIT_AGAIN:
            return "stopped", "`resume` goes on"
        counts = ", ".join(f"{number} {state}" for state, number in view.counts)
        return view.state, counts or _reason(view, error)
    if file_state and file_state != "running":
        return file_state, error
    if known.submitted is not None and known.submitted.job_id and view is not None:
        return "ended", "Slurm no longer knows the job"
    return file_state or "-", ""


def _reason(view: View, error: str) -> str:
    if view.is_alive:
        is_held = "held" in view.reason.lower()  # also by a controller that started it twice
        return f"{view.reason}: `scontrol release {view.job_id}`" if is_held else view.reason
    code = f"exit code {view.exit_code}" if view.exit_code else ""
    return "; ".join(part for part in (code, error) if part)


def seconds_per_step(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median duration of a step from lines of log.jsonl; None from fewer than two.

    The median passes over the pauses of evaluations, checkpoints and restarts.
    """
    points = [(r["step"], r["time"]) for r in records if "train/loss" in r]
    durations = [
        (time_b - time_a) / (step_b - step_a)
        for (step_a, time_a), (step_b, time_b) in zip(points, points[1:], strict=False)
        if step_b > step_a and time_b >= time_a
    ]
    return statistics.median(durations) if durations else None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """Return the last records of a JSONL file that may be being written to."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = deque(file, maxlen=NUM_LINES)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def table(rows: Sequence[Row], missing: str) -> str:
    """Return the rows for people, and where to read on about what runs or has failed."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines += [
        f"log of {row.step}: {row.log}"
        for row in rows
        if row.log and row.nodes and row.state != "done"
    ]
    if missing:
        lines.append(f"(from the run's files alone: {missing.splitlines()[0]})")
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    progress = "" if row.train_step is None else f"{row.train_step}/{row.total_steps}"
    return (
        row.step,
        row.state,
        row.job_id,
        row.nodes,
        progress,
        "" if row.loss is None else f"{row.loss:.4f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}",
        "" if row.remaining_s is None else duration(row.remaining_s),
        "" if row.restarts is None else str(row.restarts),
        row.reason,
    )


def duration(seconds: float) -> str:
    """Return seconds as 2d 03:04 or 03:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}" if days else f"{hours:02}:{minutes:02}:{rest:02}"


def as_json(plan: Plan, rows: Sequence[Row], missing: str) -> str:
    """Return the rows for machines."""
    content = {"run": str(plan.run), "time": round(time.time(), 3), "slurm": missing or "ok"}
    return json.dumps(content | {"steps": [asdict(row) for row in rows]}, indent=2) + "\n"
