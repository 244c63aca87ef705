"""Which rows a step sees, and the noise on them.

Both are pure functions of (seed, step), so any number of workers, stopped or resumed, see the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.recipe.tables import Optim

WHOLE = slice(None)


class Stream(Protocol):
    """An endless stream of rows, of which each step takes `size`."""

    @property
    def size(self) -> int: ...

    def rows(self, step: int, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions in the split of the rows at `which` of a step's places."""
        ...


@dataclass(frozen=True)
class ShuffledStream:
    """A stream of a pool's entries: one permutation after another.

    Each permutation is drawn by (seed, tag, epoch).
    """

    pool: NDArray[np.int64]
    size: int
    seed: int
    tag: int

    def rows(self, step: int, which: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.take(step * self.size, self.size)[which]

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Entries [start, start + count) of the stream."""
        size = len(self.pool)
        end = start + count
        runs = []
        while start < end:
            epoch, at = divmod(start, size)
            run = _permutation(size, self.seed, self.tag, epoch)[at : at + end - start]
            runs.append(run)
            start += len(run)
        return self.pool[np.concatenate(runs)]


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, tag: int, epoch: int) -> NDArray[np.int64]:
    key = np.array([seed, (tag << 32) + epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)


class Order:
    """The rows of every global batch: a fixed number from each stream."""

    def __init__(self, streams: Sequence[Stream]):
        self.streams = streams
        sizes = [stream.size for stream in streams]
        place = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        self.deal = np.argsort(place, kind="stable")
        self.first = np.cumsum([0, *sizes[:-1]])  # of each stream's places before they are dealt

    def rows(self, step: int, share: slice = WHOLE) -> NDArray[np.int64]:
        """(n,): the positions in the split of one step's rows, or of a share of them.

        The rows of a stream are dealt out evenly, so that each worker's contiguous share has its
        part of them.
        """
        rows = np.empty(len(self.deal[share]), np.int64)
        for stream, here, which in self.dealt(share):
            rows[here] = stream.rows(step, which)
        return rows

    def dealt(self, share: slice) -> Iterator[tuple[Stream, NDArray[np.bool_], NDArray[np.int64]]]:
        """Each stream, the places (n,) of a share that it fills, and its rows that fill them."""
        dealt = self.deal[share]
        of_stream = np.searchsorted(self.first, dealt, side="right") - 1
        for number in np.unique(of_stream):
            here = of_stream == number
            yield self.streams[number], here, dealt[here] - self.first[number]


def shuffled(is_labelled: NDArray[np.bool_], optim: Optim, seed: int) -> Order:
    """The order of rows that are all at hand: each stream is one permutation after another."""
    labelled = np.flatnonzero(is_labelled)
    count = labelled_rows(optim, len(labelled), len(is_labelled))
    pools = [(labelled, count), (np.arange(len(is_labelled)), optim.batch - count)]
    return Order(
        [ShuffledStream(pool, size, seed, tag) for tag, (pool, size) in enumerate(pools) if size]
    )


def labelled_rows(optim: Optim, labelled: int, rows: int) -> int:
    """How many rows of each batch come from the labelled ones alone; 0 unless labels are hidden."""
    return round(optim.labelled_share * optim.batch) if 0 < labelled < rows else 0


def input_noise(optim: Optim, shape: torch.Size, seed: int) -> Tensor | None:
    """(batch, T, K): Gaussian noise for a global batch, drawn by `seed`; None without noise."""
    if optim.input_noise == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((optim.batch, *shape), generator=generator).mul_(optim.input_noise)


def mixed(*parts: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
