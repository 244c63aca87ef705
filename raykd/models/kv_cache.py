"""The keys and values of a decoder's past positions, so that a new token costs one step."""

from typing import Protocol

import torch
from torch import Tensor

from raykd.errors import DataError


class Past(Protocol):
    """What a decoder needs of a cache."""

    length: int

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, H, T, D) of a layer -> those of all, (B, H, length + T, D)."""
        ...


class Cache:
    """A cache of `steps` positions of `rows` sequences, of which the first `length` are filled.

    The memory is taken once. `cache.length = n` rolls back, `cache.length = 0` starts again:
    nothing is copied or cleared. No gradient flows into it.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        steps: int,
        width: int,
        dtype: torch.dtype = torch.float32,
    ):
        """`heads` are those of keys and values, `width` is one head's, `dtype` the model's."""
        self.keys = torch.zeros(layers, rows, heads, steps, width, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.places = torch.zeros(rows, steps, dtype=torch.int64)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, H, T, D) behind `length`.

        Gives those of all positions, (B, H, length + T, D), as views. `length` stays: the model
        moves it on when every layer has written. DataError if there is no room, or if there are not
        `rows` rows.
        """
        rows = self.keys.shape[1]
        steps = self.keys.shape[3]
        last = self.length + keys.shape[2]
        if last > steps:
            raise DataError(
                f"cache: {keys.shape[2]} tokens after {self.length}, but it was made for {steps}; "
                "set cache.length to fewer, or make one with more steps"
            )
        if len(keys) != rows:
            raise DataError(
                f"cache: {len(keys)} rows of tokens, but it was made for {rows}; "
                "make one with that many"
            )
        self.keys[layer, :, :, self.length : last] = keys.detach()
        self.values[layer, :, :, self.length : last] = values.detach()
        return self.keys[layer, :, :, :last], self.values[layer, :, :, :last]

    def placed(self, places: Tensor) -> Tensor:
        """Write the places (B, T) of new tokens in their documents behind `length`.

        Gives those of all positions, (B, length + T), as a view.
        """
        last = self.length + places.shape[1]
        self.places[:, self.length : last] = places
        return self.places[:, :last]
