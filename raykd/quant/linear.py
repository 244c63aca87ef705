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
    """A hook that does nothing: torch's encoder layers call submodules that have one, and else only
    read weights.
    """


class QuantLinear(nn.Linear):
    """A linear layer under a Quant; None is full precision. Its parameters have nn.Linear's names
    and shapes.

    `blend` in [0, 1] mixes (1 - blend) W + blend Q(W): 0 is full precision, 1 what the runtime
    computes. A learned scale is one more parameter, `scale`.
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
        made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def set(self, quant: Quant | None) -> None:
        """Take up a Quant, its scales anew from the weights as they are.

        RecipeError if those are not finite.
        """
        check_finite(self.weight, "weights")
        self.quant, self.scale = quant, None
        if quant and quant.rule == "learned":
            self.scale = nn.Parameter(
                scale_of(self._groups(quant), "learned", LEVELS[quant.weights])
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.quant is None or self.blend == 0:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(as_multiplied(x.float(), self.quant), self.rounded(), bias).to(x.dtype)

    def rounded(self) -> Tensor:
        """(N, K): the weights that are multiplied with, scale times codes, blended."""
        assert self.quant is not None
        groups, largest = self._groups(self.quant), LEVELS[self.quant.weights]
        if self.scale is not None:
            found = Learned.apply(groups, self.scale, largest)
        else:
            found = Rounded.apply(
                groups,
                scale_of(groups.detach(), self.quant.rule, largest),
                self.quant.rule,
                largest,
            )
        found = found.reshape(self.weight.shape)  # type: ignore[attr-defined]
        return found if self.blend == 1 else torch.lerp(self.weight.float(), found, self.blend)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(N, K) int8: what an artefact holds.

        RecipeError if training left weights or scales that are not finite.
        """
        assert self.quant is not None
        check_finite(self.weight, "weights")
        found = codes_of(
            self._groups(self.quant), self._scale(), self._rule(), LEVELS[self.quant.weights]
        )
        return found.reshape(self.weight.shape).to(torch.int8)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """(N, G) float32: the scale of each output's groups of inputs; G = 1 without groups."""
        assert self.quant is not None
        scale = self._scale().reshape(-1, self._groups(self.quant).shape[1])
        return (
            scale.expand(self.out_features, -1).contiguous()
            if self.quant.per == "tensor"
            else scale
        )

    def _rule(self) -> str:
        assert self.quant is not None
        return "absmax" if self.scale is not None else self.quant.rule

    def _scale(self) -> Tensor:
        assert self.quant is not None
        if self.scale is not None:
            return learnt(self.scale)
        return scale_of(self._groups(self.quant), self.quant.rule, LEVELS[self.quant.weights])

    def _groups(self, quant: Quant) -> Tensor:
        """(N, G, K / G), or (1, 1, N K) where the whole layer shares a scale."""
        if quant.per == "tensor":
            return self.weight.reshape(1, 1, -1)
        return self.weight.unflatten(1, (-1, quant.columns(self.in_features)))
