"""Runs side by side: what each bought over the first, in compare.json and compare.html."""

import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.console import say
from raykd.files.atomic import write_json
from raykd.reports import bootstrap
from raykd.reports.compare import comparison_page, comparison_text, runs
from raykd.reports.compare.changes import changes
from raykd.reports.compare.runs import Run
from raykd.reports.compare.table import VERSION, ComparedRun, Comparison, Difference, Verdict
from raykd.reports.evidence import parts_of, thrives
from raykd.reports.intervals import METRIC
from raykd.reports.sentences import LESS, MEASURES

OF_DRAFTS = ("acceptance", "block_efficiency", "overlap")
OF_TEACHER = ("kl", *OF_DRAFTS)


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """compare.json of these run folders as a dict; it stands in `<out>/compare-<digest8>/` with
    compare.html.
    """
    found = runs.read(folders)
    made = build(found)
    folder = (out / f"compare-{made['digest'][:8]}").resolve()
    _write(made, folder)
    say("compare", str(folder / "compare.html"))
    return made


def build(found: Sequence[Run]) -> dict[str, Any]:
    """The comparison of runs with the first of them, as plain JSON values checked against its
    schema.
    """
    first = found[0]
    masks = {run.name: rows for run in found if thrives(rows := run.answers.thriving)}
    thriving, rows = next(iter(masks.items()), (None, None))
    table = [_row(run, first, rows) for run in found]
    made = Comparison(
        version=VERSION,
        metric=METRIC,
        data=first.report.data,
        thriving_of=thriving,
        thriving_rows=0 if rows is None else int((rows == 1).sum()),
        runs=table,
        warnings=comparison_text.cautions(table, first.report.data.groups)
        + _unlike(masks.values())
        + _gapless(found),
        digest=runs.digest(found),
    )
    return made.model_dump(mode="json", by_alias=True)


def difference(run: Run, first: Run, rows: NDArray[np.bool_] | None = None) -> Difference:
    """The accuracy of `run` less that of `first` on `rows`, by the bootstrap of every report.

    Recordings are drawn once for both runs, and so are the seeds that both have.
    """
    one, other = _ordered(run, first)
    sample = bootstrap.resample(
        bootstrap.Hits(
            groups=run.answers.group,
            student=one.answers.hits,
            student_seeds=list(one.answers.student),
            control=other.answers.hits,
            control_seeds=list(other.answers.student),
            rows=rows,
        )
    )
    return _judged(sample, one is run)


def others(run: Run, first: Run) -> dict[str, Difference]:
    """What else both were measured by, over the same tokens or texts, as differences.

    What is of a teacher is left out where the teachers differ, and of drafts where they were asked
    for otherwise.
    """
    one, other = _ordered(run, first)
    unlike = any(change.key.startswith("teacher.") for change in changes(first.recipe, run.recipe))
    left_out = (
        OF_TEACHER if unlike else () if run.recipe.drafter == first.recipe.drafter else OF_DRAFTS
    )
    found = {}
    for name in MEASURES:
        if name in run.measures and name in first.measures and name not in left_out:
            sample = one.measures[name].beside(other.measures[name]).sample()
            found[name] = _judged(sample, one is run, less=name in LESS)
    return found


def _ordered(run: Run, first: Run) -> tuple[Run, Run]:
    """The two in the order of their seeds: either taken as the first gives the same draws, and the
    same difference with its sign turned.
    """
    one, other = sorted((run, first), key=lambda r: list(r.answers.student))
    return one, other


def _judged(sample: bootstrap.Sample, is_student: bool, *, less: bool = False) -> Difference:
    """The difference of the two runs of a sample, with its sign; `less` is better of losses."""
    found = bootstrap.difference(
        sample, *(("student", "control") if is_student else ("control", "student"))
    )
    assert found is not None
    verdict: Verdict = "not shown to differ"
    if found.lo > 0:
        verdict = "worse" if less else "better"
    elif found.hi < 0:
        verdict = "better" if less else "worse"
    return Difference(**vars(found), verdict=verdict)


def _row(run: Run, first: Run, rows: NDArray[np.int8] | None) -> ComparedRun:
    report = run.report
    is_first = run is first
    parts = {"thriving": None, "rest": None, "random": None} | parts_of(rows)
    return ComparedRun(
        name=run.name,
        folder=str(run.folder),
        recipe_digest=report.recipe_digest,
        technique=report.technique,
        setting=report.setting,
        seeds=report.seeds,
        steps=run.recipe.optim.steps,
        changes=changes(first.recipe, run.recipe),
        teacher=report.teacher.metrics.get(METRIC),
        control=report.control.metrics.get(METRIC),
        student=report.student.metrics[METRIC],
        gap_closed=report.gap_closed,
        retention=report.retention,
        artefact_bytes=report.artefact.bytes,
        compression=report.compression.ratio,
        training_cost=report.training_cost.ratio,
        bytes_per_row=report.store.bytes_per_row,
        accuracy=None if is_first else difference(run, first),
        measured=report.student.metrics,
        others={} if is_first else others(run, first),
        **{
            n: None if is_first or part is None else difference(run, first, part)
            for n, part in parts.items()
        },
    )


def _unlike(masks: Iterable[NDArray[np.int8]]) -> list[str]:
    """A warning where the teachers of the runs call different rows thriving."""
    return [comparison_text.UNLIKE] if len({rows.tobytes() for rows in masks}) > 1 else []


def _gapless(found: Sequence[Run]) -> list[str]:
    return [f"{run.name}: {run.report.gap_words}" for run in found if run.report.gap_words]


def _write(made: dict[str, Any], folder: Path) -> None:
    """Both files in `folder`, whole or absent."""
    staged = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        write_json(staged / "compare.json", made)
        (staged / "compare.html").write_text(comparison_page.render(made), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
