"""The plan of a run, made again from its files and compared with what the run wrote down.

A run writes the hash of every step's plan into data.jsonl and every sample that it had to leave out
into faults.jsonl. The plan is a pure function of plan.json and the catalogues; made again it must
give the same hashes. Then what it says of a step is what the step saw.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataError
from data_tools.stream.plan import Plan
from data_tools.stream.planner import PlannedSample, Planner, Step
from data_tools.stream.source import Source

DATA_FILE = "data.jsonl"
FAULTS_FILE = "faults.jsonl"
MAX_EXAMPLES = 5

Hole = dict[str, Any]  # a line of faults.jsonl


@dataclass(frozen=True)
class SeenStep:
    """A step that the run has done.

    Attributes:
        number: as the run counts, from 1.
        plan: its packs.
        holes: samples of it that could not be used.
    """

    number: int
    plan: Step
    holes: tuple[Hole, ...]


@dataclass(frozen=True)
class EpochCount:
    """How often the samples of an epoch of a source were planned.

    Attributes:
        source: its number.
        epoch: counted from 0.
        size: samples that belong to it.
        num_once: those planned exactly once.
        never: keys of some that were not planned.
        num_never: how many these are.
        repeated: keys of some that were planned more than once, or in parts that do not match.
        num_repeated: how many these are.
        num_holes: those planned once but not seen, since their bytes could not be used.
        is_complete: whether the run has gone through all of the epoch.
    """

    source: int
    epoch: int
    size: int
    num_once: int
    never: tuple[str, ...]
    num_never: int
    repeated: tuple[str, ...]
    num_repeated: int
    num_holes: int
    is_complete: bool

    @property
    def is_exact(self) -> bool:
        """Whether every sample was planned exactly once; so far none twice, if not complete."""
        return not self.num_repeated and not (self.is_complete and self.num_never)


@dataclass
class Replay:
    """Goes through the steps of a run folder again.

    Attributes:
        folder: RUN/stageN.
        records: the lines of data.jsonl.
        is_torn: whether its last line is cut off; the run was killed or is writing it.
        problems: what does not fit together, in words; filled by `steps`.
        num_steps: steps gone through; filled by `steps`.
    """

    folder: Path
    problems: list[str] = field(default_factory=list, init=False)
    num_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.plan = Plan.read(self.folder)
        self.sources: list[Source] = self.plan.open_sources(self.folder)
        self.records, self.is_torn = read_lines(self.folder / DATA_FILE)
        self.holes: dict[int, list[Hole]] = defaultdict(list)
        faults = self.folder / FAULTS_FILE
        for hole in read_lines(faults)[0] if faults.exists() else []:
            self.holes[hole["step"]].append(hole)
        self.planner = self.plan.planner(self.sources, self.plan.first_state(self.sources))

    def steps(self) -> Iterator[SeenStep]:
        """Yield the steps of the run in their order, up to one that cannot be confirmed."""
        for expected, record in enumerate(self.records, start=1):
            number = record["step"]
            if number != expected:
                self.problems.append(f"{DATA_FILE} has step {number} where {expected} is due")
                return
            # The global batch may change from step to step; what a step had is written down.
            self.planner.packs_per_step = record["packs"]
            step = self.planner.next_step()
            if problem := _difference(record, step, self.planner):
                self.problems.append(f"step {number}: {problem}")
                return
            assert step is not None
            self.num_steps = number
            yield SeenStep(number, step, tuple(self.holes.get(number, ())))


class SampleCounter:
    """Counts how often every sample was planned, by source and epoch."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._whole: dict[tuple[int, int], np.ndarray] = {}
        self._parts: dict[tuple[int, int, int], np.ndarray] = {}
        self._holes: dict[tuple[int, int], set[int]] = defaultdict(set)

    def add(self, seen: SeenStep) -> None:
        """Take in a step."""
        for pack in seen.plan.packs:
            for planned in pack:
                self._count(planned)
        hole_keys = {(hole["source"], hole["key"]) for hole in seen.holes}
        if hole_keys:
            for planned in (planned for pack in seen.plan.packs for planned in pack):
                if (planned.source, self._key(planned)) in hole_keys:
                    self._holes[planned.source, planned.epoch].add(planned.sample_id)

    def epochs(self, planner: Planner) -> list[EpochCount]:
        """Return the counts of every epoch that has begun.

        Args:
            planner: where the plan stands, which tells what is complete.
        """
        waiting = {
            (sample.source, sample.epoch)
            for source, draw, _ in planner.state.window
            for sample in self._sources[source].draws(source, draw)
        }
        return [
            self._epoch(source, epoch, planner.state.cursors[source], (source, epoch) in waiting)
            for source, epoch in sorted(self._whole)
        ]

    def _count(self, planned: PlannedSample) -> None:
        place = planned.source, planned.epoch
        if place not in self._whole:
            size = self._sources[planned.source].num_samples
            self._whole[place] = np.zeros(size, np.uint16)
        if planned.windows == 1:
            self._whole[place][planned.sample_id] += 1
            return
        # A split answer counts as often as all of its parts were there.
        key = (*place, planned.sample_id)
        parts = self._parts.setdefault(key, np.zeros(planned.windows, np.uint16))
        parts[planned.window] += 1

    def _epoch(self, source: int, epoch: int, cursor: int, is_waiting: bool) -> EpochCount:
        stream = self._sources[source]
        ids = np.asarray(stream.used[: stream.epoch_size(epoch)])
        counts = self._whole[source, epoch].copy()
        for (k, e, sample_id), parts in self._parts.items():
            if (k, e) == (source, epoch):
                counts[sample_id] += parts.max() if parts.min() else 0
                # Parts of which some came twice and others once are no whole number of visits.
                counts[sample_id] += 1 if 0 < parts.min() < parts.max() else 0
        never, repeated = ids[counts[ids] == 0], ids[counts[ids] > 1]
        return EpochCount(
            source,
            epoch,
            len(ids),
            num_once=int((counts[ids] == 1).sum()),
            never=self._keys(stream, never),
            num_never=len(never),
            repeated=self._keys(stream, repeated),
            num_repeated=len(repeated),
            num_holes=len(self._holes[source, epoch]),
            is_complete=cursor >= stream.num_draws(epoch + 1) and not is_waiting,
        )

    def _key(self, planned: PlannedSample) -> str:
        return self._sources[planned.source].key(planned.sample_id)

    @staticmethod
    def _keys(source: Source, ids: np.ndarray) -> tuple[str, ...]:
        return tuple(source.key(int(sample_id)) for sample_id in ids[:MAX_EXAMPLES])


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Read a JSON lines file; return its records and whether the last line is cut off.

    Raises:
        DataError: if there is no such file, or a line in its middle is no JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; expected the folder of a stage that has made steps, as "
            "runs/NAME/stage1"
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                return records, True  # killed while it wrote this line
            raise DataError(f"{path}, line {number}: no valid JSON ({error})") from error
    return records, False


def _difference(record: dict[str, Any], step: Step | None, planner: Planner) -> str:
    """Return in words how a step that was made again differs from its line in data.jsonl."""
    if step is None:
        return "the plan ends before it"
    if step.plan_hash != record["plan_hash"]:
        return (
            f"the plan made again has the hash {step.plan_hash}, the run wrote "
            f"{record['plan_hash']}; its catalogues or plan.json are not those it ran with"
        )
    if "state" in record and record["state"] != json.loads(json.dumps(planner.state.to_json())):
        return "the data state that the run wrote is not the one that the plan has there"
    return ""
