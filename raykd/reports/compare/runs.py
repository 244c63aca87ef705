"""Finished runs, read back from their folders, and the reasons not to compare them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from raykd.errors import DataError, RecipeError, StoreError
from raykd.files import links
from raykd.files.atomic import read_json
from raykd.files.digests import digest_of, file_sha256
from raykd.generation import acceptance
from raykd.recipe.recipe import Recipe
from raykd.reports import answers, text_measures
from raykd.reports.answers import RunAnswers
from raykd.reports.compare.changes import changes
from raykd.reports.intervals import METRIC
from raykd.reports.schema import Report
from raykd.reports.text_measures import Measure
from raykd.training import predictions, run_digests, run_files, trained_arm

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Run:
    """One finished run; `name` tells it from the others it is compared with."""

    name: str
    folder: Path
    recipe: Recipe
    report: Report
    answers: RunAnswers

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Beside accuracy, what the report tells of the students; nothing of series, whose answers
        say all.
        """
        told = self.report.student.metrics
        arms = {seed: run_files.student(self.folder, seed) for seed in self.answers.student}
        try:
            predicted = {
                s: predictions.read(arm / run_files.PREDICTIONS, logits=False)
                for s, arm in arms.items()
                if "nll" in told
            }
            drafts = {
                s: acceptance.read_acceptance(arm / run_files.DRAFTS)
                for s, arm in arms.items()
                if "acceptance" in told
            }
        except (pa.ArrowException, OSError, TypeError) as error:
            raise StoreError(
                f"{run_files.arms(self.folder)} is damaged: {error}; delete it and run again"
            ) from None
        found = (
            text_measures.of_predictions({"student": predicted}, self.answers.group)
            if predicted
            else {}
        )
        return found | text_measures.of_drafts({"student": drafts})


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, which can be compared row by row.

    RecipeError, StoreError or DataError if not.
    """
    where = [_folder(path) for path in folders]
    for number, folder in enumerate(where):
        if folder in where[:number]:
            raise RecipeError(
                f"{folders[number]} is named twice; a run differs from itself in nothing"
            )
    found = [_run(name, folder) for name, folder in zip(_names(where), where, strict=True)]
    for run in found[1:]:
        _check_rows(found[0], run)
    return found


def digest(found: Sequence[Run]) -> str:
    """Hex sha256 of the files that a comparison of these runs is made from, in their order."""
    made_from = (run_files.RECIPE, run_files.REPORT, run_files.ANSWERS)
    arms = "arms/student-*/*.parquet"
    files = [
        [*(run.folder / name for name in made_from), *sorted(run.folder.glob(arms))]
        for run in found
    ]
    return digest_of(
        [[run.name, *map(file_sha256, own)] for run, own in zip(found, files, strict=True)]
    )


def _folder(path: Path) -> Path:
    if path.is_file():
        raise RecipeError(
            f"{path} is a file; several arguments are run folders, "
            "and a recipe is reported on alone"
        )
    if not path.is_dir():
        raise RecipeError(
            f"no folder {path}; name the run folders to compare, such as runs/NAME-1234abcd"
        )
    return path.resolve()


def _names(folders: Sequence[Path]) -> list[str]:
    """Of each folder as many last parts of its path as tell all of them apart."""
    deepest = max(len(folder.parts) for folder in folders)
    for depth in range(1, deepest):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _run(name: str, folder: Path) -> Run:
    """A run whose files are those that were written. StoreError if it is not finished."""
    links.check_tree(folder)
    run_digests.check(folder)
    resolved, made = (read_json(folder / file) for file in (run_files.RECIPE, run_files.REPORT))
    if resolved is None:
        raise StoreError(f"{folder} is not a run folder: it has no recipe.json")
    recipe = _valid(Recipe, resolved, folder / run_files.RECIPE)
    if made is None:
        todo = f"type: raykd run RECIPE --out {folder.parent}"
        raise StoreError(
            f"{folder} is not finished: it has no report.json; {todo}, "
            f"with the recipe of {recipe.name!r}"
        )
    run = Run(
        name, folder, recipe, _valid(Report, made, folder / run_files.REPORT), answers.read(folder)
    )
    for seed in run.answers.student:
        trained_arm.read_record(folder, run_files.student(folder, seed).name)
    _check_metric(run)
    return run


def _valid(model: type[M], values: Any, path: Path) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"{path} is damaged, or of another version of raykd: {key}: {first['msg'].lower()}"
        ) from None


def _check_metric(run: Run) -> None:
    """DataError if the run was not measured by accuracy; StoreError unless its answers are those
    reported.
    """
    metrics = run.report.student.metrics
    if METRIC not in metrics:
        measured = ", ".join(metrics) or "nothing"
        raise DataError(
            f"{run.folder} is measured by {measured}, and runs are compared by {METRIC}"
        )
    if not run.answers.student or abs(run.answers.hits.mean() - metrics[METRIC].value) > 1e-9:
        again = f"delete report.json and type: raykd report RECIPE --out {run.folder.parent}"
        raise StoreError(
            f"{run.folder}: {run_files.ANSWERS} and report.json are not of the same students; "
            f"{again}"
        )


def _check_rows(first: Run, run: Run) -> None:
    """DataError unless both runs were tested on the same rows."""
    ours = first.answers
    theirs = run.answers
    same = all(
        np.array_equal(getattr(ours, k), getattr(theirs, k)) for k in ("row_id", "label", "group")
    )
    if same and (first.report.data.test_sha256, first.report.classes) == (
        run.report.data.test_sha256,
        run.report.classes,
    ):
        return
    sizes = [
        f"{r.report.data.name}, {len(r.answers.label):,} test rows in {r.name}"
        for r in (first, run)
    ]
    keys = [c for c in changes(first.recipe, run.recipe) if c.key.startswith("data.")]
    why = "".join(f"; {c.key} = {c.first!r} there, {c.here!r} here" for c in keys)
    raise DataError(
        f"{run.name} and {first.name} were not tested on the same rows: {'; '.join(sizes)}{why}"
    )
