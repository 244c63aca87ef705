"""What follows a token in a text: the rewards after it, weighed, discounted and counted. All (B,
T), 0 where not valid.

Valid places of a row follow each other, so that the distance of two is that of their tokens.
"""

import torch
from torch import Tensor

from raykd.losses.all_rows import gather_rows


def returns_to_go(
    values: Tensor, mask: Tensor, *, discount: float = 1.0, current: bool = False
) -> Tensor:
    """sum_{i > t} discount^{i - t} values_i over valid i; `current` begins at i = t."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    apart = steps - steps[:, None]  # [t, i]: i - t
    kernel = torch.where(
        apart >= (0 if current else 1), discount ** apart.clamp(min=0).to(values.dtype), 0.0
    )
    return torch.where(mask, torch.where(mask, values, 0.0) @ kernel.T, 0.0)


def running_products(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the weights before each token, and with its own; weights where not valid count
    1.
    """
    own = torch.where(mask, weight, 1.0).cumprod(1)
    return torch.cat([torch.ones_like(own[:, :1]), own[:, :-1]], 1), own


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Less the mean and over the deviation of the valid places of every worker's rows.

    No gradient flows back.
    """
    held = values.detach()[mask].double()
    sums = torch.stack([held.new_tensor(len(held)), held.sum(), held.square().sum()])
    count, total, squares = gather_rows(sums[None])[0].sum(0)
    mean = total / count.clamp(min=1)
    deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=1e-12).sqrt()
    return torch.where(mask, (values - mean) / deviation, 0.0).to(values.dtype)
