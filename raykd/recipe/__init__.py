"""What is asked for, as checked tables. No torch, no Ray."""

from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Export, Recipe
from raykd.recipe.tables import DataRef, ModelRef, Optim, Pair, Phase, StudentRef, TermSpec

__all__ = [
    "DataRef",
    "Export",
    "ModelRef",
    "Optim",
    "Pair",
    "Phase",
    "Quant",
    "Recipe",
    "StudentRef",
    "TermSpec",
]
