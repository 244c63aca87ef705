"""One file a technique: a docstring, a literal RECIPE, and at most one small function."""

import importlib
import pkgutil


def load_terms() -> None:
    """Import the shared terms and every technique of the package, so that their terms are registered."""
    importlib.import_module("raykd.losses")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
