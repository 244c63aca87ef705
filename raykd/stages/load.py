"""A recipe file made whole and checked: `load` gives a Recipe, or every error at once."""

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from raykd import techniques
from raykd.data.sources import BUILT_IN
from raykd.errors import Problem, RecipeError
from raykd.files.address import checked_address, is_url
from raykd.losses import terms
from raykd.losses.reads import reads_of
from raykd.models import start
from raykd.models.build import MODELS
from raykd.models.form import reads_maps
from raykd.recipe import imports, weight_files
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import apply_trial
from raykd.recipe.tables import DataRef, TermSpec
from raykd.recipe.toml import is_path, merge, parse_set, read_toml, resolve_paths, set_key
from raykd.recipe.validation import suggestion, validate

SEARCHABLE = ("terms", "source", "weighting", "optim", "student")
# Keys of [optim] by which trials are compared, stopped and known to have ended.
SHARED_BY_TRIALS = ("steps", "evaluate_every")
SMOKE: dict[str, dict[str, Any]] = {
    "optim": {"steps": 40, "evaluate_every": 20},
    "search": {"trials": 2, "grace": 20},
    "drafter": {"prompts": 2, "count": 12},
}
SMOKE_TEXT: dict[str, dict[str, Any]] = {  # a language model's teacher and head take their time
    "optim": {"steps": 16, "evaluate_every": 8},
    "search": {"grace": 8},
    "store": {"rows_per_shard": 16},
}
OF_SENTENCES = 'texts with a class are read by model = "transformers" or a module:factory'
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
        raw = _cut_for_smoke(raw, allow_import)
    return resolve(raw, where=f"recipe {path}", allow_import=allow_import)


def _cut_for_smoke(raw: dict[str, Any], allow_import: Collection[str]) -> dict[str, Any]:
    """`raw` with the fewest steps, trials, rows and seeds that still run every stage.

    A count of the recipe that is smaller stays.
    """
    settings, _ = _technique(raw.get("technique", "vanilla"), allow_import)
    known = merge(settings, raw)
    cuts = SMOKE
    if _text(known, "data", "tokenizer"):
        cuts = merge(cuts, SMOKE_TEXT | {"data": {"limit": _few_rows(known["data"])}})
    for table, fewest in cuts.items():
        if table in ("optim", "store") or table in known:
            raw = merge(raw, {table: _at_most(fewest, known.get(table))})
    if isinstance(raw.get("seeds"), list):
        raw |= {"seeds": raw["seeds"][:1]}
    return raw


def _at_most(fewest: dict[str, int], table: Any) -> dict[str, int]:
    """The counts of `fewest`; where the recipe's table has a smaller one, that."""
    given = table if isinstance(table, dict) else {}
    counts = {key: given[key] for key in fewest if type(given.get(key)) is int}
    return {key: min(most, counts.get(key, most)) for key, most in fewest.items()}


def _few_rows(table: dict[str, Any]) -> int:
    """Rows of each split that make SMOKE_TOKENS of text, at least 32.

    Never more than the recipe's limit.
    """
    window = table.get("window")
    limit = table.get("limit")
    rows = 32
    if isinstance(window, int) and window > 0:
        rows = max(rows, SMOKE_TOKENS // window)
    return min(rows, limit) if isinstance(limit, int) else rows


def resolve(
    raw: dict[str, Any], *, where: str = "recipe", allow_import: Collection[str] = ()
) -> Recipe:
    """The Recipe of raw values over those of its technique. RecipeError with all faults.

    No code that the recipe names is run, except a technique that may be imported.
    """
    base, problems = _technique(raw.get("technique", "vanilla"), allow_import)
    merged = merge(base, raw)
    merged, unfit = _student_resolved(merged)
    problems += unfit
    recipe, faults = validate(Recipe, merged)
    bad_keys = {problem.key for problem in problems + faults}
    if "terms" not in raw and "technique" in bad_keys:  # a sound technique brings terms
        faults = [fault for fault in faults if fault.key != "terms"]
    if not (problems and "." in str(raw.get("technique"))):
        problems += _term_problems(merged)
    if recipe and not problems:
        problems += _teacher_problems(recipe)
        problems += _source_problems(recipe)
        problems += _data_problems(recipe.data)
        problems += _task_problems(recipe)
        problems += _worker_problems(recipe)
        problems += _precision_problems(recipe)
        problems += _micro_problems(recipe) + _recompute_problems(recipe)
        problems += _shard_problems(recipe) + _compile_problems(recipe)
        problems += _search_problems(merged, recipe, allow_import)
    problems += faults + _name_problems(merged, allow_import) + _file_problems(merged)
    if problems or recipe is None:
        raise RecipeError(list(dict.fromkeys(problems)), where=where)
    imports.permit(recipe.packages)
    return recipe


def _student_resolved(merged: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Raw values whose student has its own model, settings and weights, and what is wrong there."""
    student = merged.get("student")
    teacher = merged.get("teacher")
    if not isinstance(student, dict):
        return merged, []
    of_texts = _has_classed_texts(merged)
    teacher = teacher if isinstance(teacher, dict) else {}
    found, problems = start.resolved(student, teacher, of_texts=of_texts)
    return merged | {"student": found}, problems


def _has_classed_texts(merged: dict[str, Any]) -> bool:
    """Whether raw values have texts with a class."""
    return _text(merged, "data", "tokenizer") is not None and (
        _text(merged, "task", "label") == "class"
    )


def _technique(name: Any, allow_import: Collection[str]) -> tuple[dict[str, Any], list[Problem]]:
    """A technique's own settings, its terms registered, and what is wrong with its name."""
    techniques.load_terms()
    if not isinstance(name, str):
        return {}, []
    try:
        settings = techniques.find(name).recipe
        problems = imports.problems("technique", name, allow_import) if "." in name else []
        if not problems:
            imports.permit([name.partition(".")[0]] if "." in name else [])
            techniques.register(name)
    except RecipeError as error:
        return {}, [Problem("technique", problem.message) for problem in error.problems]
    return settings, problems


def _term_problems(merged: dict[str, Any]) -> list[Problem]:
    """What the terms' own signatures refuse; a table that is no TermSpec is reported elsewhere."""
    tables = merged.get("terms")
    if not isinstance(tables, dict):
        return []
    specs = {}
    for name, table in tables.items():
        spec, _ = validate(TermSpec, table)
        if spec is not None:
            specs[name] = spec
    return terms.term_problems(specs)


def _teacher_problems(recipe: Recipe) -> list[Problem]:
    """A teacher that is missing, or that cannot do what the recipe needs of it."""
    reads = reads_of(recipe)
    if reads and recipe.teacher is None:
        names = [name for name, spec in recipe.terms.items() if terms.needs_of({name: spec})]
        who = f"the terms {', '.join(names)} read" if names else "[weighting] reads"
        text = f"missing, but {who} the teacher's {', '.join(sorted(reads))}"
        return [Problem("teacher", text)]
    if recipe.teacher and recipe.teacher.weights is None:
        text = "missing; name the teacher's safetensors file or folder"
        return [Problem("teacher.weights", text)]
    if recipe.drafter and recipe.teacher and recipe.teacher.model == weight_files.TRANSFORMERS:
        text = 'model = "transformers" keeps no cache to verify drafts with; leave it out'
        return [Problem("drafter", text)]
    return []


def _worker_problems(recipe: Recipe) -> list[Problem]:
    """Keys by which the number of workers would change what is trained."""
    weighting = recipe.weighting
    if recipe.scale.workers[1] == 1 or not weighting or weighting.statistics != "local_batch":
        return []
    text = (
        '"local_batch" takes them of each worker\'s rows, so the number of workers would change '
        'the result; write "global_batch", or set scale.workers = 1'
    )
    return [Problem("weighting.statistics", text)]


def _micro_problems(recipe: Recipe) -> list[Problem]:
    """Why a worker's rows cannot be read a few at a time, with the result of all at once."""
    scale = recipe.scale
    if scale.micro is None:
        return []
    own = recipe.source.rows(recipe.optim.batch) if recipe.source else 0
    rows = math.ceil(max(own, recipe.optim.batch - own) / scale.workers[0])
    found = []
    if scale.micro > rows:
        found.append(f"{scale.micro}, but a worker has {rows} rows of a batch; write at most that")
    for name, spec in recipe.terms.items():
        term = terms.TERMS[name]
        if spec.weight == 0:
            continue
        if term.compares(spec.settings):
            found.append(f"terms.{name} compares all rows of a batch with each other; leave it out")
        elif term.counts is None:
            found.append(
                f"terms.{name} does not say where it counts; give it @term(counts=...), or leave "
                "scale.micro out"
            )
    if any(phase.quant and phase.quant.over_the_call for phase in recipe.phases):
        found.append(
            "a phase rounds activations over all rows of a call, of which there would be several; "
            'write phases.quant.activations = "int8_token", or leave scale.micro out'
        )
    return [Problem("scale.micro", text) for text in found]


def _recompute_problems(recipe: Recipe) -> list[Problem]:
    """Workers that would ask each other for their ranges once more in the backward pass."""
    over_the_call = any(phase.quant and phase.quant.over_the_call for phase in recipe.phases)
    if recipe.scale.recompute == "none" or recipe.scale.workers[1] == 1 or not over_the_call:
        return []
    text = (
        '"blocks", but a phase rounds activations over the rows of all workers, which would meet '
        'again in the backward pass; write phases.quant.activations = "int8_token", or leave it out'
    )
    return [Problem("scale.recompute", text)]


def _shard_problems(recipe: Recipe) -> list[Problem]:
    """Why a student cannot lie in parts on the workers."""
    shard = recipe.scale.shard
    if shard == "none":
        return []
    found = []
    if recipe.scale.workers[1] == 1:
        found.append("and scale.workers = 1 has all of it; set that to 2 or more")
    if any(phase.quant for phase in recipe.phases):
        found.append("but a phase rounds, and its scales need whole weights; take out the phases")
    return [Problem("scale.shard", f'"{shard}", {text}, or leave it out') for text in found]


def _compile_problems(recipe: Recipe) -> list[Problem]:
    """Phases whose rounding is another with every step, and would be compiled anew for each."""
    if not recipe.scale.compile or not any(phase.quant for phase in recipe.phases):
        return []
    text = "true, but a phase rounds, by numbers of its own in each step; leave one of them out"
    return [Problem("scale.compile", text)]


def _precision_problems(recipe: Recipe) -> list[Problem]:
    """Numbers and attention that a term cannot do with, and numbers of no teacher."""
    problems = []
    precision = recipe.precision
    if precision.teacher != "fp32" and recipe.teacher is None:
        text = f'"{precision.teacher}", and there is no teacher; leave it out'
        problems.append(Problem("precision.teacher", text))
    for name, spec in recipe.terms.items():
        if spec.weight == 0:
            continue
        term = terms.TERMS[name]
        for key in ("student", "teacher"):
            numbers = getattr(precision, key)
            asked = key == "student" or terms.needs_of({name: spec}) or term.own
            if term.dtype == "float64" and numbers != "fp32" and asked:
                text = f'"{numbers}", but terms.{name} asks for float64; write "fp32"'
                problems.append(Problem(f"precision.{key}", text))
        layers = {layer for pair in term.pairs(spec.settings) for layer in pair}
        if precision.attention == "sdpa" and reads_maps(layers):
            text = f'"sdpa" shows no map, and terms.{name} reads one; write "auto" or "eager"'
            problems.append(Problem("precision.attention", text))
    return problems


def _data_problems(ref: DataRef) -> list[Problem]:
    """Keys that say nothing of these data, and would be passed over."""
    problems = []
    if ref.splits and not is_path(ref.source):
        text = f"patterns of paths, and {ref.source} has no files; leave it out"
        problems.append(Problem("data.splits", text))
    if ref.steps and (ref.tokenizer or ref.source in BUILT_IN):
        text = "of series in files or of a function; here data.window says it; leave it out"
        problems.append(Problem("data.steps", text))
    return problems


def _task_problems(recipe: Recipe) -> list[Problem]:
    """A task that these data have not, and what does not serve the task of texts with a class."""
    ref = recipe.data
    if not ref.tokenizer:
        text = '"next" is of text; set data.tokenizer, or leave it out'
        return [Problem("task.label", text)] if recipe.task.label == "next" else []
    if not recipe.task.of_texts:
        return []
    of_next = 'serves task.label = "next", and here it is "class"; leave it out'
    problems = [Problem(key, of_next) for key in ("source", "drafter") if getattr(recipe, key)]
    problems += [
        Problem(f"terms.{name}", f"reads what the student writes: it {of_next}")
        for name, spec in recipe.terms.items()
        if spec.weight > 0 and terms.TERMS[name].own
    ]
    if ref.source in BUILT_IN:
        text = f"{ref.source} has no texts with labels; name a folder or a module:function"
        problems.append(Problem("data.source", text))
    if ref.columns.prompt:
        text = "of language models; name the column of whole texts in data.columns.text"
        problems.append(Problem("data.columns.prompt", text))
    if recipe.optim.order == "blocks":
        text = '"blocks", but texts with a class are held in memory; leave it out'
        problems.append(Problem("optim.order", text))
    for key, table in (("teacher", recipe.teacher), ("student", recipe.student)):
        if table and table.model in MODELS:
            kind = "next tokens" if table.model == weight_files.LLAMA else "series"
            text = f'"{table.model}" is of {kind}; {OF_SENTENCES}'
            problems.append(Problem(f"{key}.model", text))
    return problems


def _source_problems(recipe: Recipe) -> list[Problem]:
    """Terms that no row of a step would reach, and rows and steps that no term reads."""
    if recipe.data.tokenizer and recipe.optim.input_noise:
        return [Problem("optim.input_noise", "has no meaning for tokens; leave it out")]
    counting = [name for name, spec in recipe.terms.items() if spec.weight > 0]
    on_student = [name for name in counting if terms.TERMS[name].own]
    on_data = [name for name in counting if not terms.TERMS[name].own]
    source = recipe.source
    if source is None:
        if not on_student:
            return _idle_problems(recipe, on_data)
        names = ", ".join(on_student)
        text = f"missing, but the terms {names} read what the student writes; add [source]"
        return [Problem("source", text)]
    if not on_student:
        text = "no term reads what the student writes; add one, such as [terms.gkd], or leave"
        return [Problem("source", f"{text} [source] out")]
    if source.share == 1 and recipe.weighting:
        text = "weighs rows of the data, and source.share = 1 leaves none; leave it out"
        return [Problem("weighting", text)]
    if recipe.teacher is None and not source.log and not reads_of(recipe):
        return [Problem("teacher", "missing, but it scores what the student writes")]
    text = ""
    if source.share == 1 and on_data:
        text = f"1 leaves no row of the data to the terms {', '.join(on_data)}; lower it"
    elif source.share < 1 and not on_data:
        text = f"{source.share} leaves rows to the data that no term reads; set it to 1"
    elif source.share == 1 and not _always(recipe.terms[name] for name in on_student):
        text = "1 leaves steps in which no term counts; lower it, or let since and until meet"
    return [Problem("source.share", text)] if text else _idle_problems(recipe, counting)


def _idle_problems(recipe: Recipe, names: list[str]) -> list[Problem]:
    """Steps at which none of the terms counts, so that the student would learn from nothing."""
    if not names:
        return [Problem("terms", "each has weight 0, so nothing would be learnt; raise one")]
    if _always(recipe.terms[name] for name in names):
        return []
    spans = (f"{n} from {recipe.terms[n].since} to {recipe.terms[n].until}" for n in names)
    text = f"at some steps no term counts ({', '.join(spans)}); let since and until meet"
    return [Problem("terms", f"{text}, from 0 to 1")]


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
        name = _text(merged, table, key)
        dotted = f"{table}.{key}"
        is_classifier = name == weight_files.TRANSFORMERS and _has_classed_texts(merged)
        if name is None or name in known or is_classifier:
            continue
        if table == "data" and is_url(name):
            try:
                checked_address(name)
            except ValueError as error:
                problems.append(Problem(dotted, str(error)))
        elif table == "data" and is_path(name):
            if not Path(name).is_dir():
                problems.append(Problem(dotted, f"no folder {name}"))
        elif name == weight_files.TRANSFORMERS:
            text = 'only a teacher is one of transformers; use "llama", which has exports'
            problems.append(Problem(dotted, text))
        elif ":" in name:
            problems += imports.problems(dotted, name, allow_import)
        else:
            advice = f"{suggestion(name, known)} Or write module:function."
            problems.append(Problem(dotted, f"{name!r} is not built in.{advice}"))
    return problems


def _file_problems(merged: dict[str, Any]) -> list[Problem]:
    """Files of weights, logs and tokenizers that are absent or of the wrong kind."""
    problems = []
    tokenizer = _text(merged, "data", "tokenizer")
    for table in ("teacher", "student"):
        weights = _text(merged, table, "weights")
        if weights:
            files = [weights]
            if table == "student":
                files = _of_seeds(weights, merged.get("seeds"))
            kind = "series" if tokenizer is None else "text"
            kind = "sentences" if _has_classed_texts(merged) else kind
            problems += weight_files.problems(table, merged[table], files, kind=kind)
    log = _text(merged, "source", "log")
    if log and merged["source"].get("kind") == "replay":
        for folder in _of_seeds(log, merged.get("seeds")):
            if "://" not in folder and not (Path(folder) / "_MANIFEST.json").is_file():
                text = f"{Path(folder)} is not a finished log of drafts"
                problems.append(Problem("source.log", text))
    if tokenizer and not Path(tokenizer).is_file():
        problems.append(Problem("data.tokenizer", f"no file {tokenizer}"))
    return problems


def _of_seeds(path: str, seeds: Any) -> list[str]:
    """The paths that the trainings of all seeds name."""
    if not isinstance(seeds, list):
        seeds = Recipe.model_fields["seeds"].default
    return sorted({path.replace("{seed}", str(seed)) for seed in seeds})


def _text(merged: dict[str, Any], table: str, key: str) -> str | None:
    """The string at a key; None if it is absent or no string."""
    values = merged.get(table)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, str) else None


def _search_problems(
    merged: dict[str, Any], recipe: Recipe, allow_import: Collection[str]
) -> list[Problem]:
    """Keys that trials cannot vary, and ends of ranges at which the recipe is at fault."""
    problems = []
    known = {str(problem) for problem in _trial_problems(apply_trial(merged, {}), allow_import)}
    for key, span in (recipe.search.space if recipe.search else {}).items():
        if key.partition(".")[0] not in SEARCHABLE:
            text = f"trials share one store, so only {', '.join(SEARCHABLE)} can be searched"
            problems.append(Problem(f"search.{key}", text))
            continue
        for value in span.ends():
            trial = apply_trial(merged, {key: value})
            faults = _trial_problems(trial, allow_import) or _incomparable(trial, recipe)
            faults = [fault for fault in faults if str(fault) not in known]
            if faults:
                where = f"search.{key}"
                problems += [Problem(where, f"{value!r} leads to {fault}") for fault in faults]
                break
    return problems


def _trial_problems(raw: dict[str, Any], allow_import: Collection[str]) -> list[Problem]:
    """What is wrong with the raw recipe of one trial, of the first kind of fault that it has."""
    recipe, faults = validate(Recipe, raw)
    if recipe is not None:
        faults = faults or terms.term_problems(recipe.terms)
        faults = faults or _teacher_problems(recipe) or _source_problems(recipe)
        faults = faults or _worker_problems(recipe) or _micro_problems(recipe)
    return faults or _name_problems(raw, allow_import)


def _incomparable(raw: dict[str, Any], recipe: Recipe) -> list[Problem]:
    """Why a trial, sound by itself, cannot be held against the others of a recipe."""
    trial, _ = validate(Recipe, raw)
    assert trial is not None
    text = "another than the recipe's; trials are compared at equal steps, so leave it out"
    return [
        Problem(f"optim.{key}", text)
        for key in SHARED_BY_TRIALS
        if getattr(trial.optim, key) != getattr(recipe.optim, key)
    ]
