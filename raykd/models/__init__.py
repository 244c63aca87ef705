"""Models: a recipe's `[teacher]` or `[student]` table as a module, and a module's weights."""

from raykd.models.build import build_model, register_model
from raykd.models.weights import load_weights, weights_of

__all__ = ["build_model", "load_weights", "register_model", "weights_of"]
