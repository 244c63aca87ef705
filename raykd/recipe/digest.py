"""What decides a result, as digests: of files, tables and whole recipes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raykd.files.digests import file_sha256, files_sha256
from raykd.files.open import open_place
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import ModelRef
from raykd.recipe.toml import is_path
from raykd.recipe.weight_files import hashed_files

NOT_HASHED = {"name", "setting", "scale", "track", "export"}


def weights_sha256(path: str | Path) -> str:
    """Hex sha256 of a file of weights, or of a model's folder: its config.json and safetensors
    files.
    """
    path = Path(path)
    return files_sha256(path, hashed_files(path)) if path.is_dir() else file_sha256(path)


def content_of(table: BaseModel) -> dict[str, Any]:
    """A table's values, with every path replaced by the digest of what lies there."""
    values = table.model_dump(mode="json")
    for key in ("weights", "source", "tokenizer"):
        value = values.get(key)
        if isinstance(value, str) and is_path(value):
            values[key] = "sha256:" + (weights_sha256 if key == "weights" else file_sha256)(value)
    return values


def _student(table: ModelRef, seeds: Sequence[int]) -> dict[str, Any]:
    """The same of a student, whose weights may be a file for each seed."""
    if not table.weights or table.weights == table.of_seed(0).weights:
        return content_of(table)
    files = [content_of(table.of_seed(seed))["weights"] for seed in seeds]
    return content_of(table.bare) | {"weights": files}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides the result, and nothing else: no names, paths, worker counts or servers."""
    values = recipe.model_dump(mode="json", exclude=NOT_HASHED)
    for key in ("data", "teacher"):
        table = getattr(recipe, key)
        if table is not None:
            values[key] = content_of(table)
    if recipe.source and recipe.source.log:
        logs = [
            open_place(recipe.source.log_of(seed) or "").get("_MANIFEST.json") or b""
            for seed in recipe.seeds
        ]
        values["source"]["log"] = [hashlib.sha256(log).hexdigest() for log in logs]
    return values | {"student": _student(recipe.student, recipe.seeds)}
