"""Which rows a step sees, and the noise on them.

Both are pure functions of (seed, step), so any number of workers, stopped or resumed, see the same.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.recipe.tables import Optim


@dataclass(frozen=True)
class ShuffledStream:
    """An endless stream of a pool's entries: one permutation after another.

    Each permutation is drawn by (seed, tag, epoch).
    """

    pool: NDArray[np.int64]
    seed: int
    tag: int

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
    """The rows of every global batch.

    With hidden labels, a fixed share of each batch comes from the labelled rows.
    """

    def __init__(self, is_labelled: NDArray[np.bool_], optim: Optim, seed: int):
        rows = np.arange(len(is_labelled))
        labelled = np.flatnonzero(is_labelled)
        count = 0  # of labelled rows in each batch
        if 0 < len(labelled) < len(rows):
            count = round(optim.labelled_share * optim.batch)
        pools = [(labelled, count), (rows, optim.batch - count)]
        self.streams = [
            (ShuffledStream(pool, seed, tag), size)
            for tag, (pool, size) in enumerate(pools)
            if size
        ]
        place = np.concatenate([(np.arange(size) + 0.5) / size for _, size in self.streams])
        self.deal = np.argsort(place, kind="stable")

    def rows(self, step: int) -> NDArray[np.int64]:
        """(batch,): the positions in the split of one step's rows.

        Labelled rows are dealt out evenly, so that each worker's contiguous share has its part.
        """
        taken = [stream.take(step * size, size) for stream, size in self.streams]
        return np.concatenate(taken)[self.deal]


def input_noise(optim: Optim, shape: torch.Size, seed: int) -> Tensor | None:
    """(batch, T, K): Gaussian noise for a global batch, drawn by `seed`; None without noise."""
    if optim.input_noise == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((optim.batch, *shape), generator=generator).mul_(optim.input_noise)


def mixed(*parts: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
