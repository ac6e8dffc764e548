"""Holes: samples whose bytes cannot be used. Counted over all ranks, stopped above a share.

A hole is deterministic, since it depends on bytes only: the pack gets shorter and nothing moves
up. What failed for another reason (a disk that does not answer) is no hole and stops the rank.
"""

from collections.abc import Sequence
from typing import Any

from data_tools.errors import BadDataShareError

SAMPLES_BEFORE_SHARE = 1000  # a share of holes means nothing before this many samples


class HoleCounter:
    """Counts samples and holes of a run, over all ranks."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._num_samples = 0
        self._num_holes = 0

    def add(self, num_samples: int, holes: Sequence[dict[str, Any]]) -> None:
        """Take in a step's samples, holes included.

        Raises:
            BadDataShareError: if there are more holes than the configuration allows.
        """
        self._num_samples += num_samples
        self._num_holes += len(holes)
        share = self._num_holes / max(self._num_samples, SAMPLES_BEFORE_SHARE)
        if holes and share > self._max_share:
            raise BadDataShareError(
                f"{self._num_holes} of {self._num_samples} samples could not be used, more than "
                f"data.max_hole_share = {self._max_share}; the last one: {holes[-1]['reason']}. "
                "All of them stand in faults.jsonl of the run folder"
            )
