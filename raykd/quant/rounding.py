"""Rounding in the forward pass, the identity in the backward pass.

So a model computes what its runtime will, and can still be trained. Everything is float32.
Gradients are straight through (Bengio et al. 2013, arXiv 1308.3432).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raykd.errors import RecipeError
from raykd.recipe.quant import Quant

LEAST = 1e-8  # of a scale: a group of zeros has codes of zero under any scale


def scale_of(weight: Tensor, rule: str, largest: int) -> Tensor:
    """(N, G, 1): the scale of each group of weights (N, G, K / G).

    absmax: max|W| / largest. absmean: mean|W| (BitNet b1.58, arXiv 2402.17764). twn: the mean of
    |W| above 0.7 mean|W| (arXiv 1605.04711). learned starts at 2 mean|W| / sqrt(largest) (LSQ,
    arXiv 1902.08153, section 2.1).
    """
    size = weight.float().abs()
    mean = size.mean(-1, keepdim=True)
    if rule == "absmax":
        return (size.amax(-1, keepdim=True) / largest).clamp(min=LEAST)
    if rule == "twn":
        above = size > 0.7 * mean
        count = above.sum(-1, keepdim=True).clamp(min=1)
        return ((size * above).sum(-1, keepdim=True) / count).clamp(min=LEAST)
    return (mean if rule == "absmean" else 2 * mean / largest**0.5).clamp(min=LEAST)


def codes_of(weight: Tensor, scale: Tensor, rule: str, largest: int) -> Tensor:
    """Codes in -largest..largest as float32, of groups (N, G, K / G) with scales (N, G, 1)."""
    if rule == "twn":
        size = weight.float().abs()
        return weight.float().sign() * (size > 0.7 * size.mean(-1, keepdim=True))
    return (weight.float() / scale).round_().clamp_(-largest, largest)


def learnt(scale: Tensor) -> Tensor:
    """A learned scale as it is multiplied with: at least LEAST.

    RecipeError if it is NaN or infinite.
    """
    check_finite(scale, "scales")
    return scale.detach().clamp(min=LEAST)


def check_finite(values: Tensor, what: str) -> None:
    """RecipeError if any is NaN or infinite; `what` names them."""
    if not torch.isfinite(values).all():
        raise RecipeError(
            f"quant: a layer's {what} are NaN or infinite, and cannot be rounded; "
            "lower optim.learning_rate"
        )


def as_multiplied(x: Tensor, quant: Quant, *, in_training: bool = False) -> Tensor:
    """Activations (..., K) as the operator of a Quant multiplies them, float32.

    In training a call is that of all workers, each with its share of the batch.
    """
    if quant.activations == "none":
        return x.float()
    if quant.over_the_call:
        return Activations.apply(x, in_training)  # type: ignore[return-value]
    inputs = x.shape[-1]
    return Blocks.apply(x, inputs if quant.weights == "int8" else quant.block(inputs))  # type: ignore[return-value]


class Rounded(torch.autograd.Function):
    """scale * codes(weight). The weight gets the upstream gradient, the scale none.

    The scale follows the weights. No weight is out of range under absmax; under absmean and twn the
    outer codes stand for everything beyond them.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, rule: str, largest: int) -> Tensor:
        return codes_of(weight, scale, rule, largest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


class Learned(torch.autograd.Function):
    """LSQ: round(clip(w / s)) s with a gradient for s, too (arXiv 1902.08153, eq. 1-5).

    d/ds = round(w / s) - w / s inside the range and -largest or largest outside it, times 1 /
    sqrt(n largest) with n the number of weights that share s. A step of the optimiser may take s
    below 0, which would flip every sign. Such an s counts as LEAST, and takes only a gradient that
    raises it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, largest: int) -> Tensor:
        least = scale.clamp(min=LEAST)
        ratio = weight.float() / least
        ctx.save_for_backward(ratio, scale)
        ctx.largest = largest
        return ratio.clamp(-largest, largest).round_().mul_(least)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        ratio, scale = ctx.saved_tensors
        upstream = gradients[0]
        largest = ctx.largest
        inside = ratio.abs() <= largest
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(-largest, largest))
        share = (ratio.shape[-1] * largest) ** -0.5
        rise = share * (upstream * slope).sum(-1, keepdim=True)
        return upstream * inside, torch.where(scale > LEAST, rise, rise.clamp(max=0)), None


class Activations(torch.autograd.Function):
    """Activations as ONNX's DynamicQuantizeLinear rounds them: uint8 over the tensor's range.

    The range includes zero: scale = (max(x, 0) - min(x, 0)) / 255, zero point = round(-min / scale)
    in 0..255. Every value is in the range, so the gradient is the upstream one. If it is `shared`,
    the range is that of all workers, which must then call at the same time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: bool = False) -> Tensor:
        reach = torch.stack([-x.amin(), x.amax()]).clamp(min=0).float()  # below zero, and above
        if shared and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(reach, dist.ReduceOp.MAX)
        low = -reach[0]
        high = reach[1]
        scale = ((high - low) / 255).clamp(min=LEAST)
        zero = (-low / scale).round_().clamp_(0, 255)
        return (x.float() / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Blocks(torch.autograd.Function):
    """Activations as MatMulNBits rounds them at accuracy_level 4: int8 over blocks of a row.

    scale = max|x| / 127, without a zero point. A block as long as the row is a token's own int8
    (arXiv 2208.07339, section 3.1). Every value is in the range, so the gradient is the upstream
    one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        inputs = x.shape[-1]
        blocks = F.pad(x.float(), (0, -inputs % block)).unflatten(-1, (-1, block))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_(min=LEAST)
        return blocks.div(scale).round_().mul_(scale).flatten(-2)[..., :inputs]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
