"""Laws of the recipe: every fault at once with its key, precedence, and a digest of what decides
the result alone.

The references are the models' own fields: a new key is covered by being there.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from digests import recipe_digest
from pydantic import BaseModel
from safetensors.numpy import save_file

from raykd.errors import RecipeError
from raykd.recipe import imports, toml
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import Range, apply_trial
from raykd.reports.compare.changes import changes
from raykd.stages.load import SMOKE, load, resolve

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path for folder in ("examples", "pipelines") for path in (ROOT / folder).glob("**/*.toml")
)
FREE = {
    "data.max_rows",
    "name",
    "setting",
    "scale",
    "track",
    "export",
}  # how a run is called, where it runs, is told, and its forms
SEARCH = '[search]\n"terms.kd.temperature" = { uniform = [1, 4] }\n'


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a recipe beside teacher.safetensors; the folder is also the current
    directory.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "teacher.safetensors")

    def write(text: str, *, teacher: bool = True) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(
            text + ('\n[teacher]\nweights = "teacher.safetensors"\n' if teacher else "")
        )
        return path

    yield write
    for name in [n for n in sys.modules if n.startswith("mine_")]:
        del sys.modules[name]


def faults(path: Path, *sets: str, **keywords: Any) -> dict[str, str]:
    """The problems of a recipe that must not load, by key."""
    with pytest.raises(RecipeError) as caught:
        load(path, sets, **keywords)
    found = {p.key: p.message for p in caught.value.problems}
    assert len(found) == len(caught.value.problems), "one fault was told twice"
    assert all(str(p) in str(caught.value) for p in caught.value.problems)
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_of_the_repository_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if path.parent.name == "smollm2" and not (path.parent / "teacher.safetensors").exists():
        assert set(faults(path)) == {"teacher.weights", "data.tokenizer"}, (
            "which make_teacher.py makes"
        )
        return
    found = load(path)
    assert resolve(found.model_dump(mode="json")) == found
    assert recipe_digest(found) != recipe_digest(load(path, ("data.label_seed=99",)))


def test_there_are_recipes_to_load():
    assert ROOT / "examples" / "gesture" / "teacher.toml" in RECIPES


def test_all_faults_come_at_once_each_with_its_key_and_what_would_do(write):
    path = write(
        """
        nme = "x"
        technique = "vanila"
        seeds = "0"
        [data]
        source = "watch_gesture"
        split = "tim"
        [student]
        model = "subprocess:getoutput"
        weights = "student.pt"
        [terms.kdd]
        [terms.kd]
        temprature = 2
        [terms.ce]
        weight = -1
        [optim]
        step = 3
        batch = 1.5
        learning_rate = nan
        clip = 2026-01-01
        [scale]
        workers = [4, 2]
        [teacher]
        weights = "none.safetensors"
        """,
        teacher=False,
    )
    found = faults(path)
    expected = {
        "nme": "Did you mean name?",
        "technique": "Did you mean vanilla?",
        "seeds": "array",
        "data.source": "Did you mean watch_gestures?",
        "data.split": "'time' or 'subject'",
        "student.model": "add --allow-import subprocess if you trust it",
        "student.weights": "not a .safetensors file",
        "teacher.weights": "no file",
        "terms.kdd": "Did you mean kd?",
        "terms.kd.temprature": "Did you mean temperature?",
        "terms.ce.weight": "greater than or equal to 0",
        "optim.step": "Did you mean steps?",
        "optim.batch": "integer",
        "optim.learning_rate": "finite number, found nan",
        "optim.clip": "write a string or a number",
        "scale": "the least must not exceed the most",
    }
    assert found.keys() == expected.keys()
    assert {key for key, words in expected.items() if words not in found[key]} == set()


def tables(model: Any, key: str = "") -> list[tuple[str, type[BaseModel]]]:
    """(dotted key, model) of a model and all the tables in it."""
    inner = [
        (f"{key}.{name}".lstrip("."), option)
        for name, field in model.model_fields.items()
        for option in (field.annotation, *get_args(field.annotation))
        if isinstance(option, type) and issubclass(option, BaseModel)
    ]
    return [(key, model)] + [found for k, m in inner for found in tables(m, k)]


@pytest.mark.parametrize(
    ("key", "model"), [t for t in tables(Recipe) if t[0] not in ("terms", "search.space")]
)
def test_a_misspelt_key_of_any_table_is_named_with_the_right_one(write, key, model):
    name = max(model.model_fields, key=len)
    dotted = f"{key}.{name}x".lstrip(".")
    if key.startswith("phases"):  # a list of tables, which --set does not reach into
        dotted = dotted.replace("phases", "phases.0")
        table = "[phases.quant]\n" if "quant" in key else ""
        found = faults(write(f"[[phases]]\nuntil = 1\n{table}{name}x = 1\n{SEARCH}"))
    else:
        found = faults(write(SEARCH), f"{dotted}=1")
    assert f"Did you mean {name}?" in found[dotted]


@pytest.mark.parametrize("value", ["'a'", "1.5", "true", "[1]", "{}"])
def test_nothing_is_converted_to_the_wanted_type(write, value):
    assert "integer" in faults(write(""), f"optim.steps={value}")["optim.steps"]


def test_a_batch_smaller_than_the_workers_is_refused(write):
    assert load(write(""), ("optim.batch=4", "scale.workers=4")).scale.workers == (4, 4)
    message = faults(write(""), "optim.batch=3", "scale.workers=4")[""]
    assert "optim.batch = 3" in message
    assert "scale.workers = 4" in message


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("seeds=[1, 1]", "", "repeats a seed"),
        ("seeds=[]", "seeds", "at least 1"),
        ("name='a/b'", "name", "pattern"),
        ("terms={}", None, ""),
        ("terms.kd.temperature=0", "terms.kd.temperature", "greater than 0"),
        ("terms.kd.temperature=inf", "terms.kd.temperature", "finite"),
        ("terms.ce.on='words'", "terms.ce.on", "'steps' or 'sequence'"),
        ("terms.ce=1", "terms.ce", "object"),
        ("data=1", "data", "object"),
        ("data.source='./rows'", "data.source", "no folder"),
        ("teacher.weights=1", "teacher.weights", "string"),
        ("technique='nowhere.kd'", "technique", "no technique 'nowhere.kd'"),
        ("technique=1", "technique", "string"),
    ],
)
def test_a_fault_is_named_at_its_key(write, line, key, words):
    path = write("")
    if key is None:  # an empty table over the technique's own changes nothing
        assert load(path, (line,)) == load(path)
    else:
        found = faults(path, line)
        assert list(found) == [key]
        assert words in found[key]


def test_a_fault_that_no_trial_brings_is_told_once(write):
    found = faults(write(SEARCH), "data.source='./rows'")
    assert list(found) == ["data.source"]
    both = faults(write(SEARCH.replace("[1, 4]", "[-1, 4]")), "data.source='./rows'")
    assert list(both) == ["search.terms.kd.temperature", "data.source"]
    assert "no folder" not in both["search.terms.kd.temperature"]


def test_terms_that_read_a_teacher_need_one_with_weights(write):
    assert "the terms kd" in faults(write("", teacher=False))["teacher"]
    assert "missing" in faults(write("[teacher]", teacher=False))["teacher.weights"]
    assert load(write("[terms.kd]\nweight = 0", teacher=False)).teacher is None


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("table", ["teacher", "student"])
def test_weights_that_can_run_code_are_refused(write, tmp_path, table, suffix):
    (tmp_path / f"w.{suffix}").write_bytes(b"")
    assert (
        "others can run code"
        in faults(write(""), f"{table}.weights='w.{suffix}'")[f"{table}.weights"]
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"a = ", "not valid TOML"),
        (b"a = 1\na = 2", "not valid TOML"),
        ("name = 'ü'".encode("latin-1"), "not valid TOML"),
        (b"a = " + b"1" * 5000, "not valid TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_one_error_that_names_it(tmp_path, data, words):
    path = tmp_path / "lost.toml"
    if data:
        path.write_bytes(data)
    with pytest.raises(RecipeError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_later_layer_wins_and_leaves_the_rest(write):
    assert load(write("")).terms["kd"].settings == {"temperature": 2.0}
    path = write("[terms.kd]\ntemperature = 3\nweight = 0.5")
    assert load(path).terms["kd"].settings == {"temperature": 3}
    kd = load(path, ("terms.kd.temperature=4", "terms.kd.temperature=5")).terms["kd"]
    assert (kd.weight, kd.settings) == (0.5, {"temperature": 5})
    assert load(path).terms["ce"].weight == 0.2  # the technique's


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("optim.steps=5", ("optim.steps", 5)),
        (" optim.steps = 5 ", ("optim.steps", 5)),
        ("seeds=[1, 2]", ("seeds", [1, 2])),
        ("control=false", ("control", False)),
        ("name='a'", ("name", "a")),
        ("name=a-b", ("name", "a-b")),
        ("teacher.weights=a=b.safetensors", ("teacher.weights", "a=b.safetensors")),
        ("setting=", ("setting", "")),
    ],
)
def test_a_setting_is_toml_where_it_parses_else_a_string(text, parsed):
    assert toml.parse_set(text) == parsed


@pytest.mark.parametrize("text", ["", "name", "=1", " =1"])
def test_a_setting_without_key_or_sign_is_refused(write, text):
    with pytest.raises(RecipeError, match="write --set table"):
        load(write(""), (text,))


def test_paths_are_found_from_the_file_and_set_from_the_current_directory(
    write, tmp_path, monkeypatch
):
    (tmp_path / "rows").mkdir()
    path = write('[data]\nsource = "./rows"')
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    save_file({"a": np.ones(1, np.float32)}, "teacher.safetensors")
    from_file = load(path)
    from_set = load(path, ("teacher.weights=teacher.safetensors",))
    assert from_file.data.source == str(tmp_path / "rows")
    assert from_file.teacher
    assert from_file.teacher.weights == str(tmp_path / "teacher.safetensors")
    assert from_set.teacher
    assert from_set.teacher.weights == str(tmp_path / "else" / "teacher.safetensors")
    assert recipe_digest(from_file) != recipe_digest(from_set)


def test_smoke_cuts_steps_seeds_and_trials(write):
    path = write("seeds = [3, 4]\n" + SEARCH + "trials = 50\n")
    small = load(path, smoke=True)
    assert (small.seeds, small.optim.steps, small.optim.evaluate_every) == ([3], 40, 20)
    assert small.search
    assert (small.search.trials, small.search.grace) == (2, 20)
    assert load(write(""), smoke=True).search is None
    assert "array" in faults(write("seeds = 3"), smoke=True)["seeds"]


def test_smoke_raises_no_count(write):
    few = ("optim.steps=8", "search.trials=1", "search.grace=4")
    small = load(write(SEARCH), few, smoke=True)
    assert small.search
    assert (small.optim.steps, small.search.trials, small.search.grace) == (8, 1, 4)


def test_smoke_cuts_rows_of_text_and_keeps_a_smaller_limit(write, tmp_path):
    (tmp_path / "tokenizer.json").touch()
    for settings, limit in (
        ("", 62),
        ("limit = 600", 62),
        ("limit = 7", 7),
        ("window = 500\nlimit = 600", 32),
    ):
        window = "" if "window" in settings else "window = 64\n"
        text = write(f"[data]\ntokenizer = '{tmp_path / 'tokenizer.json'}'\n{window}{settings}")
        small = load(text, smoke=True)
        assert (small.data.limit, small.optim.steps, small.store.rows_per_shard) == (limit, 16, 16)
    assert load(write("[data]\nlimit = 600"), smoke=True).data.limit == 600


@pytest.fixture
def rich(write) -> Recipe:
    own = "[source]\n[terms.gkd]\n[drafter]\n"
    table = (
        "[weighting]\nboost = 2\n[[phases]]\nuntil = 0.5\n[phases.quant]\n[[phases]]\nuntil = 1\n"
    )
    return load(write(f"seeds = [0, 1]\n{own}{table}[terms.ce]\non = 'sequence'\n{SEARCH}"))


def test_a_recipe_equals_its_json_and_its_pickle(rich):
    assert Recipe.model_validate_json(rich.model_dump_json()) == rich
    assert resolve(json.loads(rich.model_dump_json())) == rich
    assert pickle.loads(pickle.dumps(rich)) == rich
    assert recipe_digest(pickle.loads(pickle.dumps(rich))) == recipe_digest(rich)


def test_a_recipe_error_survives_pickle(write):
    with pytest.raises(RecipeError) as caught:
        load(write("nme = 1\n[optim]\nstep = 1"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.problems) == (
        RecipeError,
        str(caught.value),
        caught.value.problems,
    )
    assert len(copy.problems) == 2
    assert copy.exit_code == 2


def other(value: Any, annotation: Any) -> Any:
    """A value unlike `value` and of its type."""
    options = [a for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal]
    if options:
        return next(o for o in get_args(options[0]) if o != value)
    match value:
        case bool():
            return not value
        case None if "dict" in str(annotation):
            return {"train": "x"}
        case None:
            one = 0.5 if "float" in str(annotation) else 3 if "int" in str(annotation) else "x"
            return [one] if "list" in str(annotation) else one
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple() if all(isinstance(one, int | float) for one in value):
            return tuple(one + 1 for one in value)
        case list() | tuple():
            return [*value, *value]
        case dict():
            return {**value, "new": next(iter(value.values()), 1)}


def choices() -> list[tuple[str, str]]:
    """(table, field) of every value that a recipe sets, tables within tables and names of one value
    left out.
    """
    return [
        (key, name)
        for key, model in tables(Recipe)
        for name, field in model.model_fields.items()
        if f"{key}.{name}".lstrip(".") not in dict(tables(Recipe))
        and not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)
    ]


def changed(table: Any, keys: list[str], name: str) -> Any:
    """`table` with one value changed, however deep it lies."""
    if isinstance(table, list):  # of tables: its first
        return [changed(table[0], keys, name), *table[1:]]
    if keys:
        return table.model_copy(update={keys[0]: changed(getattr(table, keys[0]), keys[1:], name)})
    return table.model_copy(
        update={name: other(getattr(table, name), type(table).model_fields[name].annotation)}
    )


@pytest.mark.parametrize(("key", "name"), choices())
def test_the_digest_changes_with_what_decides_the_result_and_nothing_else(
    rich, tmp_path, key, name
):
    (tmp_path / "teacher.safetensorsx").write_bytes(b"other weights")
    keys = [k for k in key.split(".") if k]
    if keys == ["terms"]:
        one = {"kd": changed(rich.terms["kd"], [], name)}
        moved = rich.model_copy(update={"terms": rich.terms | one})
    elif keys == ["search", "space"]:
        old = rich.search.space["terms.kd.temperature"]
        new = old.model_copy(
            update={name: {"choice": [1], "integer": (1, 2)}.get(name, (1.0, 2.0))}
        )
        search = rich.search.model_copy(update={"space": {"terms.kd.temperature": new}})
        moved = rich.model_copy(update={"search": search})
    else:
        moved = changed(rich, keys, name)
    assert moved != rich
    names = {(keys or [name])[0], ".".join([*keys, name])}
    assert (recipe_digest(moved) == recipe_digest(rich)) == bool(names & FREE)


def test_the_digest_reads_what_a_path_holds_and_not_where_it_lies(write, tmp_path):
    first = recipe_digest(load(write("")))
    (tmp_path / "moved").mkdir()
    there = tmp_path / "moved" / "other.safetensors"
    (tmp_path / "teacher.safetensors").rename(there)
    assert recipe_digest(load(write(""), (f"teacher.weights={there}",))) == first
    save_file({"a": np.ones(1, np.float32)}, there)
    assert recipe_digest(load(write(""), (f"teacher.weights={there}",))) != first


def test_the_digest_of_a_recipe_leaves_ones_own_rows_to_what_they_are(write, tmp_path):
    """A folder's name and files say nothing of a run: the rows do, which the recipe has not."""

    def of(folder: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "1.parquet").write_bytes(folder.encode())
        return recipe_digest(load(write(""), (f"data.source=./{folder}",)))

    assert of("a") == of("b") != recipe_digest(load(write("")))


def test_folders_differ_where_their_parquet_files_do_by_name_or_content(write, tmp_path):
    def of(folder: str, name: str, data: bytes) -> Recipe:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(data)
        return load(write(""), (f"data.source=./{folder}",))

    first = of("a", "1.parquet", b"1")
    assert changes(first, of("b", "1.parquet", b"1")) == []
    assert changes(first, of("b", "notes.txt", b"1")) == []
    for other in (of("c", "2.parquet", b"1"), of("d", "1.parquet", b"2")):
        assert [change.key for change in changes(first, other)] == ["data.source"]


@pytest.mark.parametrize(
    ("span", "ends"),
    [
        ("{ uniform = [1, 4] }", [1.0, 4.0]),
        ("{ loguniform = [1e-4, 1e-2] }", [1e-4, 1e-2]),
        ("{ integer = [1, 4] }", [1, 4]),
        ("{ choice = [1, 2, 4] }", [1, 2, 4]),
    ],
)
def test_a_range_has_one_of_four_forms(write, span, ends):
    key = "optim.learning_rate"
    found = load(write(f'[search]\n"{key}" = {span}'))
    assert found.search
    assert found.search.space[key].ends() == ends
    assert load(write("[search]"), (f"search.{key}={span}",)).search == found.search


@pytest.mark.parametrize(
    ("key", "span", "words"),
    [
        ("terms.kd.temperature", "{}", "give one of uniform"),
        ("terms.kd.temperature", "{ uniform = [1, 2], choice = [1] }", "give one of uniform"),
        ("terms.kd.temperature", "{ unifrm = [1, 2] }", "Did you mean uniform?"),
        ("terms.kd.temperature", "{ uniform = [2, 1] }", "empty range"),
        ("terms.kd.temperature", "{ choice = [] }", "empty range"),
        ("terms.kd.temperature", "{ loguniform = [0, 1] }", "above 0"),
        ("terms.kd.temperature", "{ uniform = [0, 1] }", "leads to terms.kd.temperature"),
        ("terms.kd.temprature", "{ uniform = [1, 2] }", "Did you mean temperature?"),
        ("terms.kdd.weight", "{ uniform = [0, 1] }", "Did you mean kd?"),
        ("optim.steps", "{ uniform = [1, 2] }", "integer"),
        ("optim.labelled_share", "{ uniform = [0.5, 2] }", "2.0 leads to optim.labelled_share"),
        ("optim.batch", "{ choice = [8, 1] }", "1 leads to optim.batch = 1"),
        ("student.model", '{ choice = ["series_encoder", "os:system"] }', "add --allow-import os"),
        (
            "data.window",
            "{ integer = [8, 16] }",
            "only terms, source, weighting, optim, student can be searched",
        ),
        ("store.batch", "{ integer = [8, 16] }", "trials share one store"),
        ("optim.steps", "{ integer = [100, 4000] }", "trials are compared at equal steps"),
        ("optim.steps", "{ choice = [2000, 4000] }", "4000 leads to optim.steps: another than"),
        ("optim.evaluate_every", "{ choice = [100, 250] }", "100 leads to optim.evaluate_every"),
        ("optim", "{ choice = [{ steps = 100 }] }", "leads to optim.steps: another than"),
        ("terms.ce.since", "{ uniform = [0, 0.5] }", "0.5 leads to terms: at some steps"),
    ],
)
def test_a_bad_range_is_named_at_its_key(write, key, span, words):
    late = "[terms.kd]\nsince = 0.4\n" if key == "terms.ce.since" else ""
    table = "[search]" if "." in key else "[search.space]"
    found = faults(write(f'{late}[scale]\nworkers = 2\n{table}\n"{key}" = {span}'))
    [(named, message)] = found.items()
    assert named.startswith(f"search.{key}")
    assert words in message


def test_trials_that_need_a_teacher_are_told_that_there_is_none(write):
    space = '[search]\n"terms.kd.weight" = { uniform = [0, 1] }'
    found = faults(write(f'technique = "none"\n{space}', teacher=False))
    assert "1.0 leads to teacher: missing, but the terms kd" in found["search.terms.kd.weight"]
    assert load(write(f'technique = "none"\n{space}')).search


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("[terms.ce]\nsince = 0.5", "no term counts (ce from 0.5 to 1.0)"),
        ("[terms.ce]\nuntil = 0.3", "no term counts (ce from 0.0 to 0.3)"),
        ("[terms.ce]\nuntil = 0.3\n[terms.kd]\nsince = 0.5", "kd from 0.5 to 1.0"),
        ("[terms.ce]\nsince = 0.5\n[terms.kd]\nweight = 0", "(ce from 0.5 to 1.0)"),
        ("[terms.ce]\nweight = 0", "each has weight 0"),
    ],
)
def test_a_step_from_which_nothing_would_be_learnt_is_refused(write, lines, words):
    assert words in faults(write(f'technique = "none"\n{lines}'))["terms"]


def test_weights_of_rows_need_a_teacher_and_one_result_for_any_workers(write):
    lines = 'technique = "none"\n[weighting]\nstatistics = "local_batch"\n'
    told = faults(write(lines, teacher=False))
    assert told == {"teacher": "missing, but [weighting] reads the teacher's saliency"}
    told = faults(write(lines), "scale.workers=[1, 2]")
    assert "number of workers would change the result" in told["weighting.statistics"]
    assert load(write(lines)).weighting
    assert load(write(lines, teacher=False), ("weighting.mode=uniform",)).weighting


def test_terms_may_follow_each_other_and_overlap(write):
    lines = "[terms.ce]\nsince = 0.3\n[terms.kd]\nuntil = 0.3\n"
    assert load(write(f'technique = "none"\n{lines}')).terms["ce"].since == 0.3
    assert load(write(f'technique = "none"\n{lines}'), ("terms.kd.until=0.5",))


def test_a_search_needs_a_key(write):
    assert "no key to search" in faults(write("[search]\ntrials = 3"))["search"]


def test_a_trial_is_a_plain_recipe(rich):
    made = Recipe.model_validate(
        apply_trial(rich.model_dump(mode="json"), {"terms.kd.temperature": 3.0})
    )
    assert made.search is None
    assert made.terms["kd"].settings == {"temperature": 3.0}
    assert made.terms["ce"] == rich.terms["ce"]


NAMES = {
    "data.source": "{}:rows",
    "student.model": "{}:rows",
    "teacher.model": "{}:rows",
    "technique": "{}.kd",
}


@pytest.mark.parametrize("key", NAMES)
def test_code_from_outside_the_current_directory_is_not_imported_unless_allowed(
    write, tmp_path, monkeypatch, key
):
    package = tmp_path / "elsewhere" / "mine_far"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def rows(**_): ...")
    (package / "kd.py").write_text("RECIPE = {'terms': {'ce': {}}}")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    sys.path.append(str(package.parent))
    line = f"{key}={NAMES[key].format('mine_far')}"
    path = write("")
    assert "add --allow-import mine_far if you trust it" in faults(path, line)[key]
    assert (
        "add --allow-import"
        in faults(path, line, allow_import=("mine_fa", "mine_far.kd", "os"))[key]
    )
    assert "mine_far" not in sys.modules
    assert load(path, (line,), allow_import=("mine_far",))
    monkeypatch.chdir(tmp_path)
    assert load(path, (line,))


@pytest.mark.parametrize("key", NAMES)
def test_code_of_the_current_directory_is_found_and_only_a_technique_is_run(write, tmp_path, key):
    package = tmp_path / "mine_near"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "kd.py").write_text("RECIPE = {'terms': {'ce': {'weight': 0.3}}}")
    found = load(write(""), (f"{key}={NAMES[key].format('mine_near')}",))
    assert ("mine_near" in sys.modules) == (key == "technique")
    assert (found.terms["ce"].weight == 0.3) == (key == "technique")


@pytest.mark.parametrize(
    "name", ["subprocess", "os", "sys", "builtins", "torch", "numpy", "__main__"]
)
def test_no_recipe_calls_python_or_an_installed_package(write, name):
    assert set(faults(write(""), f"data.source={name}:getoutput")) == {"data.source"}


def test_installed_code_below_the_current_directory_is_not_of_it(monkeypatch):
    monkeypatch.chdir("/")
    assert imports.problems("key", "subprocess:getoutput")
    assert imports.problems("key", "torch:load")


@pytest.mark.parametrize(
    "name",
    [
        "raykd.store.care:gc",
        "raykd.files.atomic:write_bytes",
        "raykd.recipe.imports:load",
        "raykd.nowhere:rows",
        "raykd:load",
        "raykd.techniques.vanilla",
    ],
)
def test_no_name_of_a_recipe_is_raykds_own_code_even_if_allowed(name, monkeypatch):
    monkeypatch.chdir(Path(imports.__file__).parents[2])
    [problem] = imports.problems("data.source", name, ["raykd"])
    assert "raykd's own code" in problem.message
    with pytest.raises(RecipeError, match="raykd's own code"):
        imports.load(name, "data.source")


@pytest.mark.parametrize("name", ["a:", ":a", "a b:c", "a..b:c", "a:b:c", "1a:b", ".a:b"])
def test_a_name_that_can_be_no_code_is_refused(name):
    [problem] = imports.problems("data.source", name)
    assert "write module:function" in problem.message


def test_a_module_that_does_not_exist_is_named_even_if_allowed(write):
    found = faults(write(""), "data.source=mine_none:rows", allow_import=("mine_none",))
    assert "no module 'mine_none'" in found["data.source"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def rows(", "was never closed"),
        ("RECIPE = dict()", "malformed"),
        ("RECIPE = 3", "no literal RECIPE"),
        ("", "no literal RECIPE"),
        ("RECIPE = {'terms': {'ce': {}}}\nimport mine_missing", "No module named 'mine_missing'"),
    ],
)
def test_a_technique_that_can_not_be_read_is_one_problem_among_the_others(
    write, tmp_path, text, words
):
    (tmp_path / "mine_bad").mkdir()
    (tmp_path / "mine_bad" / "kd.py").write_text(text)
    found = faults(write("technique = 'mine_bad.kd'\n[optim]\nstep = 1"))
    assert words in found["technique"]
    assert set(found) == {"technique", "optim.step"}


def test_loading_names_the_key_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_loads.py").write_text("from json import loads as lads\ndef loads(): pass")
    with pytest.raises(
        RecipeError,
        match=r"data\.source: 'mine_loads:lods' cannot be imported: mine_loads has no function",
    ):
        imports.load("mine_loads:lods", "data.source")
    assert imports.load("mine_loads:loads", "data.source").__module__ == "mine_loads"


BORROWED = """
import functools, os, shutil, subprocess
from builtins import eval
from raykd.models.llama import Llama
from shutil import rmtree
remove = os.remove
popen = subprocess.Popen
later = functools.partial(functools.partial(shutil.copytree, "a"), "b")
grown = [].append
from mine_other import rows
@functools.lru_cache
def cached(): pass
@functools.wraps(rmtree)
def own(): pass
own.__module__ = __name__
half = functools.partial(own)
"""


@pytest.mark.parametrize(
    ("function", "home"),
    [
        ("rmtree", "shutil"),
        ("remove", "posix"),
        ("popen", "subprocess"),
        ("eval", "builtins"),
        ("later", "shutil"),
        ("grown", "builtins"),
        ("Llama", "raykd"),
        ("rows", None),
        ("cached", None),
        ("own", None),
        ("half", None),
    ],
)
def test_what_an_own_module_only_imports_is_not_callable_by_a_recipe(
    function, home, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_borrows.py").write_text(BORROWED)
    (tmp_path / "mine_other.py").write_text("def rows(): pass")
    if home is None:
        assert callable(imports.load(f"mine_borrows:{function}", "data.source"))
        return
    with pytest.raises(RecipeError, match=rf"^data\.source: 'mine_borrows:{function}' is not that"):
        imports.load(f"mine_borrows:{function}", "data.source")
    if home != "raykd":
        monkeypatch.setattr(imports, "_permitted", {home})
        assert callable(imports.load(f"mine_borrows:{function}", "data.source"))


def test_loading_asks_by_itself_whether_code_may_be_imported(monkeypatch):
    with pytest.raises(RecipeError, match="--allow-import json"):
        imports.load("json:loads", "data.source")
    monkeypatch.setattr(imports, "_permitted", {"json"})
    assert imports.load("json:loads", "data.source") is json.loads


def test_every_field_of_a_range_is_a_form():
    assert set(Range.model_fields) == {"uniform", "loguniform", "integer", "choice"}
    assert SMOKE.keys() <= Recipe.model_fields.keys()
