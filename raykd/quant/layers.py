"""Linear layers that compute as their quantised selves, and the swap that puts them into any model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.quant.fake import Activations, Blocks, Learned, Rounded, codes_of, scale_of
from raykd.quant.rest import Stored
from raykd.quant.scheme import LEVELS, Quant


def be_called(_module: nn.Module, _inputs: Any) -> None:
    """A hook that does nothing: torch's encoder layers call submodules that have one, and else only read weights."""


class QuantLinear(nn.Linear):
    """A linear layer under a Quant; None is full precision. Its parameters have nn.Linear's names and shapes.

    `blend` in [0, 1] mixes (1 - blend) W + blend Q(W): 0 is full precision, 1 what the runtime computes. A learned
    scale is one more parameter, `scale`.
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
        """Take up a Quant, its scales anew from the weights as they are. RecipeError if those are not finite."""
        if not torch.isfinite(self.weight).all():
            raise RecipeError("quant: a layer's weights are NaN or infinite, and can not be rounded")
        self.quant, self.scale = quant, None
        if quant and quant.rule == "learned":
            self.scale = nn.Parameter(scale_of(self._groups(quant), "learned", LEVELS[quant.weights]))

    def forward(self, x: Tensor) -> Tensor:
        if self.quant is None or self.blend == 0:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(self._as_multiplied(x.float()), self.rounded(), bias).to(x.dtype)

    def rounded(self) -> Tensor:
        """(N, K): the weights that are multiplied with, scale times codes, blended."""
        assert self.quant is not None
        groups, largest = self._groups(self.quant), LEVELS[self.quant.weights]
        if self.scale is not None:
            found = Learned.apply(groups, self.scale, largest)
        else:
            found = Rounded.apply(groups, scale_of(groups.detach(), self.quant.rule, largest), self.quant.rule, largest)
        found = found.reshape(self.weight.shape)  # type: ignore[attr-defined]
        return found if self.blend == 1 else torch.lerp(self.weight.float(), found, self.blend)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(N, K) int8: what an artefact holds."""
        assert self.quant is not None
        found = codes_of(self._groups(self.quant), self._scale(), self._rule(), LEVELS[self.quant.weights])
        return found.reshape(self.weight.shape).to(torch.int8)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """(N, G) float32: the scale of each output's groups of inputs; G = 1 without groups."""
        assert self.quant is not None
        scale = self._scale().reshape(-1, self._groups(self.quant).shape[1])
        return scale.expand(self.out_features, -1).contiguous() if self.quant.per == "tensor" else scale

    def _as_multiplied(self, x: Tensor) -> Tensor:
        assert self.quant is not None
        if self.quant.activations == "none":
            return x
        blocks = self.quant.weights != "int8"
        return Blocks.apply(x, self.quant.block(self.in_features)) if blocks else Activations.apply(x)  # type: ignore[return-value]

    def _rule(self) -> str:
        assert self.quant is not None
        return "absmax" if self.scale is not None else self.quant.rule

    def _scale(self) -> Tensor:
        assert self.quant is not None
        if self.scale is not None:
            return self.scale.detach()
        return scale_of(self._groups(self.quant), self.quant.rule, LEVELS[self.quant.weights])

    def _groups(self, quant: Quant) -> Tensor:
        """(N, G, K / G), or (1, 1, N K) where the whole layer shares a scale."""
        if quant.per == "tensor":
            return self.weight.reshape(1, 1, -1)
        return self.weight.unflatten(1, (-1, quant.columns(self.in_features)))


def prepare(module: nn.Module, quant: Quant) -> list[str]:
    """The names of the linear layers that are swapped in place: all that the Quant does not skip, none rounded yet.

    A layer with several names goes by its first. Subclasses of nn.Linear stay, as in nn.MultiheadAttention: their
    owners read the weights and never call them.
    """
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and n}
    found = {n: m for n, m in linear.items() if type(m) in (nn.Linear, QuantLinear) and not quant.skips(n)}
    if not found:
        raise RecipeError(f"quant: no linear layer is left to quantise; skip = {quant.skip} leaves out every one")
    replace(module, {m: QuantLinear.of(m) for m in found.values() if not isinstance(m, QuantLinear)})
    return list(found)


def replace(module: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new layer wherever its old one stands in the module, under every name it has."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if layer in swaps:
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, swaps[layer])


def quantised(module: nn.Module) -> Iterator[tuple[str, "QuantLinear | Stored"]]:
    """(name, layer) of every layer that has been swapped in or parametrised."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantLinear | Stored))
