"""The artefact of a run folder, of series or of text: checked early, written, asked for answers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raykd import models
from raykd.data import Dataset, Rows
from raykd.data.table import Source, after, in_memory
from raykd.deploy import artefact, forms, manifest, own_script, text_artefact
from raykd.files.digests import file_sha256
from raykd.recipe.recipe import Recipe
from raykd.training import predictions, run_files
from raykd.training.arms import best_student


def check(recipe: Recipe, dataset: Dataset) -> None:
    """RecipeError if the student cannot be exported, or not in the forms of `[export]`."""
    if not forms.asked(recipe.export) and not dataset.is_text:
        return
    student = models.build_model(recipe.student.bare, **dataset.shape, key="student")
    if dataset.is_text:
        text_artefact.check(student, recipe)
    kind = "text" if dataset.is_text else "sentences" if dataset.is_sentences else "series"
    forms.check(recipe.export, student, recipe.quant, kind=kind)


def write(recipe: Recipe, source: Source, folder: Path) -> dict[str, Any]:
    """Write `artefact/` of a run's best student, and beside it its answers on the test rows.

    Gives the manifest. GateError, and no folder, if it answers otherwise than the student. Of rows
    in parts the first are compared.
    """
    dataset = in_memory(source)
    export = text_artefact.export if dataset.is_text else artefact.export
    return export(recipe, dataset, folder, _rest(source, dataset))


def _rest(source: Source, dataset: Dataset) -> Iterator[Rows]:
    """The test rows that are not in memory, part by part."""
    return after(source, "test", len(dataset.splits["test"]))


def notes(manifest: Mapping[str, Any]) -> list[str]:
    """What a user of an artefact should know besides its size: what runs otherwise than it says."""
    lines = []
    left = manifest.get("computed_in_float32") or []
    for stored in dict.fromkeys(row["stored"] for row in left):
        names = [row["name"] for row in left if row["stored"] == stored]
        lines.append(f"computed in float32, stored as {stored}: {', '.join(names)}")
    if reason := manifest.get("needs_raykd"):
        lines.append(f"run.py needs raykd and torch, as ONNX cannot hold this student: {reason}")
    return lines


def is_whole(recipe: Recipe, folder: Path) -> bool:
    """Whether a run folder holds the artefact of its best student in just the forms of `[export]`,
    and its answers.
    """
    names = [run_files.ARTEFACT_ANSWERS]
    if recipe.drafter:
        names.append(run_files.DRAFTS)
    if not all((folder / name).exists() for name in names):
        return False
    return is_of_best(recipe, folder) and artefact.is_whole(
        run_files.artefact(folder), recipe.export
    )


def is_of_best(recipe: Recipe, folder: Path) -> bool:
    """Whether the artefact of a run folder is of the weights that its best student has now."""
    described = manifest.read_manifest(run_files.artefact(folder))
    best = best_student(recipe, folder)
    if described is None or best is None:
        return False
    copied = folder / run_files.STUDENT  # is all that an older manifest has
    taken = described.get(manifest.STUDENT) or (file_sha256(copied) if copied.exists() else None)
    return taken == best["weights_sha256"]


def check_files(exported: Path) -> None:
    """StoreError if the files of an artefact are not those of its manifest."""
    manifest.check(exported)


def answer(source: Source, folder: Path) -> None:
    """Write an artefact's answers on the test rows, if it was exported before they were kept.

    StoreError if the folder holds more than an export leaves there, or another script: whoever gave
    it may have written it, and its manifest.
    """
    target = folder / run_files.ARTEFACT_ANSWERS
    exported = run_files.artefact(folder)
    if target.exists() or not (exported / run_files.MANIFEST).exists():
        return
    manifest.check_alone(exported)
    own_script.check(exported)
    dataset = in_memory(source)
    predict = text_artefact.predict if dataset.is_text else artefact.predict
    first = predict(exported, dataset.splits["test"])
    rest = (predict(exported, rows) for rows in _rest(source, dataset))
    predictions.write_all(target, first, rest)
