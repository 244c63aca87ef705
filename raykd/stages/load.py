"""A recipe file made whole and checked: `load` gives a Recipe, or every error at once."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from raykd import techniques
from raykd.data.sources import BUILT_IN
from raykd.errors import Problem, RecipeError
from raykd.losses import terms
from raykd.models.build import MODELS
from raykd.recipe import imports, weight_files
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import apply_trial
from raykd.recipe.tables import TermSpec
from raykd.recipe.toml import is_path, merge, parse_set, read_toml, resolve_paths, set_key
from raykd.recipe.validation import suggestion, validate

SEARCHABLE = ("terms", "source", "weighting", "optim", "student")
SMOKE: dict[str, dict[str, Any]] = {
    "optim": {"steps": 40, "evaluate_every": 20},
    "search": {"trials": 4, "grace": 20},
    "drafter": {"prompts": 2, "count": 12},
}
SMOKE_TEXT: dict[str, dict[str, Any]] = {  # a language model's teacher and head take their time
    "optim": {"steps": 16, "evaluate_every": 8},
    "search": {"grace": 8},
    "store": {"rows_per_shard": 16},
}
SMOKE_TOKENS = 4000  # of text a split, or 32 rows


def load(
    path: str | Path,
    sets: tuple[str, ...] = (),
    *,
    smoke: bool = False,
    allow_import: Collection[str] = (),
) -> Recipe:
    """The resolved recipe of a TOML file: the technique's own settings < file < `a.b=value` of
    `sets`.

    `smoke` cuts every stage to the fewest steps that still run it. `allow_import` names installed
    packages that the recipe may import; those of the current directory are always allowed.
    RecipeError reports all faults at once.

    Example:
        >>> _ = Path("recipe.toml").write_text('technique = "none"')
        >>> recipe = load("recipe.toml", ("optim.steps=100",))
        >>> recipe.optim.steps, sorted(recipe.terms)
        (100, ['ce'])
    """
    path = Path(path)
    raw = resolve_paths(read_toml(path), path.parent)
    for text in sets:
        raw = merge(raw, resolve_paths(set_key({}, *parse_set(text)), Path()))
    if smoke:
        known = _technique(raw.get("technique", "vanilla"), allow_import)[0] | raw
        cuts = SMOKE
        if _text(known, "data", "tokenizer"):
            cuts = merge(cuts, SMOKE_TEXT | {"data": {"limit": _few_rows(known["data"])}})
        raw = merge(raw, {k: v for k, v in cuts.items() if k in ("optim", "store") or k in known})
        if isinstance(raw.get("seeds"), list):
            raw |= {"seeds": raw["seeds"][:1]}
    return resolve(raw, where=f"recipe {path}", allow_import=allow_import)


def _few_rows(table: dict[str, Any]) -> int:
    """Rows of each split that make SMOKE_TOKENS of text, at least 32; never more than the recipe's
    own limit.
    """
    window, own = table.get("window"), table.get("limit")
    few = max(32, SMOKE_TOKENS // window) if isinstance(window, int) and window > 0 else 32
    return min(few, own) if isinstance(own, int) else few


def resolve(
    raw: dict[str, Any], *, where: str = "recipe", allow_import: Collection[str] = ()
) -> Recipe:
    """The Recipe of raw values, laid over its technique's own. RecipeError with all faults.

    No code that the recipe names is run, except a technique's that may be imported.
    """
    base, problems = _technique(raw.get("technique", "vanilla"), allow_import)
    merged = merge(base, raw)
    found, faults = validate(Recipe, merged)
    if "terms" not in raw and any(
        p.key == "technique" for p in problems + faults
    ):  # it would have brought them
        faults = [fault for fault in faults if fault.key != "terms"]
    if not (problems and "." in raw["technique"]):
        problems += _term_problems(merged)
    if found and not problems:
        problems += (
            _teacher_problems(found)
            + _source_problems(found)
            + _search_problems(merged, found, allow_import)
        )
    problems += faults + _name_problems(merged, allow_import) + _file_problems(merged)
    if problems or found is None:
        raise RecipeError(problems, where=where)
    return found


def _technique(name: Any, allow_import: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
    """A technique's own settings, its terms registered, and what is wrong with its name."""
    techniques.load_terms()
    if not isinstance(name, str):
        return {}, []
    try:
        settings = techniques.find(name).recipe
        problems = imports.problems("technique", name, allow_import) if "." in name else []
        if not problems:
            techniques.register(name)
    except RecipeError as error:
        return {}, [Problem("technique", problem.message) for problem in error.problems]
    return settings, problems


def _term_problems(merged: dict[str, Any]) -> list[Problem]:
    given = merged.get("terms")
    specs = (
        {k: validate(TermSpec, v)[0] for k, v in given.items()} if isinstance(given, dict) else {}
    )
    return terms.term_problems({k: v for k, v in specs.items() if v is not None})


def _teacher_problems(found: Recipe) -> list[Problem]:
    needs = terms.needs_of(found.terms)
    if needs and found.teacher is None:
        wanting = ", ".join(n for n, s in found.terms.items() if terms.needs_of({n: s}))
        return [
            Problem(
                "teacher",
                f"missing, but the terms {wanting} read the teacher's {', '.join(sorted(needs))}",
            )
        ]
    if found.teacher and found.teacher.weights is None:
        return [
            Problem("teacher.weights", "missing; name the teacher's safetensors file or folder")
        ]
    if found.drafter and found.teacher and found.teacher.model == weight_files.TRANSFORMERS:
        return [
            Problem(
                "drafter",
                'model = "transformers" keeps no cache to verify drafts with; leave it out',
            )
        ]
    return []


def _source_problems(found: Recipe) -> list[Problem]:
    """Terms that no row of a step would reach, and rows that no term reads."""
    counting = [name for name, spec in found.terms.items() if spec.weight > 0]
    own = [name for name in counting if terms.TERMS[name].own]
    data_only = [name for name in counting if not terms.TERMS[name].own]
    key, text = "source", ""
    if found.source is None:
        text = (
            f"missing, but the terms {', '.join(own)} read what the student writes; add [source]"
            if own
            else ""
        )
    elif not own:
        text = "no term reads what the student writes; add one, such as [terms.gkd], or leave [source] out"
    elif found.teacher is None and not found.source.log and not terms.needs_of(found.terms):
        key, text = "teacher", "missing, but it scores what the student writes"
    elif found.source.share == 1 and data_only:
        key, text = (
            "source.share",
            f"1 leaves no row of the data to the terms {', '.join(data_only)}; lower it",
        )
    elif found.source.share < 1 and not data_only:
        key, text = (
            "source.share",
            f"{found.source.share} leaves rows to the data that no term reads; set it to 1",
        )
    elif found.source.share == 1 and not _always(found.terms[name] for name in own):
        key, text = (
            "source.share",
            "1 leaves steps in which no term counts; lower it, or let since and until meet",
        )
    if found.data.tokenizer and found.optim.input_noise:
        key, text = "optim.input_noise", "has no meaning for tokens; leave it out"
    return [Problem(key, text)] if text else []


def _always(specs: Iterable[TermSpec]) -> bool:
    """Whether some of the terms counts at every step."""
    reached = 0.0
    for spec in sorted(specs, key=lambda spec: spec.since):
        reached = max(reached, spec.until) if spec.since <= reached else reached
    return reached == 1


def _name_problems(merged: dict[str, Any], allow_import: Collection[str]) -> list[Problem]:
    """Data and models that do not exist, and code that may not be imported."""
    problems = []
    for table, key, known in (
        ("data", "source", BUILT_IN),
        ("teacher", "model", {*MODELS, weight_files.TRANSFORMERS}),
        ("student", "model", MODELS),
    ):
        name, dotted = _text(merged, table, key), f"{table}.{key}"
        if name is None or name in known:
            continue
        if table == "data" and is_path(name):
            problems += [] if Path(name).is_dir() else [Problem(dotted, f"no folder {name}")]
        elif name == weight_files.TRANSFORMERS:
            problems.append(
                Problem(
                    dotted, 'only a teacher is one of transformers; use "llama", which has exports'
                )
            )
        elif ":" in name:
            problems += imports.problems(dotted, name, allow_import)
        else:
            advice = f"{suggestion(name, known)} Or write module:function."
            problems.append(Problem(dotted, f"{name!r} is not built in.{advice}"))
    return problems


def _file_problems(merged: dict[str, Any]) -> list[Problem]:
    problems = []
    for table in ("teacher", "student"):
        named = _text(merged, table, "weights")
        if named:
            files = _of_seeds(named, merged.get("seeds")) if table == "student" else [named]
            is_text = _text(merged, "data", "tokenizer") is not None
            problems += weight_files.problems(table, merged[table], files, is_text=is_text)
    log = _text(merged, "source", "log")
    if log and merged["source"].get("kind") == "replay":
        logs = [Path(each) for each in _of_seeds(log, merged.get("seeds")) if "://" not in each]
        absent = [each for each in logs if not (each / "_MANIFEST.json").is_file()]
        problems += [
            Problem("source.log", f"{each} is no finished log of drafts") for each in absent
        ]
    tokenizer = _text(merged, "data", "tokenizer")
    if tokenizer and not Path(tokenizer).is_file():
        problems.append(Problem("data.tokenizer", f"no file {tokenizer}"))
    return problems


def _of_seeds(named: str, seeds: Any) -> list[str]:
    """The path that each seed's training names."""
    found = seeds if isinstance(seeds, list) else Recipe.model_fields["seeds"].default
    return sorted({named.replace("{seed}", str(seed)) for seed in found})


def _text(merged: dict[str, Any], table: str, key: str) -> str | None:
    values = merged.get(table)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, str) else None


def _search_problems(
    merged: dict[str, Any], found: Recipe, allow_import: Collection[str]
) -> list[Problem]:
    problems = []
    for key, span in (found.search.space if found.search else {}).items():
        if key.partition(".")[0] not in SEARCHABLE:
            shared = f"trials share one store, so only {', '.join(SEARCHABLE)} can be searched"
            problems.append(Problem(f"search.{key}", shared))
            continue
        for value in span.ends():
            trial = apply_trial(merged, {key: value})
            tried, faults = validate(Recipe, trial)
            faults = faults or (_source_problems(tried) if tried else [])
            faults = (
                faults
                or terms.term_problems(tried.terms if tried else {})
                or _name_problems(trial, allow_import)
            )
            if faults:
                problems += [
                    Problem(f"search.{key}", f"{value!r} leads to {fault}") for fault in faults
                ]
                break
    return problems
