"""Every name in a run folder, spelled once: files as names, folders as functions of the run folder.

A run folder holds

    recipe.json                     the recipe, resolved
    unfit.jsonl                     the rows of the data that were left out, where there are any
    journal.jsonl                   what MLflow is brought up to (its name is tracking/journal's)
    checkpoints/<arm>/              states of arms that are not done
    drafts/<arm>/                   the log of an arm's drafts, where it keeps them
    arms/<arm>/                     weights, predictions and drafts of a trained arm; arm.json last
    trials/<id>/                    point, history and weights of one trial of the search, or its
                                    fault; trial.json last
    tune.json, best.toml            the table of trials, and the best one's recipe
    artefact/                       the exported student; manifest.json last
    artefact_answers.parquet        what it answers on the test rows
    drafts.parquet                  how it does as a drafter
    student.safetensors             the exported seed's weights, as they were trained
    answers.parquet                 what a comparison of runs reads
    report.json, report.html        the report
    digests.json                    the sha256 of what search, export and report wrote
    progress.jsonl, ray/, beats/    of the running command
"""

from pathlib import Path
from typing import Any

from raykd.errors import StoreError
from raykd.files.atomic import read_json

RECIPE = "recipe.json"
UNFIT = "unfit.jsonl"
REPORT = "report.json"
REPORT_PAGE = "report.html"
ANSWERS = "answers.parquet"
TRIALS = "tune.json"
BEST_RECIPE = "best.toml"
PROGRESS = "progress.jsonl"
DIGESTS = "digests.json"
STUDENT = "student.safetensors"
ARTEFACT_ANSWERS = "artefact_answers.parquet"

DRAFTS = "drafts.parquet"  # of an arm in its folder, of the artefact in the run folder

ARM = "arm.json"
WEIGHTS = "weights.safetensors"  # of an arm, and of a trial
PREDICTIONS = "predictions.parquet"
ROUNDED = "rounded_afterwards.parquet"  # of the unrounded arm
HISTORY = "history.jsonl"
POINT = "point.json"  # where a trial stands in the searched space
TRIAL = "trial.json"  # how it ended
FAULT = "fault.json"  # of a trial that a repetition would not mend

MANIFEST = "manifest.json"  # in the artefact
EXPORTED = (f"artefact/{MANIFEST}", ARTEFACT_ANSWERS, DRAFTS, STUDENT)
REPORTED = (REPORT, REPORT_PAGE, ANSWERS)
SEARCHED = (TRIALS, BEST_RECIPE)


def arms(run: Path) -> Path:
    """The folder of all trained arms."""
    return run / "arms"


def arm(run: Path, key: str) -> Path:
    """The folder of one arm, whose `key` is such as "student-0"."""
    return arms(run) / key


def student(run: Path, seed: int) -> Path:
    """The folder of the student of one seed."""
    return arm(run, f"student-{seed}")


def arm_record(run: Path, key: str) -> Path:
    """The record of one arm, whose presence means that the arm is done."""
    return arm(run, key) / ARM


def checkpoints(run: Path) -> Path:
    """The folder of all checkpoints, which a command locks while it works on the run."""
    return run / "checkpoints"


def draft_log(run: Path, key: str) -> Path:
    """The folder of the log of one arm's drafts."""
    return run / "drafts" / key


def trials(run: Path) -> Path:
    """The folder of all trials of the search."""
    return run / "trials"


def trial(run: Path, key: str) -> Path:
    """The folder of one trial, by its id."""
    return trials(run) / key


def read_trials(run: Path) -> dict[str, Any] | None:
    """The table of the search; None if there is none. StoreError if it is no such table."""
    path = run / TRIALS
    table = read_json(path)
    if table is None:
        return None
    content = table if isinstance(table, dict) else {}
    trials = content.get("trials")
    rows = [content.get("best"), *trials] if isinstance(trials, list) else []
    keys = {"id", "number", "params", "state"}
    are_rows = all(isinstance(row, dict) and keys <= row.keys() for row in rows)
    if not rows or not are_rows or not isinstance(content.get("metric"), str):
        raise StoreError(
            f"{path} is damaged: no table of trials; delete it and give the same command, which "
            "searches again"
        )
    return table


def artefact(run: Path) -> Path:
    """The folder of the exported student."""
    return run / "artefact"


def beats(run: Path) -> Path:
    """The folder in which ranks say that they are alive."""
    return run / "beats"


def ray(run: Path) -> Path:
    """The folder that Ray Train and Ray Tune write to."""
    return run / "ray"
