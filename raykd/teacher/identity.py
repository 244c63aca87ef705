"""Identities: what a store's content depends on, whose digest names it, and a run's result."""

import inspect
from collections.abc import Mapping
from typing import Any

from raykd.data.rows import Facts
from raykd.errors import DataError, RecipeError
from raykd.files.digests import digest_of
from raykd.losses.reads import stored_for
from raykd.losses.terms import TERMS
from raykd.recipe.digest import BY_ROWS, code_sha256, content_of, recipe_identity
from raykd.recipe.recipe import Recipe
from raykd.store.codecs import CODECS, check_serves
from raykd.store.commit import SCHEMA
from raykd.store.logits import check_fits, codec_name
from raykd.techniques import register

CODEC_KEYS = {
    "dense": ("values",),
    "comb": ("points", "temperatures"),
    "topk": ("top", "temperatures"),
    "hidden": ("head",),
}


def store_identity(recipe: Recipe, rows: Facts) -> dict[str, Any]:
    """Everything the store's content depends on, and nothing else."""
    register(recipe.technique)
    return {
        "schema": SCHEMA,
        "teacher": teacher_identity(recipe),
        "data": {"name": rows.name, "sha256": rows.digest},
        "valence": recipe.valence.model_dump(),
        "store": store_table(recipe, len(rows.classes)),
    }


def teacher_identity(recipe: Recipe) -> dict[str, Any]:
    """What a teacher's answers depend on: its weights, the file of its code, its settings, and the
    numbers that it computes in where they are others than of old.
    """
    assert recipe.teacher is not None
    identity = content_of(recipe.teacher) | {"code": code_sha256(recipe.teacher.model)}
    numbers = recipe.precision.model_dump(exclude_defaults=True, exclude={"student"})
    return identity | ({"precision": numbers} if numbers else {})


def check_teacher(recipe: Recipe, wanted: Mapping[str, Any]) -> None:
    """DataError where the teacher here is not `wanted`, a `teacher_identity` taken elsewhere or
    before.

    Call it after the teacher was loaded: then what was loaded is what was digested, unless
    somebody changed the file twice.
    """
    found = teacher_identity(recipe)
    for key in ("weights", "code", *sorted(found.keys() | wanted.keys())):
        if found.get(key) != wanted.get(key):
            where = "teacher.model" if key == "code" else f"teacher.{key}"
            raise DataError(
                f"{where}: another one than this command began with ({_told(found.get(key))} here, "
                f"{_told(wanted.get(key))} there): the file was changed meanwhile, or differs "
                "between nodes; give the command again when it stays as it is"
            )


def _told(value: Any) -> str:
    """A digest's first digits, or another value whole."""
    text = value if isinstance(value, str) else repr(value)
    return text[:19]


def run_digest(recipe: Recipe, rows: Facts) -> str:
    """Hex sha256 of everything a run's result depends on; eight digits of it name its folder.

    It covers the file of every model's code. Rows of one's own are covered themselves: a folder, a
    bucket and a function that give the same rows give one digest. The order that
    `optim.order = "auto"` comes to is covered where it is "blocks".
    """
    names = {"student": recipe.student.model}
    if recipe.teacher:
        names["teacher"] = recipe.teacher.model
    if "." in recipe.technique:
        names["technique"] = f"{recipe.technique}:"
    code = {}
    for key, name in names.items():
        digest = code_sha256(name)
        if digest:
            code[key] = digest
    has_free_files = recipe.data.settings.get("pinned", True) is False  # those of this Python
    identity = recipe_identity(_ordered(recipe, rows))
    if has_free_files or identity["data"]["source"] == BY_ROWS:
        code["rows"] = rows.digest
    if code:
        identity |= {"code": code}
    return digest_of(identity)


def _ordered(recipe: Recipe, rows: Facts) -> Recipe:
    """The recipe with the order that "auto" comes to, where rows are read in parts."""
    if not rows.in_parts:
        return recipe
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"order": "blocks"})})


def signals_of(recipe: Recipe) -> list[str]:
    """The inner layers that the terms of a recipe, or of one of its trials, read.

    The store holds them besides the answers.
    """
    return sorted(name for name in stored_for(recipe) if "." in name)


def store_table(recipe: Recipe, classes: int) -> dict[str, Any]:
    """The store's table with its codec resolved, without the keys that the codec does not read."""
    codec = codec_name(recipe.store, classes)
    for name, spec in recipe.terms.items():
        if spec.weight > 0 and "logits" in TERMS[name].needs:
            _check_served(name, codec)
    table: dict[str, Any] = {"codec": codec}
    for key in ("rows_per_shard", "batch", *CODEC_KEYS[codec]):
        table[key] = getattr(recipe.store, key)
    if "temperatures" in table:
        table["temperatures"] = recipe.store.temperatures or _temperatures(recipe, codec)
    check_fits(table, classes)
    return table


def check_rows(rows: Facts, identity: Mapping[str, Any]) -> None:
    """DataError where the rows are others than those that a store was made from.

    `identity` is the store's.
    """
    stored = identity["data"]["sha256"]
    if rows.digest != stored:
        raise DataError(
            f"data.source: {rows.name} has other rows here than where its store was made "
            f"(sha256 {rows.digest[:12]}, and {stored[:12]} there); let it give the same rows "
            "in the same order at every call, on every node"
        )


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
                f"search.terms.{name}.temperature: a {codec!r} store serves the temperatures it "
                'was drawn for; write { choice = [1.0, 1.5, 2.0] }, or store.codec = "dense"'
            )
        choices = span.choice or [] if span else []
        grid |= {float(t) for t in choices}  # type: ignore[arg-type]
    return sorted(grid) or [1.0]
