"""The order of an epoch: every sample once, another order in another epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.stream.hashing import hash_key
from data_tools.stream.order import WINDOW_SHARDS, EpochOrder, Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 100, 1000, 4096, 4097, 65536, 100003])
def test_permutation_is_a_bijection(size: int) -> None:
    images = Permutation(size, hash_key(size))(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_permutation_stays_in_range_and_is_evaluated_pointwise(
    size: int, key: int, data: st.DataObject
) -> None:
    positions = np.asarray(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    permutation = Permutation(size, key)
    together = permutation(positions)
    assert (together >= 0).all() and (together < size).all()
    assert together.tolist() == [
        int(permutation(positions[i : i + 1])[0]) for i in range(len(positions))
    ]
    assert len(set(together.tolist())) == len(set(positions.tolist()))


def test_permutation_shuffles() -> None:
    """Neighbours land far apart: the mean distance of a random order is a third of its length."""
    images = Permutation(10_000, 1)(np.arange(10_000))
    assert abs(np.abs(np.diff(images)).mean() / 10_000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(images, np.arange(10_000))[0, 1]) < 0.05


sizes_of_shards = st.lists(st.integers(0, 9), min_size=1, max_size=150).filter(sum)


@given(sizes_of_shards, st.integers(0, 2**64 - 1), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_sample_once(sizes: list[int], key: int, block: int) -> None:
    order = EpochOrder(np.asarray(sizes), key)
    assert len(order) == sum(sizes)
    blocks = [order.sample_ids(start, start + block) for start in range(0, len(order), block)]
    ids = np.concatenate(blocks)
    assert np.array_equal(np.sort(ids), np.arange(sum(sizes)))
    assert np.array_equal(ids, order.sample_ids(0, len(order)))


def test_orders_of_epochs_seeds_and_sources_differ() -> None:
    sizes = np.asarray([40, 0, 60, 50])
    orders = [
        tuple(EpochOrder(sizes, hash_key(seed, "order", source, epoch)).sample_ids(0, 150))
        for seed in range(3)
        for source in range(2)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def test_few_shards_are_live_at_a_time() -> None:
    sizes = np.full(4 * WINDOW_SHARDS, 5)
    shards = EpochOrder(sizes, 7).sample_ids(0, int(sizes.sum())) // 5
    for start in range(0, len(shards) - 5, 50):
        assert len(set(shards[start : start + 50].tolist())) <= 2 * WINDOW_SHARDS
    window = set(shards[: 5 * WINDOW_SHARDS].tolist())
    assert len(window) == WINDOW_SHARDS
    assert window != set(range(WINDOW_SHARDS)), "shards must be drawn from the whole source"
