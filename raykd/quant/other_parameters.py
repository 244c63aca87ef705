"""The parameters that no layer rounds: stored as int8 if a Quant says so, multiplied in float32.

They are convolutions, positions and skipped heads: in a small student most of the bytes. Each gets
a parametrisation of torch.nn.utils.parametrize, so a model of any kind reads it rounded. `plain`
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
    """A parameter (N, ...) as int8, with a scale max|W| / 127 for each slice of dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.quant: Quant | None = None
        self.blend = 1.0

    def set(self, quant: Quant | None) -> None:
        """Take up a Quant, which rounds only with rest = "int8"."""
        self.quant = quant if quant and quant.rest == "int8" else None

    def forward(self, value: Tensor) -> Tensor:
        if self.quant is None or self.blend == 0:
            return value
        rows = value.reshape(len(value), 1, -1)
        scale = scale_of(rows.detach(), "absmax", LARGEST)
        rounded: Any = Rounded.apply(rows, scale, "absmax", LARGEST)
        rounded = rounded.reshape(value.shape).to(value.dtype)
        return rounded if self.blend == 1 else torch.lerp(value, rounded, self.blend)


@torch.no_grad()
def codes_and_scales(value: Tensor) -> tuple[Tensor, Tensor]:
    """What an artefact holds of a Stored parameter `value` (N, ...).

    int8 codes of its shape, and float32 scales (N,). RecipeError if training left weights that are
    not finite.
    """
    check_finite(value, "weights")
    rows = value.reshape(len(value), 1, -1)
    scale = scale_of(rows, "absmax", LARGEST)
    codes = codes_of(rows, scale, "absmax", LARGEST).reshape(value.shape).to(torch.int8)
    return codes, scale.reshape(-1)


def prepare(module: nn.Module, rounded: set[nn.Module]) -> None:
    """Parametrise every parameter of two dimensions or more that no `rounded` layer owns."""
    for path, owner in list(module.named_modules()):
        if owner in rounded or isinstance(owner, parametrize.ParametrizationList):
            continue
        for name, value in list(owner.named_parameters(recurse=False)):
            if value.dim() < 2:
                continue
            if not torch.isfinite(value).all():
                raise RecipeError(
                    f"quant: {f'{path}.{name}'.lstrip('.')} is NaN or infinite, "
                    "and cannot be rounded"
                )
            parametrize.register_parametrization(owner, name, Stored())


def stored(module: nn.Module) -> Iterator[tuple[Tensor, Stored]]:
    """(value, parametrisation) of every parameter that `prepare` has parametrised."""
    for parametrisations in module.modules():
        if isinstance(parametrisations, parametrize.ParametrizationList):
            first = parametrisations[0]
            if isinstance(first, Stored):
                yield parametrisations.original, first


@torch.no_grad()
def bake(module: nn.Module) -> None:
    """Make every parametrised parameter what the module reads: float32, rounded where it was."""
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
