"""The starts of a stage, one folder each: when, where, from which step, how it ended and why."""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from train.ownership import STARTS_FOLDER
from train.status import write_json

RECORD_FILE = "start.json"
STOP_FILE = "STOP"  # a stage that finds it saves and ends without being requeued
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class StartRecord:
    """One start of a stage as a job.

    Attributes:
        name: of its folder.
        job: id.
        restart: how often the job was requeued before.
        nodes: names.
        began: seconds since 1970.
        step_before: of the newest checkpoint when it began, 0 without one.
        ended: seconds since 1970; None while it runs, and for ever if its node died.
        code: exit code of the ranks.
        action: what was made of it, see `launch.verdict`.
        is_failure: whether it counts against the cap.
        reason: for people.
        step_after: of the newest checkpoint when it ended.
        bad_nodes: node -> what the preflight found.
    """

    name: str
    job: str
    restart: int
    nodes: tuple[str, ...]
    began: float
    step_before: int
    ended: float | None = None
    code: int | None = None
    action: str | None = None
    is_failure: bool = True
    reason: str = "it ended without a word: its node died, or the job was killed"
    step_after: int | None = None
    bad_nodes: dict[str, str] | None = None

    def finish(
        self,
        stage: Path,
        code: int | None,
        action: str,
        is_failure: bool,
        reason: str,
        bad_nodes: dict[str, str] | None = None,
    ) -> None:
        """Write how it ended."""
        ended = replace(
            self,
            ended=round(time.time(), 3),
            code=code,
            action=action,
            is_failure=is_failure,
            reason=reason,
            step_after=newest_step(stage),
            bad_nodes=bad_nodes or None,
        )
        ended.write(stage)

    def write(self, stage: Path) -> None:
        """Write the record into its folder."""
        path = stage / STARTS_FOLDER / self.name / RECORD_FILE
        write_json(path, asdict(self), is_durable=True)


def read_starts(stage: Path) -> list[StartRecord]:
    """Return the starts of RUN/stageN as jobs, in the order of time.

    A record that cannot be read (of another version, lost in a power cut) is left out.
    """
    records = []
    for path in sorted(stage.glob(f"{STARTS_FOLDER}/*/{RECORD_FILE}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.append(StartRecord(**record | {"nodes": tuple(record["nodes"])}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            print(f"{path} is left out: {error}", file=sys.stderr, flush=True)
    return records


def count_failures(records: list[StartRecord], job: str, step: int) -> int:
    """Return how many starts of a job failed since the newest checkpoint, which is of `step`."""
    return sum(r.job == job and r.is_failure and r.step_before >= step for r in records)


def newest_step(stage: Path) -> int:
    """Return the step of the newest checkpoint; 0 without one.

    A checkpoint gets its name when it is whole; copies under other names do not count.
    """
    found = [_CHECKPOINT.fullmatch(path.name) for path in stage.glob("checkpoints/step-*")]
    return max((int(match[1]) for match in found if match), default=0)
