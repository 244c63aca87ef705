"""What rounding gives without training: the unrounded student, rounded as the artefact is.

Its answers on the test rows stand beside the weights that they are of, so that a report only reads.
"""

from pathlib import Path

import torch

from raykd import models
from raykd.data import Dataset
from raykd.models.adapter import Adapter
from raykd.recipe.recipe import Recipe
from raykd.training import phases, predictions, run_files, trained_arm
from raykd.training.arms import UNROUNDED, arms_of
from raykd.training.device_rows import to_device
from raykd.training.predictions import Predictions


def rounded_afterwards(recipe: Recipe, dataset: Dataset, weights: Path) -> Predictions:
    """The test predictions of full-precision weights, rounded as in the recipe's last phase.

    Computed on the CPU.
    """
    assert recipe.quant is not None
    module = models.build_model(recipe.student.bare, **dataset.shape, key="student")
    models.load_weights(module, weights, "student")
    phases.round_as(module, recipe.quant)
    split = dataset.splits["test"]
    rows = to_device(split, "test", None, frozenset(), torch.device("cpu"))
    return predictions.of_model(Adapter(module), split, rows)


def write_rounded(recipe: Recipe, dataset: Dataset, arm: Path) -> None:
    """Write the answers of an unrounded arm's rounded weights into its folder."""
    answers = rounded_afterwards(recipe, dataset, arm / run_files.WEIGHTS)
    answers.write(arm / run_files.ROUNDED)


def write_missing(recipe: Recipe, dataset: Dataset, run: Path) -> None:
    """Write the same for arms that were trained before these answers were kept."""
    if recipe.quant is None:
        return
    for arm in arms_of(recipe):
        folder = run_files.arm(run, arm.key)
        if arm.name != UNROUNDED or (folder / run_files.ROUNDED).exists():
            continue
        record = trained_arm.read_record(run, arm.key)
        if record is None:
            continue
        write_rounded(recipe, dataset, folder)
        if "files" in record:
            trained_arm.write_record(folder, record)
