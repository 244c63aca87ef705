"""The temperatures that a column serves, and the log-sum-exp of log p / T of each step.

lse_T = log sum_i exp(log p_i / T) lies between 0 and (1 - 1/T) log V, so 16 bits of that range move
a weight by less than 1e-4 of itself. lse_1 = 0 is not stored.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import RecipeError

CHUNK = 1 << 20  # logits at a time: smaller ones cost more calls than they save in cache


def chunks(logits: Tensor, mask: Tensor, vocab: int) -> Iterator[tuple[slice, Tensor]]:
    """Runs of valid steps of `logits` (B, T, C), and their fp32 logits (c, vocab).

    There is one empty run if no step is valid.
    """
    places = mask.flatten().nonzero().squeeze(1).cpu()
    flat = logits.flatten(0, 1)
    size = max(1, CHUNK // logits.shape[-1])
    for first in range(0, max(len(places), 1), size):
        chunk = places[first : first + size]
        if len(chunk) > 0 and int(chunk[-1] - chunk[0]) + 1 == len(chunk):
            z = flat[int(chunk[0]) : int(chunk[-1]) + 1]  # most have no gap: no copy is made
        else:
            z = flat[chunk.to(flat.device)]
        yield slice(first, first + size), z[:, :vocab].float()


def index_of(temperature: float, grid: tuple[float, ...]) -> int:
    """The place of a temperature in a store's grid; RecipeError names the grid if it has none."""
    if temperature not in grid:
        known = ", ".join(f"{t:g}" for t in grid)
        raise RecipeError(
            f"temperature {temperature:g} is not in this store's grid ({known}): choose one of "
            'these, or score again with it in the grid, or with store.codec = "dense", which '
            "serves any"
        )
    return grid.index(temperature)


def tempered(log_p: Tensor, grid: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """The mean over the grid of softmax(log p / T) (c, V), and lse_T (c,) of every T but 1."""
    mixed = torch.zeros_like(log_p)
    lse = []
    scaled = torch.empty_like(log_p)
    p = torch.empty_like(log_p)
    top = log_p.argmax(1, keepdim=True)
    for t in grid:
        torch.softmax(torch.div(log_p, t, out=scaled), 1, out=p)
        mixed.add_(p, alpha=1 / len(grid))
        if t != 1:
            lse.append((log_p.gather(1, top) / t - p.gather(1, top).log()).squeeze(1))
    return mixed, lse


def lse_bound(temperature: float, vocab: int) -> float:
    """The largest |lse_T| that log-probs of `vocab` classes can have; its sign is that of T - 1."""
    return math.log(max(vocab, 2)) * abs(1 - 1 / temperature)


def lse_bytes(lse: list[Tensor], grid: tuple[float, ...], vocab: int) -> NDArray[np.uint8]:
    """(c, 2 per temperature but 1): the lse as little-endian 16-bit shares of their bounds."""
    bounds = [lse_bound(t, vocab) for t in grid if t != 1]
    if not bounds:
        return np.zeros((0, 0), np.uint8)
    shares = [
        (values.double().abs() / bound * 65535).round()
        for values, bound in zip(lse, bounds, strict=True)
    ]
    codes = torch.stack(shares, 1)
    return codes.clamp(max=65535).cpu().numpy().astype("<u2").view(np.uint8)
