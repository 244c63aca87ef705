"""Weights into and out of a module, by the names that its state dict gives them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.quant.other_parameters import plain, plain_name

SHOWN = 8  # faults that an error lists


def load_weights(module: nn.Module, path: Path, key: str) -> None:
    """Fill `module` from a safetensors file.

    RecipeError lists the tensors that are missing, extra or of another shape; `key` is the table of
    the recipe that names the file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> save_file(weights_of(nn.Linear(3, 2)), path)
        >>> load_weights(nn.Linear(3, 2), path, "student")
    """
    fill(module, read_tensors(path, f"{key}.weights"), f"{key}.weights {path}")


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. RecipeError, which starts with `key`, if it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{key} {path}: not a readable safetensors file: {error}") from None


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, on the CPU; a tied tensor appears once, under its first name.

    Example:
        >>> sorted(weights_of(torch.nn.Linear(3, 2)))
        ['bias', 'weight']
    """
    tensors = plain(module.state_dict())
    tied = _first_names(tensors)
    return {
        name: value.detach().cpu().contiguous()
        for name, value in tensors.items()
        if name not in tied
    }


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load exactly these tensors into `module`.

    RecipeError lists those that are missing, extra or of another shape in the `source`. A tied
    tensor may appear once, under its first name.
    """
    state = plain(module.state_dict())
    tensors = dict(tensors)
    for name, first in _first_names(state).items():
        if first not in tensors:
            continue
        if name in tensors and not torch.equal(tensors[name], tensors[first]):
            raise RecipeError(
                f"{source}: {name} and {first} differ there, but the module ties them; "
                "set tied = false"
            )
        tensors.setdefault(name, tensors[first])
    faults = _misfits(state, tensors)
    if faults:
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        listed = "\n  ".join(faults[:SHOWN])
        raise RecipeError(f"{source} do not fit the module:\n  {listed}{more}")
    names = {plain_name(name): name for name in module.state_dict()}
    module.load_state_dict({names[name]: value for name, value in tensors.items()})


def _misfits(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor whose shape is not the module's."""
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    return [
        f"{name}: the module has {wanted.get(name, 'none')}, the file {given.get(name, 'none')}"
        for name in sorted(wanted.keys() | given.keys())
        if wanted.get(name) != given.get(name)
    ]


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tied tensor, by each of its other names."""
    first_of: dict[Any, str] = {}
    others = {}
    for name, value in tensors.items():
        if not value.numel():
            continue
        first = first_of.setdefault((value.data_ptr(), value.shape), name)
        if first != name:
            others[name] = first
    return others
