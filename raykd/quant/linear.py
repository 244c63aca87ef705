"""Linear layers that compute as their quantised selves."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd.quant.rounding import (
    Learned,
    Rounded,
    as_multiplied,
    check_finite,
    codes_of,
    learnt,
    scale_of,
)
from raykd.recipe.quant import LEVELS, Quant


def be_called(_module: nn.Module, _inputs: Any) -> None:
    """A hook that does nothing.

    torch's encoder layers call submodules that have a hook; of others they only read the weights.
    """


class QuantLinear(nn.Linear):
    """A linear layer under a Quant; None is full precision.

    Its parameters have nn.Linear's names and shapes. `blend` in [0, 1] mixes (1 - blend) W + blend
    Q(W): 0 is full precision, 1 what the runtime computes. A learned scale is one more parameter,
    `scale`.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.quant: Quant | None = None
        self.blend = 1.0
        self.register_parameter("scale", None)
        self.register_forward_pre_hook(be_called)

    @classmethod
    def of(cls, layer: nn.Linear) -> "QuantLinear":
        """The same layer, its parameters shared."""
        linear = cls(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight = layer.weight
        linear.bias = layer.bias
        return linear.train(layer.training)

    def set(self, quant: Quant | None) -> None:
        """Take up a Quant, its scales anew from the weights as they are.

        RecipeError if the weights are not finite.
        """
        check_finite(self.weight, "weights")
        self.quant = quant
        self.scale = None
        if quant and quant.rule == "learned":
            scale = scale_of(self._groups(quant), "learned", LEVELS[quant.weights])
            self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.quant is None or self.blend == 0:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        multiplied = as_multiplied(x.float(), self.quant, in_training=self.training)
        # what is rounded is multiplied in float32, as the runtime will
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(multiplied, self.rounded(), bias).to(x.dtype)

    def rounded(self) -> Tensor:
        """(N, K): the weights that are multiplied with, scale times codes, blended."""
        assert self.quant is not None
        groups = self._groups(self.quant)
        rule = self.quant.rule
        largest = LEVELS[self.quant.weights]
        if self.scale is not None:
            rounded = Learned.apply(groups, self.scale, largest)
        else:
            scale = scale_of(groups.detach(), rule, largest)
            rounded = Rounded.apply(groups, scale, rule, largest)
        rounded = rounded.reshape(self.weight.shape)  # type: ignore[attr-defined]
        return rounded if self.blend == 1 else torch.lerp(self.weight.float(), rounded, self.blend)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(N, K) int8: what an artefact holds.

        RecipeError if training left weights or scales that are not finite.
        """
        assert self.quant is not None
        check_finite(self.weight, "weights")
        groups = self._groups(self.quant)
        codes = codes_of(groups, self._scale(), self._rule(), LEVELS[self.quant.weights])
        return codes.reshape(self.weight.shape).to(torch.int8)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """(N, G) float32: the scale of each output's groups of inputs; G = 1 without groups."""
        assert self.quant is not None
        scale = self._scale().reshape(-1, self._groups(self.quant).shape[1])
        if self.quant.per == "tensor":
            return scale.expand(self.out_features, -1).contiguous()
        return scale

    def _rule(self) -> str:
        assert self.quant is not None
        return "absmax" if self.scale is not None else self.quant.rule

    def _scale(self) -> Tensor:
        assert self.quant is not None
        if self.scale is not None:
            return learnt(self.scale)
        return scale_of(self._groups(self.quant), self.quant.rule, LEVELS[self.quant.weights])

    def _groups(self, quant: Quant) -> Tensor:
        """The weights as (N, G, K / G), or (1, 1, N K) where the whole layer shares a scale."""
        if quant.per == "tensor":
            return self.weight.reshape(1, 1, -1)
        return self.weight.unflatten(1, (-1, quant.columns(self.in_features)))
