"""The plan of a run in its folder: everything that fixes which samples every step sees.

RUN/stageN/plan.json names the catalogues (RUN/stageN/data/*.catalogue), the budgets and the mix.
The trainer plans with it, and the ledger replays it, from these files alone.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import CheckpointError, DataError
from data_tools.stream.planner import DataState, Planner
from data_tools.stream.source import Source

PLAN_FILE = "plan.json"
DATA_FOLDER = "data"
PLAN_VERSION = 1
_OTHER_SETTINGS = (
    "the checkpoint was made with other data settings: {}. What follows would not be what was "
    "planned: use the old settings, or a fresh run.dir"
)


@dataclass(frozen=True)
class Plan:
    """What fixes the content of every step, beside the catalogues.

    Attributes:
        settings: name of a setting that content depends on -> digest of its value.
        catalogues: of the sources, paths relative to the run folder.
        weights: of the sources: how densely each is interleaved.
        epochs: how often each source is seen.
        token_budget: tokens of a pack.
        patch_budget: vision patches of a pack.
        packs_per_step: M, the global batch in packs; it may change from one step to the next.
    """

    settings: dict[str, str]
    catalogues: tuple[str, ...]
    weights: tuple[float, ...]
    epochs: tuple[int, ...]
    token_budget: int
    patch_budget: int
    packs_per_step: int

    def write(self, folder: Path) -> None:
        """Write the plan into a run folder, in one piece."""
        temporary = folder / f"{PLAN_FILE}.tmp"
        text = json.dumps({"version": PLAN_VERSION} | asdict(self), indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, folder / PLAN_FILE)

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read the plan of a run folder.

        Raises:
            DataError: if there is none, or it is of another version.
        """
        path = folder / PLAN_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{path} does not exist; expected the folder of a stage that was started, as "
                "runs/NAME/stage1"
            ) from error
        if record.pop("version", None) != PLAN_VERSION:
            raise DataError(f"{path} is of another version; read it with the program that wrote it")
        for name in ("catalogues", "weights", "epochs"):
            record[name] = tuple(record[name])
        return cls(**record)

    def open_sources(self, folder: Path) -> list[Source]:
        """Open the sources of a run folder; their columns are mapped, not read."""
        return [
            Source(str(folder / path), weight)
            for path, weight in zip(self.catalogues, self.weights, strict=True)
        ]

    def first_state(self, sources: Sequence[Source]) -> DataState:
        """Return the state of an untouched run."""
        return DataState.first(self.settings, [source.digest for source in sources])

    def planner(self, sources: Sequence[Source], state: DataState) -> Planner:
        """Return the plan from a state on."""
        return Planner(
            sources,
            self.epochs,
            self.token_budget,
            self.patch_budget,
            self.packs_per_step,
            state,
        )

    def check(self, state: DataState, sources: Sequence[Source]) -> DataState:
        """Return the state to go on from, if it belongs to this plan.

        Shards that have been added since join at the next epoch, so an older set of shards is fine.

        Raises:
            CheckpointError: naming every setting or source that is no longer what it was.
        """
        self.check_settings(state)
        names = [
            f"the shards of data.train.{number}"
            for number, source in enumerate(sources)
            if not source.continues(state.shards[number], state.cursors[number])
        ]
        if names:
            raise CheckpointError(_OTHER_SETTINGS.format(", ".join(names)))
        digests = tuple(source.digest for source in sources)
        return DataState(self.settings, digests, state.cursors, state.step, state.window)

    def check_settings(self, state: DataState) -> None:
        """Check that a state belongs to this plan, as far as that can be told without its shards.

        Raises:
            CheckpointError: naming every setting that is no longer what it was.
        """
        names = sorted(
            name
            for name in self.settings.keys() | state.settings.keys()
            if self.settings.get(name) != state.settings.get(name)
        )
        if len(state.shards) != len(self.catalogues):
            names.append(f"data.train ({len(state.shards)} sources, now {len(self.catalogues)})")
        if names:
            raise CheckpointError(_OTHER_SETTINGS.format(", ".join(names)))


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> short digest of a value that JSON can hold."""
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
        for name, value in values.items()
    }
