"""A student whose forward pass in training goes through torch.compile.

Compiled are its blocks (the members of an nn.ModuleList), which share one graph where they are
alike, or the whole module where it has none. The head of a large vocabulary, the losses, validation
and the text that a student writes are computed as ever.
"""

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from raykd.errors import Problem, RecipeError
from raykd.models.recompute import blocks_of

KEY = "scale.compile"
BACKEND = "inductor"
GRAPHS = 64  # of one function, each for other shapes and inner layers: torch's limit is 8


def check_compiler(device: torch.device) -> None:
    """RecipeError where this machine has no compiler for code of `device`."""
    lacks = ""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    compiler = (os.environ.get("CXX", "").split() or [usual])[0]
    if shutil.which(compiler) is None:
        lacks = "a C++ compiler; install g++ or name yours by the variable CXX"
    elif device.type == "cuda" and find_spec("triton") is None:
        lacks = "Triton for its GPU; install the package triton"
    if lacks:
        text = f"true, which needs {lacks} on the machines that train, or leave it out"
        raise RecipeError([Problem(KEY, text)])


def compile_student(module: nn.Module, told: Callable[[str], None]) -> None:
    """Let a module's forward pass in training be compiled when it is first called.

    Parameters and hooks keep their names. What cannot be compiled runs as it is written, which is
    `told` once.
    """
    import torch._dynamo.config
    import torch._functorch.config

    # a fault of the backward pass's code is found in the forward pass, where it can be mended
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._dynamo.config.recompile_limit = GRAPHS
    # else a block in which a term reads a layer would take the graph of one in which none does
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.optimize_ddp = False  # whose graphs end where DDP's parcels do
    # of torch's own looking at what a block is given, and not of anything that a user can mend
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    name = type(module).__name__
    compiler = Compiler(name, told)
    for part in blocks_of(module) or [module]:
        part.forward = compiler.compiled(part)


class Compiler:
    """Compiles the parts of one module, until one of them cannot be."""

    def __init__(self, name: str, told: Callable[[str], None]):
        self.name = name
        self.told = told
        self.has_failed = False

    def compiled(self, part: nn.Module) -> Callable[..., Any]:
        """The forward of a part: compiled where it is trained, else as it is written."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        forward = part.forward
        # as the random numbers of a dropout are those of a student that is not compiled
        options: Any = {"fallback_random": True} if BACKEND == "inductor" else None
        quick = torch.compile(forward, fullgraph=True, backend=BACKEND, options=options)

        @functools.wraps(forward)
        def run(*args: Any, **keywords: Any) -> Any:
            if self.has_failed or not (part.training and torch.is_grad_enabled()):
                return forward(*args, **keywords)
            try:
                return quick(*args, **keywords)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                self.has_failed = True
                self.told(f"{KEY}: {self.name} runs as it is written, for {_line(error)}")
            return forward(*args, **keywords)

        return run


def _line(error: Exception) -> str:
    """What went wrong in compiling, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
