"""The order of an epoch, lazily: any position is computed by itself, nothing is stored or shuffled.

Shards are permuted over the whole source; then windows of 64 shards are taken in that order and the
samples of a window permuted among themselves, so that few shards are live at a time. Both
permutations are Feistel networks over splitmix64's finaliser with cycle walking.
"""

import numpy as np

from data_tools.stream.hashing import hash_key, mix_array

WINDOW_SHARDS = 64
ROUNDS = 8


class Permutation:
    """A pseudo-random bijection of [0, size), evaluated pointwise."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        bits = max(2, (max(size, 2) - 1).bit_length())
        self._high, self._low = bits // 2, bits - bits // 2
        self._round_keys = [np.uint64(hash_key(key, number)) for number in range(ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map (n,) positions in [0, size) to (n,) int64 in [0, size), all different."""
        values = self._encrypt(positions.astype(np.uint64))
        outside = values >= self.size
        while outside.any():  # the domain is under twice the size: two tries on average
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        low_mask = np.uint64((1 << self._low) - 1)
        high_mask = np.uint64((1 << self._high) - 1)
        left, right = values >> np.uint64(self._low), values & low_mask
        for number, round_key in enumerate(self._round_keys):
            if number % 2 == 0:
                left = left ^ (mix_array(right + round_key) & high_mask)
            else:
                right = right ^ (mix_array(left + round_key) & low_mask)
        return (left << np.uint64(self._low)) | right


class EpochOrder:
    """The order in which one epoch visits the samples of a source.

    Args:
        shard_sizes: (shards,) samples of each shard.
        key: 64-bit key of (seed, source, epoch).
    """

    def __init__(self, shard_sizes: np.ndarray, key: int) -> None:
        self._sizes = shard_sizes
        self._key = key
        self._first_id = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        shards = Permutation(len(shard_sizes), hash_key(key, 1))(np.arange(len(shard_sizes)))
        self._windows = [
            shards[start : start + WINDOW_SHARDS] for start in range(0, len(shards), WINDOW_SHARDS)
        ]
        totals = [int(shard_sizes[window].sum()) for window in self._windows]
        self._window_start = np.concatenate([[0], np.cumsum(totals)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._window_start[-1])

    def sample_ids(self, start: int, stop: int) -> np.ndarray:
        """Return the ids (row numbers over all shards) at positions [start, stop) of the epoch."""
        positions = np.arange(start, min(stop, len(self)))
        windows = np.searchsorted(self._window_start, positions, side="right") - 1
        ids = np.empty(len(positions), np.int64)
        for window in np.unique(windows):
            chosen = windows == window
            ids[chosen] = self._in_window(
                int(window), positions[chosen] - self._window_start[window]
            )
        return ids

    def _in_window(self, window: int, positions: np.ndarray) -> np.ndarray:
        shards = self._windows[window]
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        permuted = Permutation(int(starts[-1]), hash_key(self._key, 2, window))(positions)
        place = np.searchsorted(starts, permuted, side="right") - 1
        return self._first_id[shards[place]] + permuted - starts[place]
