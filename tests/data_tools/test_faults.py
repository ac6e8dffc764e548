"""Holes are counted over the run, and a share of them stops it."""

import pytest

from data_tools.errors import EXIT_DATA, BadDataShareError
from data_tools.stream.faults import SAMPLES_BEFORE_SHARE, HoleCounter


def holes(count: int) -> list[dict]:
    return [{"key": f"k{i}", "reason": f"reason {i}"} for i in range(count)]


def test_a_share_above_the_limit_stops_with_the_last_reason() -> None:
    counter = HoleCounter(0.001)
    counter.add(5000, holes(5))
    with pytest.raises(
        BadDataShareError, match=r"7 of 5100 .*max_hole_share = 0.001.*reason 1"
    ) as caught:
        counter.add(100, holes(2))
    assert caught.value.exit_code == EXIT_DATA


def test_a_share_at_the_limit_is_fine() -> None:
    counter = HoleCounter(0.01)
    for _ in range(100):
        counter.add(100, holes(1))


def test_few_samples_make_no_share() -> None:
    counter = HoleCounter(0.001)
    counter.add(10, holes(1))
    with pytest.raises(BadDataShareError):
        counter.add(10, holes(1))
    assert SAMPLES_BEFORE_SHARE * 0.001 == 1


def test_only_a_hole_stops_a_run() -> None:
    """A resumed run that starts above its share must not stop at a healthy step."""
    counter = HoleCounter(1.0)
    counter.add(1000, holes(900))
    counter._max_share = 0.5
    counter.add(10, [])


def test_a_limit_of_zero_allows_none() -> None:
    counter = HoleCounter(0.0)
    counter.add(10**6, [])
    with pytest.raises(BadDataShareError):
        counter.add(1, holes(1))
