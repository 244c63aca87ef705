"""One file a technique: a docstring, a literal RECIPE, and at most one small function.

They are read from their source without running it, so that a listing needs no torch: a file in
`raykd/techniques/`, or a dotted module path such as `mypkg.my_kd`. `load_terms` imports them, so
that their terms are registered.
"""

import ast
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from raykd.errors import RecipeError
from raykd.recipe import imports
from raykd.recipe.validation import suggestion

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Technique:
    """One technique: its name in recipes, its first docstring line, its own settings, its file."""

    name: str
    summary: str
    recipe: dict[str, Any]
    path: Path


def all_techniques() -> list[Technique]:
    """Every technique of the package, by name."""
    return [
        _read(path.stem, path)
        for path in sorted(FOLDER.glob("*.py"))
        if not path.stem.startswith("_")
    ]


def find(name: str) -> Technique:
    """The technique called `name`; RecipeError with the nearest name if there is none."""
    known = {t.name: t for t in all_techniques()}
    if name in known:
        return known[name]
    path = imports.source_of(name) if "." in name else None
    if path is None:
        raise RecipeError(f"no technique {name!r}.{suggestion(name, known)}")
    return _read(name, path)


def load_terms() -> None:
    """Import the shared terms and every technique of the package, so that their terms are
    registered.
    """
    importlib.import_module("raykd.losses.shared_terms")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def term_tables() -> dict[str, Any]:
    """A pydantic model of what a recipe may set of each term of the package, by the term's name."""
    from raykd.losses.terms import TERMS, settings_model

    load_terms()
    return {name: settings_model(term.make) for name, term in sorted(TERMS.items())}


def register(technique: str) -> None:
    """Import all terms that a recipe of this technique may name."""
    load_terms()
    if "." in technique:
        imports.load(technique, "technique")


def _read(name: str, path: Path) -> Technique:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        recipes = [ast.literal_eval(node.value) for node in tree.body if _sets_recipe(node)]
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"technique {name!r}: {path} cannot be read: {error}") from None
    if not recipes or not isinstance(recipes[-1], dict):
        raise RecipeError(f"technique {name!r}: {path.name} has no literal RECIPE = {{...}}")
    return Technique(name, (ast.get_docstring(tree) or "").partition("\n")[0], recipes[-1], path)


def _sets_recipe(node: ast.stmt) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [
        "RECIPE"
    ]
