"""Holes: samples whose bytes cannot be used. Counted over all ranks, stopped above a share.

A hole is deterministic, since it depends on bytes only: the pack gets shorter and nothing moves
up. What failed for another reason (a disk that does not answer) is no hole and stops the rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from data_tools.errors import BadDataShareError, DataError, ShardChangedError

SAMPLES_BEFORE_SHARE = 1000  # a share of holes means nothing before this many samples

# Bytes differ from the index; the record is malformed or has no answer; an image cannot be decoded;
# its size is not that of the record; the example came out longer than planned.
HoleKind = Literal["checksum", "record", "image", "size", "longer"]
KINDS: tuple[HoleKind, ...] = get_args(HoleKind)


class HoleError(DataError):
    """A sample cannot be used; `kind` says which of its parts is at fault."""

    def __init__(self, kind: HoleKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@contextmanager
def fault_of(kind: HoleKind) -> Iterator[None]:
    """Make a DataError of what is done inside the fault of one part of the sample."""
    try:
        yield
    except (ShardChangedError, HoleError):
        raise
    except DataError as error:
        raise HoleError(kind, str(error)) from error


class HoleCounter:
    """Counts samples and holes of a run, over all ranks.

    Attributes:
        by_kind: kind of hole -> how many there were.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._num_samples = 0
        self.by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)

    @property
    def num_holes(self) -> int:
        """Holes of every kind."""
        return sum(self.by_kind.values())

    def add(self, num_samples: int, holes: Sequence[dict[str, Any]]) -> None:
        """Take in a step's samples, holes included.

        Raises:
            BadDataShareError: if there are more holes than the configuration allows.
        """
        self._num_samples += num_samples
        for hole in holes:
            self.by_kind[hole["kind"]] += 1
        share = self.num_holes / max(self._num_samples, SAMPLES_BEFORE_SHARE)
        if holes and share > self._max_share:
            raise BadDataShareError(
                f"{self.num_holes} of {self._num_samples} samples could not be used, more than "
                f"data.max_hole_share = {self._max_share}; the last one: {holes[-1]['reason']}. "
                "All of them stand in faults.jsonl of the run folder"
            )
