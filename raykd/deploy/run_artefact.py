"""The artefact of a run folder, of series or of text: refused early, written, found whole, asked."""

from pathlib import Path
from typing import Any

from raykd import models
from raykd.data import Dataset
from raykd.deploy import artefact, forms, text_artefact
from raykd.deploy.artefact import ANSWERS
from raykd.generation import acceptance
from raykd.recipe.recipe import Recipe

FOLDER = "artefact"  # in the run folder


def check(recipe: Recipe, dataset: Dataset) -> None:
    """RecipeError if the student cannot be exported, or not in the forms of `[export]`."""
    if not forms.asked(recipe.export) and not dataset.is_text:
        return
    student = models.build_model(recipe.student.bare, **dataset.shape, key="student")
    if dataset.is_text:
        text_artefact.check(student, recipe)
    quant = recipe.phases[-1].quant if recipe.phases else None
    forms.check(recipe.export, student, quant, is_text=dataset.is_text)


def write(recipe: Recipe, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write `artefact/` of a run's best student, and beside it what it answers on the test rows.

    Gives the manifest. GateError, and no folder, if it answers otherwise than the student.
    """
    export = text_artefact.export if dataset.is_text else artefact.export
    return export(recipe, dataset, folder)


def is_whole(recipe: Recipe, folder: Path) -> bool:
    """Whether a run folder holds its artefact in just the forms of `[export]`, and its answers."""
    names = [ANSWERS] if recipe.drafter is None else [ANSWERS, acceptance.NAME]
    if not all((folder / name).exists() for name in names):
        return False
    return artefact.is_whole(folder / FOLDER, recipe.export)


def answer(dataset: Dataset, folder: Path) -> None:
    """Write what an artefact answers on the test rows, if it was exported before that was kept."""
    if (folder / ANSWERS).exists() or not (folder / FOLDER / "manifest.json").exists():
        return
    predict = text_artefact.predict if dataset.is_text else artefact.predict
    predict(folder / FOLDER, dataset).write(folder / ANSWERS)
