"""What a teacher store's content depends on, and nothing else: its digest names the store."""

import importlib.util
import inspect
from typing import Any

from raykd.checks import apply_trial, register
from raykd.data import Dataset
from raykd.errors import RecipeError
from raykd.recipe import ModelRef, Recipe, content_of, file_sha256
from raykd.store.commit import SCHEMA
from raykd.store.logits import codec_name
from raykd.terms import TERMS, needs_of

CODEC_KEYS = {
    "dense": ("values",),
    "comb": ("points", "temperatures"),
    "topk": ("top", "temperatures"),
    "hidden": ("head",),
}


def identity(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Everything the store's content depends on, and nothing else."""
    assert recipe.teacher is not None
    register(recipe.technique)
    return {
        "schema": SCHEMA,
        "teacher": content_of(recipe.teacher) | {"code": _code_digest(recipe.teacher)},
        "data": {"name": dataset.name, "sha256": dataset.digest},
        "valence": recipe.valence.model_dump(),
        "store": store_table(recipe, len(dataset.classes)),
    }


CODEC_KEYS = {
    "dense": ("values",),
    "comb": ("points", "temperatures"),
    "topk": ("top", "temperatures"),
    "hidden": ("head",),
}


def signals_of(recipe: Recipe) -> list[str]:
    """The inner layers that a recipe's terms read, or one of its trials': what its store holds beyond the answers."""
    raw = recipe.model_dump(mode="json")
    spans = recipe.search.space.items() if recipe.search else ()
    trials = [{key: value} for key, span in spans if key.startswith("terms.") for value in span.ends()]
    read = [needs_of(Recipe.model_validate(apply_trial(raw, trial)).terms) for trial in ({}, *trials)]
    return sorted(name for name in frozenset().union(*read) if "." in name)


def store_table(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The store's table, its codec resolved, without the keys that this codec does not read."""
    codec = codec_name(recipe.store, classes)
    found = {"codec": codec} | {
        key: getattr(recipe.store, key) for key in ("rows_per_shard", "batch", *CODEC_KEYS[codec])
    }
    if "temperatures" in found:
        found["temperatures"] = recipe.store.temperatures or _temperatures(recipe, codec)
    return found


def _temperatures(recipe: Recipe, codec: str) -> list[float]:
    """Every temperature at which a term of the recipe, or of its trials, reads the logits."""
    grid = set()
    for name, spec in recipe.terms.items():
        setting = inspect.signature(TERMS[name].make).parameters.get("temperature")
        if setting is None or spec.weight == 0:
            continue
        grid.add(float(spec.settings.get("temperature", setting.default)))  # type: ignore[arg-type]
        span = recipe.search.space.get(f"terms.{name}.temperature") if recipe.search else None
        if span and span.choice is None:
            raise RecipeError(
                f"search.terms.{name}.temperature: a {codec!r} store serves the temperatures it was drawn for; write "
                '{ choice = [1.0, 1.5, 2.0] }, or store.codec = "dense"'
            )
        grid |= {float(t) for t in (span.choice or [] if span else [])}  # type: ignore[arg-type]
    return sorted(grid) or [1.0]


def _code_digest(ref: ModelRef) -> str | None:
    """The digest of a user's own model file; None for a model that ships with raykd."""
    spec = importlib.util.find_spec(ref.model.partition(":")[0]) if ":" in ref.model else None
    return file_sha256(spec.origin) if spec and spec.origin else None
