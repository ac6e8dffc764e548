"""Seeded draws: the same numbers on every machine."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools.stream.hashing import hash_key, mix, mix_array, unit_interval

UINT64 = st.integers(0, 2**64 - 1)


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    # The first outputs of splitmix64 from seed 0 are mix(golden), mix(2 * golden).
    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF
    assert mix((2 * golden) % 2**64) == 0x6E789E6AA1B965F4


@given(st.lists(UINT64, min_size=1, max_size=20))
def test_arrays_are_mixed_like_integers(values: list[int]) -> None:
    assert mix_array(np.asarray(values, np.uint64)).tolist() == [mix(value) for value in values]


def test_keys_are_fixed_for_ever() -> None:
    """A changed value would change the order of every run that is resumed."""
    assert hash_key(0, "order", 0, 0) == 15510276262234151124
    assert hash_key("发票", -1) == 16188212537827647362


@given(st.lists(st.one_of(UINT64, st.text(max_size=8)), min_size=1, max_size=4))
def test_order_and_number_of_parts_matter(parts: list[int | str]) -> None:
    assert hash_key(*parts) == hash_key(*parts)
    assert hash_key(*parts) != hash_key(*parts, 0)
    if parts != parts[::-1]:
        assert hash_key(*parts) != hash_key(*parts[::-1])


@given(UINT64)
def test_unit_interval_is_half_open(key: int) -> None:
    assert 0.0 <= unit_interval(key) < 1.0


def test_unit_interval_reaches_both_ends() -> None:
    assert unit_interval(0) == 0.0
    assert 1 - 1e-15 < unit_interval(2**64 - 1) < 1.0
