"""What can be known to fail before any work: a recipe held against its data, teacher and student.

`raykd.stages.load` checks a recipe by itself; this needs the data, and builds models.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from raykd import models
from raykd.data import Dataset, Rows, Table
from raykd.data.table import Source, first_rows, in_memory
from raykd.deploy import run_artefact
from raykd.errors import RecipeError
from raykd.generation import judge_drafter
from raykd.losses.terms import needs_of
from raykd.models import hf_classifier
from raykd.models.probe import (
    ProbeRows,
    check_numbers,
    check_shared,
    check_student,
    check_teacher,
)
from raykd.models.recompute import check_blocks
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import ModelRef
from raykd.recipe.user_code import user_code
from raykd.recipe.weight_files import LLAMA, TRANSFORMERS
from raykd.training.arms import arms_of
from raykd.training.run_arms import kept_of, replay_of

# Steps that a built-in model is asked. To these, neither weights nor length matter: a few show the
# shapes, where attention over a million steps would take days.
CUT = {LLAMA: 8, "series_encoder": 256}


def check_with_data(
    recipe: Recipe, source: Source, folder: Path, *, with_export: bool = True
) -> None:
    """RecipeError, StoreError or DataError if the run in `folder` would fail.

    `with_export` checks the student's export, too, in all forms of `[export]`.
    """
    table = source.table()
    _check_labels(recipe, table)
    _check_text_tables(recipe, table)
    dataset = in_memory(source)
    _check_drafts(recipe, dataset, folder)
    _check_drafter(recipe, dataset)
    _check_models(recipe, table, first_rows(source, "train"))
    if with_export:
        run_artefact.check(recipe, dataset)


def _check_labels(recipe: Recipe, table: Table) -> None:
    """RecipeError where an arm would learn from labels, and no training row has one."""
    if table.labelled("train"):
        return
    rows = "no training row has a label"
    if recipe.teacher is None or not needs_of(recipe.terms):
        raise RecipeError(
            f"terms: {rows}, and no term reads a teacher; add one, such as [terms.kd]"
        )
    for key in ("control", "rounded_control"):
        if getattr(recipe, key):
            raise RecipeError(
                f"{key}: {rows}, and a control learns from labels alone; set {key} = false, and "
                "the student learns from its teacher alone"
            )


def _check_text_tables(recipe: Recipe, table: Table) -> None:
    """RecipeError where a table is about text and the data are none, or the other way round."""
    if recipe.select != "accuracy" and table.is_text:
        raise RecipeError(
            f'select = "{recipe.select}": of classes, but the data are text; leave it out'
        )
    for key in ("source", "drafter"):
        if getattr(recipe, key) and not table.is_text:
            raise RecipeError(
                f"{key}: needs text rows, but this data set has none; set data.tokenizer, "
                f"or remove [{key}]"
            )


def _check_drafts(recipe: Recipe, dataset: Dataset, folder: Path) -> None:
    """An error where a log of drafts cannot be written or read."""
    for arm in arms_of(recipe):
        kept_of(recipe, dataset, arm, folder)
        replay_of(arm, dataset, torch.device("cpu"))


def _check_drafter(recipe: Recipe, dataset: Dataset) -> None:
    """An error where students cannot be judged as the teacher's drafters."""
    if recipe.drafter is None:
        return
    if recipe.teacher is None:
        raise RecipeError(
            "drafter: judges students by their teacher, and there is none; add [teacher], "
            "or remove [drafter]"
        )
    judge_drafter.openings(dataset.splits["test"], recipe.drafter)
    for key, ref in (("teacher", recipe.teacher), ("student", recipe.student)):
        with torch.device("meta"):
            module = models.build_model(ref.bare, **dataset.shape, key=key)
            judge_drafter.check(module, key)


def _check_models(recipe: Recipe, table: Table, train: Rows) -> None:
    """RecipeError where student or teacher cannot do with rows as these data have them.

    `train` are some of the training rows.
    """
    teacher = recipe.teacher
    probed: list[tuple[str, ModelRef, Any]] = [("student", recipe.student.bare, check_student)]
    # A language model in a folder is found out as it is read: its columns, its steps, that it is
    # causal.
    of_folder = teacher and (teacher.model == TRANSFORMERS or _is_folder(teacher))
    if teacher is not None and (table.is_sentences or not of_folder):
        probed.append(("teacher", teacher, check_teacher))
    if table.is_sentences:
        _check_folders(recipe, table)
    every_row = _probe_rows(train, len(table.classes))
    for key, ref, check in probed:
        rows = every_row._replace(may_have_more=key == "teacher" and table.is_text)
        if ref.model in CUT:
            rows = _cut(rows, CUT[ref.model])
        if ref.model == LLAMA:
            ref = ref.bare
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = models.build_model(ref, **table.shape, key=key)
            with user_code(f"{key}.model {ref.model}"):
                check(module, key, rows)
                check_numbers(module, key, rows, recipe.precision)
                if key == "student" and recipe.scale.recompute == "blocks":
                    check_blocks(module)
                if key == "student" and recipe.scale.workers[1] > 1:
                    check_shared(module, key, rows)
                elif key == "student" and recipe.scale.micro:
                    check_shared(module, key, rows, advice="leave scale.micro out")
                if key == "student" and recipe.scale.shard != "none":
                    from raykd.training.sharding import check_parts

                    check_parts(module, rows.inputs, rows.mask)


def _check_folders(recipe: Recipe, table: Table) -> None:
    """RecipeError where the folder of a text classifier is of other classes, or cannot be read."""
    for key, ref in (("teacher", recipe.teacher), ("student", recipe.student)):
        if ref is None or ref.model != TRANSFORMERS or not _is_folder(ref):
            continue
        folder = Path(str(ref.weights))
        if key == "teacher":
            hf_classifier.check_names(folder, table.classes, key)
        else:  # the probe asks one without weights
            models.build_model(ref, **table.shape, key=key)


def _cut(rows: ProbeRows, steps: int) -> ProbeRows:
    """The first steps of each row; whole rows where one has nothing valid there."""
    if not rows.mask[:, :steps].any(1).all():
        return rows
    return rows._replace(inputs=rows.inputs[:, :steps], mask=rows.mask[:, :steps])


def _is_folder(ref: ModelRef) -> bool:
    return ref.weights is not None and Path(ref.weights).is_dir()


def _probe_rows(train: Rows, classes: int) -> ProbeRows:
    """The shortest training row and the longest one; for the first, one that is padded before a
    step, if there is one.
    """
    length = train.mask.sum(1)
    is_scattered = (train.mask[:, 1:] & ~train.mask[:, :-1]).any(1)
    first = is_scattered.argmax() if is_scattered.any() else length.argmin()
    chosen = [int(first), int(length.argmax())]
    if chosen[0] == chosen[1]:  # rows of one length
        chosen = [0, len(train) - 1]
    inputs = torch.from_numpy(np.array(train.inputs[chosen]))
    mask = torch.from_numpy(np.array(train.mask[chosen]))
    mask[1] = True  # the longest row may lie elsewhere
    if train.is_text:  # there a mask is of the loss, and says nothing of length
        mask[0] = True
    return ProbeRows(inputs, mask, classes)
