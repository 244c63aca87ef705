"""Which rows a step sees, and the noise on them: a pure function of (seed, step), for any number of
workers.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.recipe.recipe import Optim


@dataclass(frozen=True)
class ShuffledStream:
    """An endless shuffled reading of a pool: one permutation after the other, each drawn by (seed,
    tag, epoch).
    """

    pool: NDArray[np.int64]
    seed: int
    tag: int

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Entries [start, start + count) of the stream."""
        size, end, parts = len(self.pool), start + count, []
        while start < end:
            epoch, at = divmod(start, size)
            part = _permutation(size, self.seed, self.tag, epoch)[at : at + end - start]
            parts.append(part)
            start += len(part)
        return self.pool[np.concatenate(parts)]


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, tag: int, epoch: int) -> NDArray[np.int64]:
    key = np.array([seed, (tag << 32) + epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)


class Order:
    """The rows of every global batch.

    With hidden labels, a fixed share of each batch comes from the labelled rows.
    """

    def __init__(self, is_labelled: NDArray[np.bool_], optim: Optim, seed: int):
        every, labelled = np.arange(len(is_labelled)), np.flatnonzero(is_labelled)
        from_labelled = (
            round(optim.labelled_share * optim.batch) if len(labelled) < len(every) else 0
        )
        sizes = [(labelled, from_labelled), (every, optim.batch - from_labelled)]
        self.parts = [
            (ShuffledStream(pool, seed, tag), n) for tag, (pool, n) in enumerate(sizes) if n
        ]
        place = np.concatenate([(np.arange(n) + 0.5) / n for _, n in self.parts])
        self.deal = np.argsort(place, kind="stable")

    def rows(self, step: int) -> NDArray[np.int64]:
        """(batch,) positions in the split, for one step.

        The two parts are dealt out evenly to contiguous shares.
        """
        return np.concatenate([stream.take(step * count, count) for stream, count in self.parts])[
            self.deal
        ]


def input_noise(optim: Optim, shape: torch.Size, seed: int) -> Tensor | None:
    """(batch, T, K) Gaussian noise for a global batch, drawn by `seed`; None where the recipe has
    none.
    """
    if optim.input_noise == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((optim.batch, *shape), generator=generator).mul_(optim.input_noise)


def mixed(*parts: int) -> int:
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
