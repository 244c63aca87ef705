"""The device on which a process runs its models."""

import torch

from raykd.recipe.recipe import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """The device of this process: CUDA unless it is absent or `scale.device` is "cpu"."""
    wanted = recipe.scale.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)
