"""Which rows a step sees where rows are read in parts: lanes and windows.

An epoch draws an order of the parts and lays their rows out in it. Each lane walks its own stretch
of these rows, and a step takes the next few of every lane. Rows that lie near each other on a lane,
a window, are shuffled together. So a step mixes rows of many parts, and yet a part is needed once
an epoch, for a short time, by the worker whose lane walks over it. Lanes come to new windows in
turn, so that reading is even.

All of it is drawn by (seed, tag, epoch, lane, window). Lanes and windows belong to the recipe,
never to the machine. So a step's rows need no state, no list of all rows, and no number of workers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
OF_PARTS = 0  # in place of a lane's number, which is from 1 on
EPOCHS_KEPT = 2


class Laid(NamedTuple):
    """The parts in an epoch's order, and where the rows of each begin and end in it, all (S,)."""

    part: Ints
    first: Ints
    end: Ints


@dataclass(frozen=True)
class Walk:
    """An endless stream of rows out of parts, `size` of them a step.

    A row comes once an epoch. The last rows of an epoch that fill no step are left out of it. A
    stream of fewer rows than a step's repeats them.
    """

    sizes: Ints  # (S,) rows of each part
    size: int  # rows of a step
    lanes: int  # at most one a row
    window: int  # parts
    seed: int
    tag: int = 0
    drawn: Callable[..., NDArray[np.int32]] = field(init=False, repr=False, compare=False)
    laid: Callable[[int], Laid] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lanes", min(self.lanes, self.size))
        draw = partial(_permutation, self.seed, self.tag)
        object.__setattr__(self, "drawn", lru_cache(EPOCHS_KEPT * (self.lanes + 1))(draw))
        object.__setattr__(self, "laid", lru_cache(EPOCHS_KEPT)(self._laid))

    @property
    def repeats(self) -> int:
        """How often an epoch lays out every part: once, unless all have fewer rows than a step."""
        return -(-self.size // int(self.sizes.sum()))

    @property
    def rows_of_epoch(self) -> int:
        return self.repeats * int(self.sizes.sum())

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        return self.rows_of_epoch // self.size

    @property
    def rows_of_window(self) -> int:
        return self.window * -(-int(self.sizes.sum()) // len(self.sizes))

    @property
    def turn(self) -> int:
        """Steps from one lane's new window to the next lane's."""
        return max(1, self.rows_of_window // self.size)

    def at(self, step: int, which: Ints | None = None) -> tuple[Ints, Ints]:
        """(n,) parts and (n,) places in them of the rows at `which` places of a step, or of all."""
        which = np.arange(self.size) if which is None else which
        epoch, number = divmod(step, self.steps)
        lane = which * self.lanes // self.size
        first = -(-lane * self.size // self.lanes)  # the first place of the lane in a step
        each = -(-(lane + 1) * self.size // self.lanes) - first
        walked = self._moved(number * each + which - first, each * self.steps, epoch, lane)
        at = first * self.rows_of_epoch // self.size + walked
        laid = self.laid(epoch)
        order = np.searchsorted(laid.end, at, side="right")
        return laid.part[order] % len(self.sizes), at - laid.first[order]

    def _moved(self, walked: Ints, length: Ints, epoch: int, lane: Ints) -> Ints:
        """Where rows at these places of lanes of some length lie, shuffled within windows."""
        late = lane * self.rows_of_window // self.lanes
        window = (walked + late) // self.rows_of_window
        first = np.maximum(window * self.rows_of_window - late, 0)
        end = np.minimum((window + 1) * self.rows_of_window - late, length)
        places = zip(end - first, lane + 1, window, walked - first, strict=True)
        drawn = [self.drawn(*map(int, key), epoch)[place] for *key, place in places]
        return first + np.array(drawn, np.int64)

    def _laid(self, epoch: int) -> Laid:
        sizes = np.tile(self.sizes, self.repeats)
        part = self.drawn(len(sizes), OF_PARTS, 0, epoch).astype(np.int64)
        end = np.cumsum(sizes[part])
        return Laid(part, end - sizes[part], end)


def _permutation(
    seed: int, tag: int, size: int, lane: int, window: int, epoch: int
) -> NDArray[np.int32]:
    """A permutation of `size` numbers, drawn by all of the others."""
    key = np.array([seed, tag], np.uint64)
    counter = np.array([0, window, lane, epoch], np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return draw.permutation(np.arange(size, dtype=np.int32))
