"""What a teacher store's content depends on, and nothing else: its digest names the store."""

import importlib.util
import inspect
from typing import Any

from raykd.data import Dataset
from raykd.errors import RecipeError
from raykd.files.digests import digest_of, file_sha256
from raykd.losses.terms import TERMS, needs_of
from raykd.recipe.digest import content_of, recipe_identity
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import apply_trial
from raykd.store.codecs import CODECS, check_serves
from raykd.store.commit import SCHEMA
from raykd.store.logits import codec_name
from raykd.techniques import register

CODEC_KEYS = {
    "dense": ("values",),
    "comb": ("points", "temperatures"),
    "topk": ("top", "temperatures"),
    "hidden": ("head",),
}


def store_identity(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Everything the store's content depends on, and nothing else."""
    assert recipe.teacher is not None
    register(recipe.technique)
    return {
        "schema": SCHEMA,
        "teacher": content_of(recipe.teacher) | {"code": _code_digest(recipe.teacher.model)},
        "data": {"name": dataset.name, "sha256": dataset.digest},
        "valence": recipe.valence.model_dump(),
        "store": store_table(recipe, len(dataset.classes)),
    }


def run_digest(recipe: Recipe, dataset: Dataset) -> str:
    """Hex sha256 of everything a run's result depends on; its first eight digits name the run's
    folder.

    The files that a function reads are unknown, so its rows count; and the file of every model's
    and function's code.
    """
    tables = {"data": recipe.data.source, "student": recipe.student.model}
    tables |= {"teacher": recipe.teacher.model} if recipe.teacher else {}
    tables |= {"technique": f"{recipe.technique}:"} if "." in recipe.technique else {}
    code = {key: found for key, name in tables.items() if (found := _code_digest(name))}
    own = recipe.data.settings.get("pinned", True) is False  # the files of this Python
    rows = {"rows": dataset.digest} if "data" in code or own else {}
    return digest_of(recipe_identity(recipe) | ({"code": code | rows} if code or rows else {}))


def signals_of(recipe: Recipe) -> list[str]:
    """The inner layers that a recipe's terms read, or one of its trials': what its store holds
    beyond the answers.
    """
    raw = recipe.model_dump(mode="json")
    spans = recipe.search.space.items() if recipe.search else ()
    trials = [
        {key: value} for key, span in spans if key.startswith("terms.") for value in span.ends()
    ]
    read = [
        needs_of(Recipe.model_validate(apply_trial(raw, trial)).terms) for trial in ({}, *trials)
    ]
    return sorted(name for name in frozenset().union(*read) if "." in name)


def store_table(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The store's table, its codec resolved, without the keys that this codec does not read."""
    codec = codec_name(recipe.store, classes)
    for name, spec in recipe.terms.items():
        if spec.weight > 0 and "logits" in TERMS[name].needs:
            _check_served(name, codec)
    found = {"codec": codec} | {
        key: getattr(recipe.store, key) for key in ("rows_per_shard", "batch", *CODEC_KEYS[codec])
    }
    if "temperatures" in found:
        found["temperatures"] = recipe.store.temperatures or _temperatures(recipe, codec)
    return found


def _check_served(name: str, codec: str) -> None:
    try:
        check_serves(CODECS[codec], TERMS[name].divergence)
    except RecipeError as error:
        raise RecipeError(f"terms.{name}: {error}") from None


def _temperatures(recipe: Recipe, codec: str) -> list[float]:
    """Every temperature at which a term of the recipe, or of its trials, reads the logits."""
    grid = set()
    for name, spec in recipe.terms.items():
        setting = inspect.signature(TERMS[name].make).parameters.get("temperature")
        if setting is None or spec.weight == 0 or "logits" not in TERMS[name].needs:
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


def _code_digest(name: str) -> str | None:
    """The digest of the file of a user's own `module:function`; None for a name that ships with
    raykd.
    """
    spec = importlib.util.find_spec(name.partition(":")[0]) if ":" in name else None
    return file_sha256(spec.origin) if spec and spec.origin else None
