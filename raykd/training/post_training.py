"""What rounding gives without training: the unrounded student, rounded as the artefact is.

Its answers on the test rows stand beside the weights that they are of, so that a report only reads.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch

from raykd import models
from raykd.data.table import Source
from raykd.models.adapter import Adapter
from raykd.recipe.recipe import Recipe
from raykd.training import phases, run_files, trained_arm
from raykd.training.arms import UNROUNDED, arms_of
from raykd.training.measured import measured, write

CPU = torch.device("cpu")


def rounded_afterwards(recipe: Recipe, shape: Mapping[str, int], weights: Path) -> Adapter:
    """Full-precision weights as a student, rounded as in the recipe's last phase.

    `shape` has the sizes that a model is built for.
    """
    assert recipe.quant is not None
    module = models.build_model(recipe.student.bare, **shape, key="student")
    models.load_weights(module, weights, "student")
    phases.round_as(module, recipe.quant)
    return Adapter(module)


def write_rounded(recipe: Recipe, source: Source, arm: Path) -> None:
    """Write the answers of an unrounded arm's rounded weights into its folder.

    They are computed on the CPU.
    """
    student = rounded_afterwards(recipe, source.table().shape, arm / run_files.WEIGHTS)
    with closing(measured(source, "test", None, CPU, scale=recipe.scale)) as split:
        write(student, split, arm / run_files.ROUNDED)


def write_missing(recipe: Recipe, source: Source, run: Path) -> None:
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
        write_rounded(recipe, source, folder)
        if "files" in record:
            trained_arm.write_record(folder, record)
