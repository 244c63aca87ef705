"""The techniques that exist, read from their source without running it: a listing needs no torch.

A technique is a Python file with a docstring and a literal `RECIPE`: one in `raykd/techniques/`, or a dotted
module path such as `mypkg.my_kd`.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from raykd import imports
from raykd.errors import RecipeError
from raykd.validation import suggestion

FOLDER = Path(__file__).parent / "techniques"


@dataclass(frozen=True)
class Technique:
    """One technique: its name in recipes, its first docstring line, its own settings, its file."""

    name: str
    summary: str
    recipe: dict[str, Any]
    path: Path


def techniques() -> list[Technique]:
    """Every technique of the package, by name."""
    return [_read(path.stem, path) for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("_")]


def find(name: str) -> Technique:
    """The technique called `name`; RecipeError with the nearest name if there is none."""
    known = {t.name: t for t in techniques()}
    if name in known:
        return known[name]
    path = imports.source_of(name) if "." in name else None
    if path is None:
        raise RecipeError(f"no technique {name!r}.{suggestion(name, known)}")
    return _read(name, path)


def _read(name: str, path: Path) -> Technique:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        recipes = [ast.literal_eval(node.value) for node in tree.body if _sets_recipe(node)]
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"technique {name!r}: {path} can not be read: {error}") from None
    if not recipes or not isinstance(recipes[-1], dict):
        raise RecipeError(f"technique {name!r}: {path.name} has no literal RECIPE = {{...}}")
    return Technique(name, (ast.get_docstring(tree) or "").partition("\n")[0], recipes[-1], path)


def _sets_recipe(node: ast.stmt) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["RECIPE"]
