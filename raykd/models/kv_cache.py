"""The keys and values of a decoder's past positions, so that a new token costs one step, not the
whole pass again.
"""

from typing import Protocol

import torch
from torch import Tensor

from raykd.errors import DataError


class Past(Protocol):
    """What a decoder asks of a cache while it answers."""

    length: int

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, H, T, D) of a layer -> those of all positions (B, H, length + T,
        D).
        """
        ...


class Cache:
    """Room for `steps` positions of `rows` sequences, taken once; positions from `length` on do not
    count.

    Rollback is `cache.length = n`, and `cache.length = 0` a new start: nothing is copied or
    cleared. No gradient flows into it.
    """

    def __init__(self, *, layers: int, rows: int, heads: int, steps: int, width: int):
        """`heads` are those of keys and values, `width` is one head's."""
        self.keys = torch.zeros(layers, rows, heads, steps, width)
        self.values = torch.zeros_like(self.keys)
        self.places = torch.zeros(rows, steps, dtype=torch.int64)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, H, T, D) behind `length`; all (B, H, length + T,
        D) as views.

        `length` stays: it moves on when every layer has written. DataError where there is no room,
        or not `rows` rows.
        """
        rows, steps = self.keys.shape[1], self.keys.shape[3]
        last = self.length + keys.shape[2]
        if last > steps:
            raise DataError(
                f"cache: {keys.shape[2]} tokens after {self.length}, but it was made for {steps}; "
                "set cache.length to fewer, or make one with more steps"
            )
        if len(keys) != rows:
            raise DataError(
                f"cache: {len(keys)} rows of tokens, but it was made for {rows}; make one with that many"
            )
        for held, new in ((self.keys, keys), (self.values, values)):
            held[layer, :, :, self.length : last] = new.detach()
        return self.keys[layer, :, :, :last], self.values[layer, :, :, :last]

    def placed(self, places: Tensor) -> Tensor:
        """Write new places (B, T) of tokens in their documents behind `length`; all (B, length + T)
        as a view.
        """
        last = self.length + places.shape[1]
        self.places[:, self.length : last] = places
        return self.places[:, :last]
