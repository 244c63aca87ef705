"""What decides a result, as digests: of files, tables and whole recipes."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raykd.files.digests import file_sha256, files_sha256
from raykd.files.open import open_place
from raykd.recipe.recipe import Recipe
from raykd.recipe.source import Source
from raykd.recipe.tables import DataRef, ModelRef
from raykd.recipe.toml import is_path
from raykd.recipe.user_code import current_directory_last
from raykd.recipe.weight_files import hashed_files

REFUSING = {"max_rows"}  # keys of tables that refuse, and change nothing
NOT_HASHED = {"name", "setting", "scale", "track", "export"}
# Keys that recipes had not from the beginning, by table; the recipe's own under "". At their
# default they are left out, so runs from before there was a choice keep their folders.
# A table stands before the recipe, which leaves out a whole table.
LATER: dict[str, tuple[str, ...]] = {
    "precision": ("teacher", "student", "attention", "matmul"),
    "": ("select", "precision", "task"),
    "optim": ("order", "lanes", "window", "betas", "decay", "ema", "schedule"),
    "data": ("splits", "steps", "max_unfit"),
    "student": ("like", "layers"),
}
BY_ROWS = "rows"  # in place of a data source: its rows decide, wherever they come from


def weights_sha256(path: str | Path) -> str:
    """Hex sha256 of a file of weights, or of the config.json and safetensors files of a folder."""
    path = Path(path)
    if path.is_dir():
        return files_sha256(path, hashed_files(path))
    return file_sha256(path)


def code_sha256(name: str) -> str | None:
    """Hex sha256 of the file of a `module:function`; None for a name of raykd's."""
    if ":" not in name:
        return None
    with current_directory_last():
        spec = importlib.util.find_spec(name.partition(":")[0])
    return file_sha256(spec.origin) if spec and spec.origin else None


def content_of(table: BaseModel) -> dict[str, Any]:
    """A table's values, with every path replaced by the digest of what lies there.

    A data source of one's own is replaced by BY_ROWS.
    """
    values = table.model_dump(mode="json", exclude=REFUSING)
    for key in ("weights", "tokenizer"):
        value = values.get(key)
        if isinstance(value, str) and is_path(value):
            digest = weights_sha256(value) if key == "weights" else file_sha256(value)
            values[key] = f"sha256:{digest}"
    source = values.get("source") or ""
    if is_path(source) or ":" in source:
        values["source"] = BY_ROWS
    return values


def data_identity(ref: DataRef) -> dict[str, Any]:
    """What decides the rows besides the files that they are read from."""
    values = content_of(ref.model_copy(update={"source": ""}))
    _leave_out_defaults(values, ref, LATER["data"])
    return values


def _student(table: ModelRef, seeds: Sequence[int]) -> dict[str, Any]:
    """The content of [student], whose weights may be a file for each seed."""
    if not table.weights or table.weights == table.of_seed(0).weights:
        return content_of(table)
    files = [content_of(table.of_seed(seed))["weights"] for seed in seeds]
    return content_of(table.bare) | {"weights": files}


def _log_sha256(source: Source, seed: int) -> str:
    """Hex sha256 of the manifest of the log that one training reads."""
    log = open_place(source.log_of(seed) or "")
    return hashlib.sha256(log.get("_MANIFEST.json") or b"").hexdigest()


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides the result, and nothing else: no names, paths, worker counts or servers."""
    values = recipe.model_dump(mode="json", exclude=NOT_HASHED)
    for key in ("data", "teacher"):
        table = getattr(recipe, key)
        if table is not None:
            values[key] = content_of(table)
    if recipe.source and recipe.source.log:
        values["source"]["log"] = [_log_sha256(recipe.source, seed) for seed in recipe.seeds]
    values["student"] = _student(recipe.student, recipe.seeds)
    for table, keys in LATER.items():
        _leave_out_defaults(
            values[table] if table else values, getattr(recipe, table) if table else recipe, keys
        )
    return values


def _leave_out_defaults(values: dict[str, Any], table: BaseModel, keys: Sequence[str]) -> None:
    """Delete from a table's values those of `keys` that are at their default."""
    for key in keys:
        if getattr(table, key) == type(table).model_fields[key].default:
            del values[key]
