"""Which trainings a recipe asks for, and the one of them that is exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import TermSpec
from raykd.training import trained_arm
from raykd.training.arm import Arm

UNROUNDED = "unrounded"
ROUNDED_CONTROL = "rounded_control"


def arms_of(recipe: Recipe) -> list[Arm]:
    """The arms in the order they are trained: for each seed the control, what stands beside, then
    the student. All of them end by one rule.
    """
    labels_only = {"ce": TermSpec(weight=1.0, **_ce_settings(recipe))}
    select = _select(recipe)
    rounds = any(phase.quant for phase in recipe.phases)
    found = []
    for seed in recipe.seeds:
        student = student_arm(recipe, seed)
        if recipe.control:
            found.append(Arm("control", seed, labels_only, select=select))
        if rounds and recipe.rounded_control:
            rounded = Arm(ROUNDED_CONTROL, seed, labels_only, phases=student.phases, select=select)
            found.append(rounded)
        if rounds and recipe.unrounded:
            found.append(replace(student, name=UNROUNDED, phases=()))
        found.append(student)
    return found


def student_arm(recipe: Recipe, seed: int) -> Arm:
    """The recipe's own terms, row weights and phases."""
    source = recipe.source and recipe.source.model_copy(update={"log": recipe.source.log_of(seed)})
    return Arm(
        "student",
        seed,
        dict(recipe.terms),
        recipe.weighting,
        tuple(recipe.phases),
        source,
        _select(recipe),
    )


def _select(recipe: Recipe) -> str | None:
    """The metric by which every arm goes back to its best; None without phases, where all end with
    their last weights. An arm without phases beside a student with some is one whole phase.
    """
    return recipe.select if recipe.phases else None


def _ce_settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.terms["ce"].settings if "ce" in recipe.terms else {}


def best_student(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The record of the student with the highest validation accuracy, or what else `select` names;
    the first of equals, and None where no student is trained.
    """
    students = [arm for arm in arms_of(recipe) if arm.name == "student"]
    records = [record for arm in students if (record := trained_arm.read_record(folder, arm.key))]
    return max(records, key=lambda each: each["val"][f"val_{recipe.select}"], default=None)


def best_seed(recipe: Recipe, folder: Path) -> int:
    """The seed of the best student."""
    best = best_student(recipe, folder)
    assert best is not None, "called when students are trained"
    return best["seed"]


def validation_accuracies(recipe: Recipe, folder: Path) -> dict[str, float]:
    """The validation accuracy of every trained arm, by its key."""
    accuracies = {}
    for arm in arms_of(recipe):
        record = trained_arm.read_record(folder, arm.key)
        assert record is not None, "called when every arm is trained"
        accuracies[arm.key] = record["val"]["val_accuracy"]
    return accuracies
