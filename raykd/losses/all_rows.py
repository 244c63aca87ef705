"""Rows of the global batch from every worker, for losses that compare rows with each other."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(values: Tensor) -> tuple[Tensor, int]:
    """The rows of every worker, and the index at which this worker's rows begin.

    Use it in a term that compares rows, such as a contrastive loss, so that its negatives are those
    of the global batch. `values` is (B, ...), and B may differ between workers. The result is
    (N, ...) in rank order. Without a process group it is `values` itself, beginning at 0.

    Gradients flow back to all workers. The gradient of a row is the sum over the workers that used
    it, as if one worker had computed the whole loss.

    Example:
        >>> import torch
        >>> from raykd.losses import gather_rows
        >>> rows, first = gather_rows(torch.tensor([[1.0], [2.0]]))
        >>> rows.tolist(), first
        ([[1.0], [2.0]], 0)
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values, 0
    counts = [
        torch.zeros(1, dtype=torch.int64, device=values.device)
        for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
    sizes = [int(count) for count in counts]
    first = sum(sizes[: dist.get_rank()])
    return _Gather.apply(values, sizes), first  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """All rows forward; the summed gradient of this worker's rows backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int]) -> Tensor:
        first = sum(sizes[: dist.get_rank()])
        ctx.own_rows = slice(first, first + len(values))
        # Shares differ by a row, but all_gather needs pieces of one size.
        padded = values.new_zeros((max(sizes), *values.shape[1:]))
        padded[: len(values)] = values
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own_rows], None
