"""What decides a result, as digests: of files, tables and whole recipes."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raykd.files.open import open_place
from raykd.recipe.recipe import ModelRef, Recipe
from raykd.recipe.weight_files import hashed_files

NOT_HASHED = {"name", "setting", "scale", "track", "export"}


def is_path(source: str) -> bool:
    """Whether a data source names a folder: it holds a slash or starts with a dot."""
    return "/" in source or source.startswith(".")


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file, or of a folder's Parquet files by name and content."""
    path = Path(path)
    if path.is_dir():
        return _of_files(path, sorted(path.rglob("*.parquet")))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: str | Path) -> str:
    """Hex sha256 of a file of weights, or of a model's folder: its config.json and safetensors
    files.
    """
    path = Path(path)
    return _of_files(path, hashed_files(path)) if path.is_dir() else file_sha256(path)


def _of_files(folder: Path, files: Sequence[Path]) -> str:
    """Of files by their names in the folder and their content."""
    parts = [f"{p.relative_to(folder)}:{file_sha256(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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


def identity(recipe: Recipe) -> dict[str, Any]:
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


def digest_of(values: Any) -> str:
    """Hex sha256 of canonical JSON."""
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def digest(recipe: Recipe) -> str:
    """Hex sha256 of the recipe's identity; its first eight digits name the run's folder."""
    return digest_of(identity(recipe))
