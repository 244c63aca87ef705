"""What follows a token in a text: the rewards after it, weighed and discounted.

All tensors are (B, T), and results are 0 at invalid steps. The valid steps of a row must follow
each other, so that the distance of two steps is that of their tokens.
"""

import torch
from torch import Tensor

from raykd.losses.all_rows import gather_rows


def returns_to_go(
    values: Tensor, mask: Tensor, *, discount: float = 1.0, current: bool = False
) -> Tensor:
    """The discounted sum of the values after each step, sum_{i > t} discount^{i - t} values_i.

    Use it to turn rewards per token into returns, in a policy gradient over text (Sutton and Barto
    2018, section 3.3). The sum is over valid steps i. With `current` it begins at i = t.

    Example:
        >>> import torch
        >>> from raykd.losses import returns_to_go
        >>> rewards = torch.tensor([[1.0, 10.0, 100.0]])
        >>> valid = torch.tensor([[True, True, True]])
        >>> returns_to_go(rewards, valid, discount=0.5)
        tensor([[30., 50.,  0.]])
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    apart = steps - steps[:, None]  # [t, i]: i - t
    first = 0 if current else 1
    powers = discount ** apart.clamp(min=0).to(values.dtype)
    kernel = torch.where(apart >= first, powers, 0.0)
    valid_values = torch.where(mask, values, 0.0)
    return torch.where(mask, valid_values @ kernel.T, 0.0)


def running_products(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the weights before each token, and the product up to and including it.

    Use it for importance weights of a whole prefix. Weights at invalid steps count as 1.

    Example:
        >>> import torch
        >>> from raykd.losses import running_products
        >>> valid = torch.tensor([[True, True, True]])
        >>> before, through = running_products(torch.tensor([[2.0, 3.0, 4.0]]), valid)
        >>> before, through
        (tensor([[1., 2., 6.]]), tensor([[ 2.,  6., 24.]]))
    """
    through = torch.where(mask, weight, 1.0).cumprod(1)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1)
    return before, through


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """The values less their mean and over their standard deviation, over all valid steps.

    Use it to give advantages one scale whatever the batch. Mean and deviation are of the rows of
    every worker, and no gradient flows back through them.

    Example:
        >>> import torch
        >>> from raykd.losses import whitened
        >>> whitened(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]]))
        tensor([[-1.,  1.,  0.]])
    """
    valid = values.detach()[mask].double()
    sums = torch.stack([valid.new_tensor(len(valid)), valid.sum(), valid.square().sum()])
    count, total, squares = gather_rows(sums[None])[0].sum(0)
    mean = total / count.clamp(min=1)
    variance = squares / count.clamp(min=1) - mean.square()
    deviation = variance.clamp(min=1e-12).sqrt()
    return torch.where(mask, (values - mean) / deviation, 0.0).to(values.dtype)
