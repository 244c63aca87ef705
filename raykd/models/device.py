"""The device on which a process runs its models."""

import torch

from raykd.errors import Problem, RecipeError
from raykd.models.compiled import check_compiler
from raykd.models.form import check_numbers
from raykd.recipe.recipe import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """The device of this process: CUDA unless it is absent or `scale.device` is "cpu".

    RecipeError where `scale.device` is "cuda" and this process has none, or where it has not the
    numbers of `[precision]`.
    """
    wanted = recipe.scale.device
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        text = '"cuda", but torch sees no CUDA device here; set it to "auto" or "cpu"'
        raise RecipeError([Problem("scale.device", text)])
    if wanted == "auto":
        wanted = "cuda" if has_cuda else "cpu"
    device = torch.device(wanted)
    check_numbers(recipe.precision, device)
    return device


def training_device(recipe: Recipe) -> torch.device:
    """The device of this process, which trains; errors as in `device_of`, and where
    `scale.compile` finds no compiler here.
    """
    device = device_of(recipe)
    if recipe.scale.compile:
        check_compiler(device)
    return device


def on_device(recipe: Recipe, device: str) -> Recipe:
    """The recipe with `scale.device` decided; it gives the same results under the same name."""
    scale = recipe.scale.model_copy(update={"device": device})
    return recipe.model_copy(update={"scale": scale})
