"""Blocks whose inner values are computed again in the backward pass, in place of being kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raykd.errors import Problem, RecipeError


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The members of every outermost nn.ModuleList whose members are of one class and learn."""
    if isinstance(module, nn.ModuleList) and _are_alike(module):
        return list(module)
    return [block for part in module.children() for block in blocks_of(part)]


def check_blocks(module: nn.Module) -> None:
    """RecipeError where a student has no blocks."""
    if not blocks_of(module):
        text = (
            f'"blocks", but {type(module).__name__} has no nn.ModuleList of layers of one class; '
            "put them into one, or leave it out"
        )
        raise RecipeError([Problem("scale.recompute", text)])


def recompute_blocks(module: nn.Module) -> None:
    """Let each block keep its inputs alone between forward and backward pass.

    Values and gradients are the same bits; names of parameters and hooks stay.
    """
    for block in blocks_of(module):
        block.forward = _computed_again(block.forward)


def _are_alike(blocks: nn.ModuleList) -> bool:
    """Whether they are one or more modules of one class, with parameters."""
    kinds = {type(block) for block in blocks}
    return len(kinds) == 1 and all(any(True for _ in block.parameters()) for block in blocks)


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **keywords)
        return checkpoint(forward, *args, use_reentrant=False, **keywords)

    return run
