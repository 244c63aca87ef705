"""A teacher that knows nothing is told of when it has scored, before anything is trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stored

from raykd import data
from raykd.data.table import Held
from raykd.recipe.recipe import Recipe
from raykd.reports import teacher_check
from raykd.stages import walk
from raykd.store.reader import Store
from raykd.training import predictions


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def scored(out) -> tuple[Recipe, Store]:
    """A teacher of random weights, and its store."""
    return stored.scored(out, "fp16", scale={"store": str(out / "fp16")})


def test_a_random_teacher_is_at_chance(scored):
    recipe, store = scored
    warning = teacher_check.warning(store, Held(data.load(recipe.data)))
    assert warning.startswith("the teacher is not shown to be better than chance: it is right on")
    assert "of 56 validation rows" in warning


def test_a_teacher_that_is_right_is_not(scored):
    recipe, store = scored
    dataset = data.load(recipe.data)
    val = dataset.splits["val"]
    label = teacher_check.answers(store, predictions.TestPlaces.of(val), "val").astype(np.int64)
    label[::5] = (label[::5] + 1) % stored.CLASSES
    splits = dataset.splits | {"val": replace(val, label=label)}
    assert teacher_check.warning(store, Held(replace(dataset, splits=splits))) == ""


def test_without_labels_nothing_is_known(scored):
    recipe, store = scored
    dataset = data.load(recipe.data)
    val = dataset.splits["val"]
    splits = dataset.splits | {"val": replace(val, label=np.full(len(val), -100))}
    assert teacher_check.warning(store, Held(replace(dataset, splits=splits))) == ""


def test_scoring_says_so(scored, out, capsys):
    recipe, _ = scored
    walk.score(recipe, out / "runs")
    said = capsys.readouterr().err
    assert "done before" in said
    assert "score   ! the teacher is not shown to be better" in said
