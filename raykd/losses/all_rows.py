"""Rows of the global batch from every worker, for losses that compare rows with each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(values: Tensor) -> tuple[Tensor, int]:
    """(every worker's `values` (B, ...) in rank order, where this worker's begin); gradients flow
    back to all.

    Each worker's gradient is the sum over the workers that used its rows, as if one had computed
    the whole loss.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values, 0
    counts = [
        torch.zeros(1, dtype=torch.int64, device=values.device)
        for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
    sizes = [int(count) for count in counts]
    return _Gather.apply(values, sizes), sum(sizes[: dist.get_rank()])  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int]) -> Tensor:
        first = sum(sizes[: dist.get_rank()])
        ctx.own = slice(first, first + len(values))
        room = values.new_zeros(
            (max(sizes), *values.shape[1:])
        )  # shares differ by a row, gathered pieces must not
        room[: len(values)] = values
        pieces = [torch.empty_like(room) for _ in sizes]
        dist.all_gather(pieces, room)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own], None
