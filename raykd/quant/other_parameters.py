"""The parameters that no layer rounds: stored as int8 where a Quant says so, and multiplied in
float32.

Convolutions, positions, skipped heads: in a small student they are most of the bytes. Each is a
parametrisation of torch.nn.utils.parametrize, so a model of any kind reads it rounded; `plain`
gives its tensors their own names back.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raykd.errors import RecipeError
from raykd.quant.rounding import Rounded, check_finite, codes_of, scale_of
from raykd.recipe.quant import LEVELS, Quant

LARGEST = LEVELS["int8"]


class Stored(nn.Module):
    """A parameter (N, ...) as int8 holds it: a scale max|W| / 127 for each slice of the first
    dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quant: Quant | None = None
        self.blend = 1.0

    def set(self, quant: Quant | None) -> None:
        """Take up a Quant; it rounds only where that says rest = "int8"."""
        self.quant = quant if quant and quant.rest == "int8" else None

    def forward(self, value: Tensor) -> Tensor:
        if self.quant is None or self.blend == 0:
            return value
        rows = value.reshape(len(value), 1, -1)
        found: Any = Rounded.apply(
            rows, scale_of(rows.detach(), "absmax", LARGEST), "absmax", LARGEST
        )
        found = found.reshape(value.shape).to(value.dtype)
        return found if self.blend == 1 else torch.lerp(value, found, self.blend)


@torch.no_grad()
def codes_and_scales(value: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes like `value` (N, ...) and float32 scales (N,): what an artefact holds of a Stored
    parameter.

    RecipeError if training left weights that are not finite.
    """
    check_finite(value, "weights")
    rows = value.reshape(len(value), 1, -1)
    scale = scale_of(rows, "absmax", LARGEST)
    return codes_of(rows, scale, "absmax", LARGEST).reshape(value.shape).to(
        torch.int8
    ), scale.reshape(-1)


def prepare(module: nn.Module, rounded: set[nn.Module]) -> None:
    """Parametrise every parameter of two dimensions or more whose owner is not among the `rounded`
    layers.
    """
    for name, owner in list(module.named_modules()):
        for own, value in list(owner.named_parameters(recurse=False)):
            if (
                owner in rounded
                or value.dim() < 2
                or isinstance(owner, parametrize.ParametrizationList)
            ):
                continue
            if not torch.isfinite(value).all():
                raise RecipeError(
                    f"quant: {f'{name}.{own}'.lstrip('.')} is NaN or infinite, and can not be rounded"
                )
            parametrize.register_parametrization(owner, own, Stored())


def stored(module: nn.Module) -> Iterator[tuple[Tensor, Stored]]:
    """(value, parametrisation) of every parameter that `prepare` has parametrised."""
    for found in module.modules():
        if isinstance(found, parametrize.ParametrizationList) and isinstance(
            held := found[0], Stored
        ):
            yield found.original, held


@torch.no_grad()
def bake(module: nn.Module) -> None:
    """Make every parametrised parameter what the module reads: float32, and rounded where it was."""
    for owner in list(module.modules()):
        if parametrize.is_parametrized(owner):
            for name in list(owner.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(owner, name)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a state dict under the names they had before `prepare`."""
    return {plain_name(name): value for name, value in tensors.items()}


def plain_name(name: str) -> str:
    """ "conv.parametrizations.weight.original" as "conv.weight"; any other name as it is."""
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", name)
