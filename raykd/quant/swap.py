"""The swap that puts layers which can be rounded into any model, and what it leaves as it is."""

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
    """A layer, or a parameter that is no layer's, which is computed with in float32."""

    name: str
    reason: str


def prepare(module: nn.Module, quant: Quant) -> list[str]:
    """The names of the layers that are swapped in place: all that the Quant rounds, none rounded
    yet.

    A layer with several names goes by its first. A weight that two layers tie stays one parameter:
    each rounds it for its own operator, and one that is left takes it as it is.
    """
    found = {
        n: m
        for n, m in module.named_modules()
        if isinstance(m, ROUNDABLE) and why_left(n, m, quant) is None
    }
    if not found:
        raise RecipeError(
            f"quant: no linear layer is left to quantise, and no embedding; skip = {quant.skip} and "
            f'embeddings = "{quant.embeddings}" leave out every one'
        )
    replace(module, {m: _swapped(m) for m in found.values()})
    return list(found)


def left(module: nn.Module, quant: Quant) -> list[Left]:
    """Every layer that `prepare` leaves in a module, and every matrix that is no layer's, with the
    reason.

    They are computed with in float32; how they are stored, `Quant.rest` says.
    """
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, ROUNDABLE):
            reason = why_left(name, layer, quant)
            found += [Left(name, reason)] if reason else []
        else:
            own = layer.named_parameters(prefix=name, recurse=False)
            found += [
                Left(n, f"a {type(layer).__name__} has no rounded form")
                for n, p in own
                if p.dim() > 1
            ]
    return found


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
    """Put each new layer wherever its old one stands in the module, under every name it has."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if layer in swaps:
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, swaps[layer])


def quantised(module: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """(name, layer) of every layer that `prepare` has swapped."""
    return ((n, layer) for n, layer in module.named_modules() if isinstance(layer, QuantLayer))


def roundable(module: nn.Module) -> Iterator[tuple[str, QuantLayer | Stored]]:
    """(name, module) of all that takes up a Quant and fades in: layers, and parameters that are
    stored.
    """
    return (
        (n, held) for n, held in module.named_modules() if isinstance(held, QuantLayer | Stored)
    )


def _swapped(layer: nn.Linear | nn.Embedding) -> QuantLayer:
    if isinstance(layer, (QuantLinear, QuantEmbedding)):
        return layer
    return QuantLinear.of(layer) if isinstance(layer, nn.Linear) else QuantEmbedding.of(layer)
