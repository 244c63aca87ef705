"""The swap that puts layers that can round into any model, and what it leaves unrounded."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from raykd.errors import RecipeError
from raykd.quant.embedding import QuantEmbedding
from raykd.quant.linear import QuantLinear
from raykd.quant.other_parameters import Stored
from raykd.recipe.quant import Quant

QuantLayer = QuantLinear | QuantEmbedding
ROUNDABLE = (nn.Linear, nn.Embedding)


class Left(NamedTuple):
    """A layer, or a parameter of no layer, that is computed with in float32."""

    name: str
    reason: str


def prepare(module: nn.Module, quant: Quant) -> list[str]:
    """Swap in place all layers that a Quant rounds, without rounding them yet; their names.

    A layer with several names goes by its first. A weight that two layers tie stays one parameter:
    each rounds it for its own operator, and a layer that is left unrounded takes it as it is.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, ROUNDABLE) and why_left(name, layer, quant) is None
    }
    if not layers:
        raise RecipeError(
            f"quant: no linear layer is left to quantise, and no embedding; skip = {quant.skip} "
            f'and embeddings = "{quant.embeddings}" leave out every one'
        )
    replace(module, {layer: _swapped(layer) for layer in layers.values()})
    return list(layers)


def left(module: nn.Module, quant: Quant) -> list[Left]:
    """Every layer that `prepare` leaves, and every matrix of no layer, each with the reason.

    They are computed with in float32; `Quant.rest` says how they are stored.
    """
    unrounded = []
    for name, layer in module.named_modules():
        if isinstance(layer, ROUNDABLE):
            reason = why_left(name, layer, quant)
            if reason:
                unrounded.append(Left(name, reason))
            continue
        reason = f"a {type(layer).__name__} has no rounded form"
        for full_name, parameter in layer.named_parameters(prefix=name, recurse=False):
            if parameter.dim() > 1:
                unrounded.append(Left(full_name, reason))
    return unrounded


def why_left(name: str, layer: nn.Linear | nn.Embedding, quant: Quant) -> str | None:
    """Why a Quant leaves a layer of this name as it is; None where it is rounded."""
    if not name:
        return "it is the whole module, and has no owner to swap it"
    if quant.skips(name):
        return "skip names it"
    if type(layer) not in (*ROUNDABLE, QuantLinear, QuantEmbedding):
        # as nn.MultiheadAttention's out_proj
        return f"a {type(layer).__name__} may be read by its owner and never called"
    if isinstance(layer, nn.Embedding) and quant.embeddings == "none":
        return 'embeddings = "none"'
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm rewrites its rows as they are read"
    return None


def replace(module: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new layer in place of its old one, under every name that this has."""
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if layer in swaps:
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, swaps[layer])


def quantised(module: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every layer that `prepare` has swapped."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLayer):
            yield name, layer


def roundable(module: nn.Module) -> Iterator[tuple[str, QuantLayer | Stored]]:
    """(name, module) of all that takes up a Quant and fades in: layers and stored parameters."""
    for name, part in module.named_modules():
        if isinstance(part, QuantLayer | Stored):
            yield name, part


def _swapped(layer: nn.Linear | nn.Embedding) -> QuantLayer:
    if isinstance(layer, (QuantLinear, QuantEmbedding)):
        return layer
    return QuantLinear.of(layer) if isinstance(layer, nn.Linear) else QuantEmbedding.of(layer)
