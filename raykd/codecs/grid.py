"""A column that serves several temperatures: which ones, and the log-sum-exp of log p / T for each step.

lse_T = log sum_i exp(log p_i / T) lies between 0 and (1 - 1/T) log V, so 16 bits of that range move a weight by less
than 1e-4 of itself. lse_1 = 0 is not stored.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import RecipeError


def index_of(temperature: float, grid: tuple[float, ...]) -> int:
    """The place of a temperature in a store's grid; RecipeError names the grid if it has none."""
    if temperature not in grid:
        raise RecipeError(
            f"temperature {temperature:g} is not in this store's grid ({', '.join(f'{t:g}' for t in grid)}): choose "
            'one of these, or score again with it in the grid, or with store.codec = "dense", which serves any'
        )
    return grid.index(temperature)


def tempered(log_p: Tensor, grid: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """The mean over the grid of softmax(log p / T) (c, V), and lse_T (c,) of every T but 1."""
    mixed, lse = torch.zeros_like(log_p), []
    top = log_p.argmax(1, keepdim=True)
    for t in grid:
        if t == 1:
            mixed += log_p.exp()
            continue
        p = (log_p / t).softmax(1)
        lse.append((log_p.gather(1, top) / t - p.gather(1, top).log()).squeeze(1))
        mixed += p
    return mixed.div_(len(grid)), lse


def lse_bound(temperature: float, vocab: int) -> float:
    """The largest |lse_T| that log-probs of `vocab` classes can have; its sign is that of T - 1."""
    return math.log(max(vocab, 2)) * abs(1 - 1 / temperature)


def lse_bytes(lse: list[Tensor], grid: tuple[float, ...], vocab: int) -> NDArray[np.uint8]:
    """(c, 2 per temperature but 1): the lse as little-endian 16-bit shares of their bounds."""
    bounds = [lse_bound(t, vocab) for t in grid if t != 1]
    if not bounds:
        return np.zeros((0, 0), np.uint8)
    codes = torch.stack([(x.double().abs() / b * 65535).round() for x, b in zip(lse, bounds, strict=True)], 1)
    return codes.clamp(max=65535).cpu().numpy().astype("<u2").view(np.uint8)
