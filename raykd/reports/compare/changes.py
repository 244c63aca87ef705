"""What one recipe sets otherwise than another, key by key."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raykd.files.cache import sha256_kept
from raykd.files.digests import files_sha256, parquet_below
from raykd.recipe.digest import NOT_HASHED, REFUSING, weights_sha256
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import TermSpec
from raykd.reports.compare.table import Change

UNSAID = {name: field.default for name, field in TermSpec.model_fields.items() if name != "weight"}
UNTOLD = {f"data.{key}" for key in REFUSING}
PATHS = ("data.source", "teacher.weights", "student.weights")


def changes(first: Recipe, here: Recipe) -> list[Change]:
    """The dotted keys that decide a result and differ, in the recipe's order; of files, those of
    other content.
    """
    a, b = (
        dict(_flat(recipe.model_dump(mode="json", exclude=NOT_HASHED))) for recipe in (first, here)
    )
    differing = [
        key
        for key in {**a, **b}
        if key not in UNTOLD
        and a.get(key) != b.get(key)
        and not _same_file(key, a.get(key), b.get(key))
    ]
    return [Change(key=key, first=a.get(key), here=b.get(key)) for key in differing]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key that is set; of a term that its weight stands for, none that
    says nothing.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and not (prefix.startswith("terms.") and value == UNSAID.get(key)):
            yield f"{prefix}{key}", value


def _same_file(key: str, first: Any, here: Any) -> bool:
    if key not in PATHS or first is None or here is None:
        return False
    if not all(Path(path).exists() for path in (first, here)):
        return False
    if key == "data.source":
        digest = _parquet_sha256(Path(first))
        return digest is not None and digest == _parquet_sha256(Path(here))
    return weights_sha256(first) == weights_sha256(here)


def _parquet_sha256(folder: Path) -> str | None:
    """Hex sha256 of a folder's Parquet files; None where it has none."""
    files = parquet_below(folder)
    return files_sha256(folder, files, sha256_kept) if files else None
