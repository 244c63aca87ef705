"""A folder of Hugging Face in a recipe: padding is cut, content makes the digest, what is unfit is
refused in words.
"""

import json
import shutil
import sys
from pathlib import Path

import by_hand
import folders
import numpy as np
import pytest
import texts
import torch
from digests import recipe_digest
from folders import load, split, stored
from safetensors.torch import load_file

from raykd import data, models
from raykd.errors import RecipeError
from raykd.models import transformers_lm
from raykd.models.build import MODELS
from raykd.models.llama import Llama
from raykd.recipe.tables import ModelRef
from raykd.recipe.weight_files import CONFIG, INDEX, WEIGHTS
from raykd.reports.compare.changes import changes
from raykd.stages.load import resolve
from raykd.teacher import teacher_size
from raykd.teacher.identity import store_identity


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return folders.home(tmp_path_factory.mktemp("home"))


NARROW = "teacher.settings={ width = 32, layers = 1, heads = 2, kv_heads = 1, inner = 48 }"
SHAPE = {"channels": 2, "classes": 300, "steps": texts.STEPS}


def test_padding_of_a_teachers_head_changes_nothing_that_is_stored(home):
    """The reference is the same teacher without it; what is stored is rounded to fp16."""
    file = f"teacher.weights={home / 'narrow.safetensors'}"
    wide = stored(load(home))
    narrow = stored(load(home, file, NARROW))
    assert wide.keys() == narrow.keys() >= {"answer", "log_p", "coherence", "trajectory", "logits"}
    for name in wide:
        np.testing.assert_allclose(wide[name], narrow[name], rtol=2e-3, atol=2e-3)


def test_a_cache_of_a_folders_model_holds_a_row_of_the_data_not_its_whole_context(home):
    assert (
        models.build_model(load(home).teacher, **SHAPE, key="teacher").cache(2).keys.shape[-2]
        == texts.STEPS
    )


class Doubled(Llama):
    """A model whose logits are not its head's bare answer."""

    def forward(self, tokens, cache=None):
        return {"logits": 2 * super().forward(tokens, cache)["logits"]}


class DoubledLate(Llama):
    """Its first row, and the first step of each, are its head's answers."""

    def forward(self, tokens, cache=None):
        logits = super().forward(tokens, cache)["logits"]
        factor = torch.ones(logits.shape[:2])
        factor[1:, 1:] = 1.02
        return {"logits": logits * factor[..., None]}


class Uncalled(Llama):
    """Its head's weight is used, and the head is not called."""

    def forward(self, tokens, cache=None):
        return {"logits": self.model(tokens, cache) @ self.lm_head.weight.T}


class Flat(Llama):
    """Its head gets the steps of all rows as one list."""

    def forward(self, tokens, cache=None):
        logits = self.lm_head(self.model(tokens, cache).flatten(0, 1))
        return {"logits": logits.unflatten(0, tokens.shape[:2])}


def test_a_teacher_that_answers_too_little_or_changes_its_heads_answer_is_refused(
    home, monkeypatch
):
    monkeypatch.setitem(
        MODELS, "few", lambda classes, steps: Llama(classes=classes - 1, steps=steps)
    )
    for module in (Doubled, DoubledLate, Uncalled, Flat):
        monkeypatch.setitem(MODELS, module.__name__, module)
    changed = "changes that layer's answer into others, so its input cannot stand for them"
    for name, codec, words in (
        ("few", "dense", r"and the data have \d+"),
        ("Doubled", "hidden", changed),
        ("DoubledLate", "hidden", changed),
        ("Uncalled", "hidden", "does not call that layer"),
        ("Flat", "hidden", r"that layer gets \(160, 1, 64\), .* answers at \(4, 40\)"),
    ):
        recipe = load(home, f"store.codec={codec}", 'store.head="lm_head"')
        teacher = ModelRef(model=name)
        scorer, dataset = by_hand.scorer_of(recipe.model_copy(update={"teacher": teacher}))
        with pytest.raises(RecipeError, match=words):
            scorer.table(dataset.splits["test"].take(slice(4)))


def test_what_lies_in_a_folder_decides_the_result_and_where_it_lies_does_not(home, tmp_path):
    shutil.copytree(home / "wide", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("about it")
    first = load(home)
    moved = load(home, f"teacher.weights={tmp_path / 'moved'}")
    dataset = data.load(first.data)
    assert recipe_digest(first) == recipe_digest(moved)
    assert store_identity(first, dataset) == store_identity(moved, dataset)
    assert changes(first, moved) == []
    config = json.loads((tmp_path / "moved" / CONFIG).read_text())
    (tmp_path / "moved" / CONFIG).write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    other = load(home, f"teacher.weights={tmp_path / 'moved'}")
    assert recipe_digest(first) != recipe_digest(other)
    assert store_identity(first, dataset) != store_identity(other, dataset)
    assert [change.key for change in changes(first, other)] == ["teacher.weights"]


def test_a_report_counts_every_file_of_a_folder(home, tmp_path):
    shape = data.load(load(home).data).shape
    wide = ModelRef(model="llama", weights=str(home / "wide"))
    whole = teacher_size.told(wide, shape)
    tensors = load_file(home / "wide" / WEIGHTS)
    assert whole == {
        "params": sum(v.numel() for v in tensors.values()),
        "bytes": (home / "wide" / WEIGHTS).stat().st_size,
        "dtype": "F32",
    }
    split(home / "wide", tmp_path / "two")
    two = ModelRef(model="llama", weights=str(tmp_path / "two"))
    assert teacher_size.told(two, shape)["params"] == whole["params"]
    assert recipe_digest(load(home, f"teacher.weights={tmp_path / 'two'}")) != recipe_digest(
        load(home)
    )


def _pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def _config(**values):
    def write(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | values))

    return write


def _indexed(name: str):
    def write(path: Path) -> None:
        (path / WEIGHTS).unlink()
        (path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))

    return write


FAULTS = {
    "pickles": (_pickled, "teacher.weights", "pytorch_model.bin is a pickle, which can run code"),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        "teacher.weights",
        "neither model.safetensors nor",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), "teacher.weights", "no config.json"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "teacher.weights", "not JSON"),
    "code": (
        _config(auto_map={"AutoModel": "modeling.Model"}),
        "teacher.weights",
        "code of its own",
    ),
    "rounded": (
        _config(quantization_config={"bits": 4}),
        "teacher.weights",
        "name a folder of unrounded ones",
    ),
    "elsewhere": (
        _indexed("../other.safetensors"),
        "teacher.weights",
        "not a .safetensors file next to it",
    ),
    "a file gone": (
        _indexed("model-1.safetensors"),
        "teacher.weights",
        "names model-1.safetensors, which is missing",
    ),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "teacher.weights",
        "merge it into its base model",
    ),
}


def told(home: Path, *sets: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as error:
        load(home, *sets)
    return {problem.key: problem.message for problem in error.value.problems}


@pytest.mark.parametrize("model", ["llama", "transformers"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_that_can_not_be_read_is_refused_before_any_work(name, model, home, tmp_path):
    spoil, key, words = FAULTS[name]
    shutil.copytree(home / "wide", tmp_path / "bad")
    spoil(tmp_path / "bad")
    assert words in told(home, f"teacher.weights={tmp_path / 'bad'}", f"teacher.model={model}")[key]


def test_what_does_not_go_with_a_folder_is_refused(home, tmp_path):
    student = told(home, f"student.weights={home / 'wide'}", "student.model=transformers")
    assert "only a teacher" in student["student.model"]
    assert "leave them out" in told(home, "teacher.settings={ width = 32 }")["teacher.settings"]
    assert '"transformers"' in told(home, "teacher.model=series_encoder")["teacher.model"]
    file = f"teacher.weights={home / 'narrow.safetensors'}"
    assert (
        "needs a Hugging Face folder"
        in told(home, file, "teacher.model=transformers")["teacher.weights"]
    )
    assert (
        "nor is it a folder"
        in told(home, f"teacher.weights={tmp_path / 'none'}")["teacher.weights"]
    )
    assert (
        "keeps no cache"
        in told(home, "teacher.model=transformers", "drafter={ count = 4 }")["drafter"]
    )
    series = {"teacher": {"model": "llama", "weights": str(home / "wide")}}
    with pytest.raises(RecipeError, match=r"name data\.tokenizer"):
        resolve(series)


def test_a_folder_too_small_for_the_data_is_refused(home):
    ref = ModelRef(model="llama", weights=str(home / "wide"))
    with pytest.raises(RecipeError, match="the data's tokeniser 5000"):
        models.build_model(ref, channels=2, classes=5000, steps=8, key="teacher")
    with pytest.raises(RecipeError, match=f"at most {texts.STEPS + 9} tokens; lower data.window"):
        models.build_model(ref, channels=2, classes=10, steps=999, key="teacher")


def test_without_the_library_the_extra_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecipeError, match=r"pip install 'raykd\[hf\]'"):
        transformers_lm.read(home / "wide")
