"""Random numbers without a state: each is a function of (store key, row id, step).

SplitMix64's finaliser (Steele, Lea, Flood 2014) over a running mix of the coordinates; 53 bits of
each word are used.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(store: str) -> int:
    """The 64-bit key of a store's name."""
    return int.from_bytes(hashlib.sha256(store.encode()).digest()[:8], "little")


def mix(state: NDArray[np.uint64], coordinate: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The words after one more coordinate; shapes broadcast."""
    with np.errstate(over="ignore"):
        x = state + (coordinate.astype(np.uint64) + np.uint64(1)) * GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def words(key: int, row: NDArray[np.int64], step: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(P,): one word for each place."""
    return mix(mix(np.full(len(row), key, np.uint64), row), step)


def uniform(word: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The words as numbers in [0, 1)."""
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53
