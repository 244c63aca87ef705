"""A recipe file made whole and checked: `load` gives a Recipe, or every error at once."""

import importlib
import json
from pathlib import Path
from typing import Any

from raykd import catalog, losses, recipe, techniques
from raykd.errors import Problem, RecipeError
from raykd.recipe import Recipe

SEARCHABLE = ("terms", "optim", "student")


def load(path: str | Path, sets: tuple[str, ...] = (), *, smoke: bool = False) -> Recipe:
    """The resolved recipe: the technique's own settings < file < `--set a.b=value`. RecipeError with all faults.

    `smoke` cuts every stage to the fewest steps that still run it.
    """
    path = Path(path)
    raw = recipe.resolve_paths(recipe.read(path), path.parent)
    for text in sets:
        raw = recipe.set_key(raw, *recipe.parse_set(text))
    if smoke:
        raw = recipe.merge(raw, {k: v for k, v in recipe.SMOKE.items() if k != "search" or "search" in raw})
        raw |= {"seeds": raw.get("seeds", [0])[:1]}
    return resolve(raw, where=f"recipe {path}")


def resolve(raw: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """The Recipe of raw values, laid over its technique's own. RecipeError with all faults."""
    problems = []
    try:
        technique = raw.get("technique", "vanilla")
        base = catalog.find(technique).recipe if isinstance(technique, str) else {}
    except RecipeError as error:
        problems, base = [Problem("technique", str(error))], {}
    merged = recipe.merge(base, raw)
    found, faults = recipe.validate(Recipe, merged)
    problems += [p for p in faults if not (p.key == "terms" and problems)]
    problems += _content_problems(merged, found)
    if problems or found is None:
        raise RecipeError(problems, where=where)
    return found


def register(technique: str) -> None:
    """Import all terms that a recipe of this technique may name."""
    techniques.load_terms()
    if "." in technique:
        importlib.import_module(technique)


def _content_problems(merged: dict[str, Any], found: Recipe | None) -> list[Problem]:
    if isinstance(merged.get("technique"), str) and "." in merged["technique"]:
        register(merged["technique"])
    else:
        techniques.load_terms()
    terms = merged.get("terms")
    specs = {k: recipe.validate(recipe.TermSpec, v)[0] for k, v in terms.items()} if isinstance(terms, dict) else {}
    known = {k: v for k, v in specs.items() if v is not None}
    problems = losses.term_problems(known)
    if found is None or problems:
        return problems
    return _teacher_problems(found) + _file_problems(found) + _search_problems(merged, found)


def _teacher_problems(found: Recipe) -> list[Problem]:
    needs = losses.needs_of(found.terms)
    if needs and found.teacher is None:
        wanting = ", ".join(n for n, s in found.terms.items() if s.weight > 0 and losses.TERMS[n].needs)
        return [Problem("teacher", f"missing, but the terms {wanting} read the teacher's {', '.join(sorted(needs))}")]
    if found.teacher and found.teacher.weights is None:
        return [Problem("teacher.weights", "missing; name the teacher's safetensors file")]
    return []


def _file_problems(found: Recipe) -> list[Problem]:
    problems = []
    for key, ref in (("teacher", found.teacher), ("student", found.student)):
        weights = ref.weights if ref else None
        if weights and Path(weights).suffix != ".safetensors":
            problems.append(Problem(f"{key}.weights", f"{weights} is not a .safetensors file; others can run code"))
        elif weights and not Path(weights).is_file():
            problems.append(Problem(f"{key}.weights", f"no file {weights}"))
    if recipe.is_path(found.data.source) and not Path(found.data.source).is_dir():
        problems.append(Problem("data.source", f"no folder {found.data.source}"))
    return problems


def _search_problems(merged: dict[str, Any], found: Recipe) -> list[Problem]:
    problems = []
    for key, span in (found.search.space if found.search else {}).items():
        table = key.partition(".")[0]
        if table not in SEARCHABLE:
            shared = f"trials share one store, so only {', '.join(SEARCHABLE)} can be searched"
            problems.append(Problem(f"search.{key}", shared))
            continue
        trial = apply_trial(merged, {key: span.sample()})
        tried, faults = recipe.validate(Recipe, trial)
        faults = faults or losses.term_problems(tried.terms if tried else {})
        problems += [Problem(f"search.{key}", f"leads to {p}") for p in faults]
    return problems


def apply_trial(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`raw` with a trial's dotted keys set and its search removed: one point of the space, as a plain recipe."""
    raw = {k: v for k, v in json.loads(json.dumps(raw)).items() if k != "search"}
    for key, value in values.items():
        raw = recipe.set_key(raw, key, value)
    return raw
