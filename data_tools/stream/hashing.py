"""Every random draw of the data path: 64-bit hashes of what the draw is for.

`mix` is the finaliser of splitmix64 (Steele, Lea, Flood 2014). A draw is keyed by (run seed, what
it is for, key, epoch), never by a worker, a rank or a clock.
"""

import hashlib

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """Return splitmix64's finaliser of a 64-bit integer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def mix_array(x: np.ndarray) -> np.ndarray:
    """Return `mix` of every element of a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | str) -> int:
    """Fold integers and texts into one 64-bit key; the same on every machine."""
    state = GOLDEN
    for part in parts:
        number = part if isinstance(part, int) else _text_hash(part)
        state = mix(state ^ ((number + GOLDEN) & MASK))
    return state


def unit_interval(key: int) -> float:
    """Map a 64-bit key to [0, 1)."""
    return (key >> 11) * 2.0**-53


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
