"""Models: a recipe's `[teacher]` or `[student]` table to a module, and any module to Signals."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.quant.other_parameters import plain, plain_name
from raykd.recipe import imports
from raykd.recipe.recipe import ModelRef
from raykd.recipe.validation import suggestion
from raykd.recipe.weight_files import TRANSFORMERS

MODELS: dict[str, Callable[..., nn.Module]] = {"series_encoder": SeriesEncoder, "llama": Llama}


def register_model(name: str, factory: Callable[..., nn.Module]) -> None:
    """Make `factory(classes=, **settings)` known to recipes as `model = name`.

    A factory with a parameter `channels` is also told how many a step has, one with `steps` the
    number of steps of the data's longest row.
    """
    MODELS[name] = factory


def build(ref: ModelRef, *, channels: int, classes: int, steps: int, key: str) -> nn.Module:
    """The module of a recipe's table with its weights loaded.

    RecipeError if either does not fit; `key` names it.
    """
    if ref.model == TRANSFORMERS or (ref.weights and Path(ref.weights).is_dir()):
        from raykd.models import folder  # whose readers need this module

        return folder.build(ref, classes=classes, steps=steps, key=key)
    factory = MODELS.get(ref.model) or _imported(ref.model, key)
    takes, told = (
        inspect.signature(factory).parameters,
        {"channels": channels, "classes": classes, "steps": steps},
    )
    every = any(taken.kind is taken.VAR_KEYWORD for taken in takes.values())
    shape = {
        k: v for k, v in told.items() if k in takes or k == "classes" or (k == "channels" and every)
    }
    try:
        module = factory(**{**shape, **ref.settings})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{key}.settings: {ref.model} refuses {ref.settings}: {error}") from None
    if ref.weights:
        load_weights(module, Path(ref.weights), key)
    return module


def load_weights(module: nn.Module, path: Path, key: str) -> None:
    """Fill `module` from a safetensors file; RecipeError names the tensors that are missing, extra
    or misshapen.
    """
    fill(module, read_tensors(path, f"{key}.weights"), f"{key}.weights {path}")


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. RecipeError if it is none; `key` says who wants it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{key} {path}: not a readable safetensors file: {error}") from None


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors under their own names; one that is tied stands under its first."""
    tensors = plain(module.state_dict())
    tied = _tied(tensors)
    return {
        name: value.detach().cpu().contiguous()
        for name, value in tensors.items()
        if name not in tied
    }


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tensor, by every other name of it."""
    first: dict[Any, str] = {}
    own = {n: first.setdefault((v.data_ptr(), v.shape), n) for n, v in tensors.items() if v.numel()}
    return {name: other for name, other in own.items() if name != other}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load exactly these tensors; RecipeError names those that are missing, extra or misshapen in
    the `source`.

    One that is tied to another may stand there once, under the first of its names.
    """
    state = plain(module.state_dict())
    for name, own in _tied(state).items():
        if name in tensors and own in tensors and not torch.equal(tensors[name], tensors[own]):
            raise RecipeError(
                f"{source}: {name} and {own} differ there, and are one in the module; set tied = false"
            )
    once = {
        name: tensors[own]
        for name, own in _tied(state).items()
        if name not in tensors and own in tensors
    }
    tensors = {**tensors, **once}
    names = {plain_name(name): name for name in module.state_dict()}
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    faults = [
        f"{n}: the module has {wanted.get(n, 'none')}, the file {found.get(n, 'none')}"
        for n in sorted(wanted.keys() | found.keys())
        if wanted.get(n) != found.get(n)
    ]
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise RecipeError(f"{source} do not fit the module:\n  " + "\n  ".join(faults[:8]) + more)
    module.load_state_dict({names[name]: value for name, value in tensors.items()})


def _imported(name: str, key: str) -> Callable[..., Any]:
    if ":" not in name:
        raise RecipeError(
            f"{key}.model {name!r}: no such model.{suggestion(name, MODELS)} Or name module:factory."
        )
    return imports.load(name, f"{key}.model")
