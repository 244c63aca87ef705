"""`raykd keys`: every key that a recipe may have, with what it takes, its default and one line."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from command import raykd
from pydantic import BaseModel, Field

from raykd.errors import RecipeError
from raykd.losses.terms import TERMS, settings_model
from raykd.recipe.keys import HEADINGS, REQUIRED, recipe_keys, select, text
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import TermSpec
from raykd.recipe.toml import set_key
from raykd.recipe.validation import validate
from raykd.techniques import term_tables

ROOT = Path(__file__).parents[2]

# A recipe with every table in it, one of each that is a list or has names.
WHOLE = {
    "teacher": {},
    "terms": {"NAME": {}},
    "source": {},
    "weighting": {},
    "phases": [{"until": 1.0, "quant": {}}],
    "drafter": {},
    "search": {"space": {"NAME": {"choice": [1]}}},
}
ALL = recipe_keys(term_tables())
BY_NAME = {key.key: key for key in ALL}


def recipe_of(raw: dict) -> Recipe:
    recipe, problems = validate(Recipe, raw)
    assert recipe is not None, problems
    return recipe


def leaves(value: object, key: str = "") -> set[str]:
    """The dotted names of all values in a dumped recipe."""
    if isinstance(value, dict) and value:
        return {
            name
            for part, inner in value.items()
            for name in leaves(inner, f"{key}.{part}" if key else part)
        }
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return leaves(value[0], key)
    return {key}


def test_every_value_of_a_recipe_has_its_key():
    names = {key.key for key in recipe_keys()}
    found = leaves(recipe_of(WHOLE).model_dump(mode="json"))
    assert found == {key.key for key in recipe_keys() if key.type not in HEADINGS}
    assert len(names) == len(recipe_keys()), "a key stands twice"


@pytest.mark.parametrize(
    "key", [key for key in recipe_keys() if key.default is not None], ids=lambda key: key.key
)
def test_a_default_is_what_a_recipe_without_the_key_has(key):
    least = {"terms": {"NAME": {}}} if key.type in HEADINGS else WHOLE
    raw = json.loads(json.dumps(least))
    if key.key.startswith("phases."):
        changed = set_key(raw["phases"][0], key.key.removeprefix("phases."), key.default)
        raw["phases"] = [changed]
    elif key.key != "search.space":  # without a key to search there is no [search]
        raw = set_key(raw, key.key, key.default)
    assert recipe_of(raw) == recipe_of(least)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("optim.steps", "integer > 0"),
        ("optim.labelled_share", "number > 0, <= 1"),
        ("data.split", '"time" | "subject"'),
        ("data.limit", "integer > 0"),
        ("data.settings", "table of any value"),
        ("seeds", "list of integer >= 0 (not empty)"),
        ("control", "boolean"),
        ("phases", "list of tables"),
        ("phases.until", "number > 0, <= 1, required"),
        ("phases.quant", "table"),
        ("phases.quant.group", "16 | 32 | 64 | 128"),
        ("phases.quant.embeddings", '"int8" | "int4" | "ternary" | "none"'),
        ("scale.workers", "[integer > 0, integer > 0]"),
        ("scale.store", "string"),
        ("store.temperatures", "list of number > 0"),
        ("search.space", "tables by name"),
        ("search.space.NAME.choice", "list of any value"),
        ("terms.kd.temperature", "number > 0"),
        ("terms.hint.pairs", "list of [string, string] (not empty), required"),
    ],
)
def test_a_type_is_in_words(name, kind):
    assert BY_NAME[name].type == kind


@pytest.mark.parametrize("key", ALL, ids=lambda key: key.key)
def test_every_key_has_one_line(key):
    assert key.doc.endswith(".")
    assert "\n" not in key.doc
    assert key.doc.count("`") % 2 == 0


@pytest.mark.parametrize("name", TERMS)
def test_a_term_has_the_settings_of_its_signature_and_those_of_every_term(name):
    own = {
        parameter.name: parameter.default
        for parameter in inspect.signature(TERMS[name].make).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    keys = {key.key.split(".")[2]: key for key in select(ALL, f"terms.{name}")[1:]}
    assert list(keys) == [*TermSpec.model_fields, *own]
    for setting, default in own.items():
        if default is inspect.Parameter.empty:
            assert keys[setting].type.endswith(REQUIRED)
        else:
            assert keys[setting].default == default


def test_a_terms_docstring_explains_its_settings():
    def mine(
        student, batch, *, size: int = 1, sign: Annotated[float, Field(gt=0)] = 1.0, bare: int = 2
    ):
        """What it gives.

        Words  of no setting.

        size  how large it is,
              and how wide
        sign    "+" or "-"
        """

    model: type[BaseModel] = settings_model(mine)
    docs = {name: field.description for name, field in model.model_fields.items()}
    assert docs == {"size": "How large it is, and how wide.", "sign": '"+" or "-".', "bare": None}
    tables = recipe_keys({"mine": model})
    assert select(tables, "terms.mine")[0].doc == "What it gives."
    assert select(tables, "terms.mine.sign")[0].type == "number > 0"


def test_a_table_is_selected_with_what_is_in_it():
    names = [key.key for key in select(ALL, "phases")]
    assert names[:2] == ["phases", "phases.until"]
    assert names[-1] == "phases.quant.rest"
    assert [key.key for key in select(ALL, "store.top")] == ["store.top"]
    assert select(ALL, "phases.0.quant") == select(ALL, "phases.quant")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optm", "no key or table 'optm' in a recipe. Did you mean optim?"),
        ("optim.step", "no key or table 'step' in optim. Did you mean steps?"),
        ("optim.steps.more", "optim.steps is a key, not a table: it has no 'more'"),
        ("phases.0.quant.wieghts", "'wieghts' in phases.quant. Did you mean weights?"),
        ("data.colums.label", "'colums' in data. Did you mean columns?"),
        ("terms.kdd", "'kdd' in terms. Did you mean kd?"),
        ("terms.kd.temprature", "'temprature' in terms.kd. Did you mean temperature?"),
        ("track.zzz", "no key or table 'zzz' in track. Known: experiment, uri."),
        ("", "no key or table '' in a recipe. Known: control, data,"),
        ("optim.", "no key or table '' in optim. Known: batch,"),
        (".", "no key or table '' in a recipe. Known: control, data,"),
    ],
)
def test_a_name_that_is_not_there_is_met_with_what_is(name, hint):
    with pytest.raises(RecipeError) as caught:
        select(ALL, name)
    assert hint in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_text_has_a_heading_a_table_and_nothing_wide_but_types():
    lines = text(ALL).splitlines()
    assert {"[optim]", "[[phases]]", "[phases.quant]", "[terms.kd]"} <= set(lines)
    assert "optim.steps = 2000    (integer > 0)" in lines
    assert "weighting.clip    (number > 0)" in lines
    assert all(len(line) <= 100 for line in lines if line.startswith("    "))


def test_the_command_prints_one_table_and_loads_nothing_heavy():
    heavy = {"torch", "ray", "mlflow", "numpy", "pyarrow", "raykd.data", "raykd.models"}
    code = (
        "import sys; sys.argv = ['raykd', 'keys', 'optim', '--json']; from raykd.cli import main\n"
        "try: main()\n"
        f"finally: print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.stderr == "[]\n"
    keys = json.loads(done.stdout)
    assert keys[1] == {
        "key": "optim.steps",
        "type": "integer > 0",
        "default": 2000,
        "doc": "Steps of one training.",
    }
    assert [key["key"] for key in keys] == [key.key for key in select(ALL, "optim")]


def test_the_command_prints_every_key(tmp_path):
    done = raykd(tmp_path, "keys", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == [vars(key) for key in ALL]


@pytest.mark.parametrize(("name", "hint"), [("optm", "optim"), ("terms.kdd", "kd")])
def test_the_command_knows_what_a_misspelt_table_may_mean(tmp_path, name, hint):
    done = raykd(tmp_path, "keys", name)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("raykd: no key or table ")
    assert done.err.endswith(f" Did you mean {hint}?\n")
