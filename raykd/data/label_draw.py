"""Which labels stay where rows are read in parts: a draw for each row by its id.

A label stays if its row's draw is at most the cutoff of its class. The cutoffs are such that the
share of labels is exact in every class, and a smaller share keeps part of what a larger one keeps.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

Labels = Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]  # (row ids, classes) of some rows
LARGEST = 2**64 - 1
SPREAD = 8  # standard deviations within which a cutoff lies, but for one in 10^15


def draws(row_id: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """(N,): evenly spread 64-bit numbers that depend on row and seed alone (splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = _mixed(np.array([seed + 1], np.uint64)) ^ row_id.astype(np.uint64)
        return _mixed(mixed * np.uint64(0x9E3779B97F4A7C15))


def stays(
    row_id: NDArray[np.int64],
    number: NDArray[np.int64],
    cutoff: NDArray[np.uint64],
    seed: int,
) -> NDArray[np.bool_]:
    """(N,): whether each row keeps its label, the number of a class, under its class's cutoff."""
    return draws(row_id, seed) <= cutoff[number]


def cutoffs(
    labels: Callable[[], Labels], counts: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.uint64]:
    """(C,): the largest draw of each class whose label stays.

    `labels` reads the labelled rows anew, `counts` are those of each class. Only draws near a
    cutoff are kept in memory.
    """
    share = Fraction(str(fraction))
    kept = np.array([ceil(share * int(count)) for count in counts])
    spread = SPREAD * np.sqrt(kept) + SPREAD
    total = np.maximum(counts, 1)
    low = _scaled((kept - spread) / total)
    high = _scaled((kept + spread) / total)
    below = np.zeros(len(counts), np.int64)
    near: list[list[NDArray[np.uint64]]] = [[] for _ in counts]
    for row_id, number in labels():
        drawn = draws(row_id, seed)
        below += np.bincount(number[drawn < low[number]], minlength=len(counts))
        is_near = (drawn >= low[number]) & (drawn <= high[number])
        for of_class in np.unique(number[is_near]):
            near[of_class].append(drawn[is_near & (number == of_class)])
    found = np.zeros(len(counts), np.uint64)
    for number, some in enumerate(near):
        if kept[number]:
            found[number] = np.sort(np.concatenate(some))[kept[number] - below[number] - 1]
    return found


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _scaled(shares: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Shares of the range of draws, cut to it."""
    cut = [min(max(float(share), 0.0), 1.0) for share in shares]
    return np.array([min(int(share * LARGEST), LARGEST) for share in cut], np.uint64)
