"""raykd: distil a large PyTorch teacher into a small student, on Ray, from a laptop to a cluster.

    import raykd
    run = raykd.run(raykd.load("recipe.toml"))

The verbs are those of the command line. `term`, `Signals`, `Batch` and `TermValues` are for authors
of techniques. Nothing heavy is imported until a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raykd.losses.terms import TermValues, term
    from raykd.models import register_model
    from raykd.recipe.recipe import Recipe
    from raykd.signals import Batch, Signals
    from raykd.stages.load import load
    from raykd.stages.walk import export, report, run, score, train, tune

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Recipe",
    "Signals",
    "TermValues",
    "export",
    "load",
    "register_model",
    "report",
    "run",
    "score",
    "term",
    "train",
    "tune",
]

HOMES = {
    "stages.load": ("load",),
    "losses.terms": ("TermValues", "term"),
    "models": ("register_model",),
    "recipe.recipe": ("Recipe",),
    "signals": ("Batch", "Signals"),
    "stages.walk": ("export", "report", "run", "score", "train", "tune"),
}


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"raykd.{home}"), name)
    raise AttributeError(f"module 'raykd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
