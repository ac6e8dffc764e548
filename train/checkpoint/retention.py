"""Which checkpoints stay, and how the others are removed without ever leaving half of one."""

import logging
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.manifest import list_checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        last: so many of the newest; 0 keeps all.
        every: and every step that is a multiple of this; None: no such rule.
        best: and this step, the best one under early stopping.
    """

    last: int
    every: int | None = None
    best: int | None = None

    def surplus(self, steps: Iterable[int], step: int) -> list[int]:
        """Return the steps that go, once the checkpoint of `step` is durable.

        Later steps, from before a resume at an earlier one, are left alone.
        """
        until_now = sorted(number for number in steps if number <= step)
        if not self.last:
            return []
        return [
            number
            for number in until_now[: -self.last]
            if number != self.best and (self.every is None or number % self.every)
        ]


def delete_surplus(folder: Path, retention: Retention, step: int) -> None:
    """Delete the checkpoints that are not kept; one that cannot be deleted is told and stays."""
    paths = dict(list_checkpoints(folder))
    for number in retention.surplus(paths, step):
        try:
            delete(paths[number])
        except OSError as error:
            logger.warning("%s cannot be deleted (%s)", paths[number], error)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, since half of one must never be seen under its name."""
    doomed = checkpoint.with_name(f".tmp-del-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
