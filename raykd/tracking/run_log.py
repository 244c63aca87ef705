"""What a run has measured, as journal lines: a parent run, and a child for each seed, control and
trial.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raykd.data import Table
from raykd.files.address import Address
from raykd.files.open import open_place
from raykd.files.place import read_json_in
from raykd.recipe.recipe import Recipe
from raykd.teacher.identity import run_digest
from raykd.tracking import journal
from raykd.tracking.journal import NAME, Journal, Metric
from raykd.training import run_files, trained_arm
from raykd.training.arms import arms_of

PARENT = "run"
STATUS_OF = {"failed": "FAILED", "stopped": "KILLED"}  # of a trial's state; others finished


def open_journal(recipe: Recipe, table: Table, folder: Path, where: Address | None) -> Journal:
    """The run's journal.

    A new one starts with its parent run, the recipe's keys, and the data that the run reads.
    """
    is_new = not (folder / NAME).exists()
    lines = Journal(folder / NAME)
    store = open_place(where) if where else None
    tags = {"raykd.technique": recipe.technique, "raykd.recipe_digest": run_digest(recipe, table)}
    tags |= {"raykd.store_id": store.name} if store else {}
    commit = _commit()
    tags |= {"mlflow.source.git.commit": commit} if commit else {}
    lines.run(PARENT, folder.name, tags=tags)
    if is_new:
        lines.params(
            PARENT, dict(_flat(recipe.model_dump(mode="json", exclude={"scale", "track"})))
        )
        rows = table.rows_of_splits
        lines.dataset(PARENT, table.name, table.digest, recipe.data.source, {"rows": rows})
        manifest = read_json_in(store, "_MANIFEST.json") if store else None
        if store and manifest:
            lines.dataset(
                PARENT,
                f"teacher store {store.name}",
                manifest["sha256"],
                str(store),
                {"rows": rows},
            )
    return lines


def ended(folder: Path, status: str) -> None:
    """Write how the run stands after a command.

    Nothing is written if the run had not begun, or if its last line says the same.
    """
    lines = journal.read(folder / NAME)
    last = lines[-1] if lines else None
    if last and (last["kind"], last["run"], last.get("status")) != ("end", PARENT, status):
        Journal(folder / NAME).end(PARENT, status)


def arms(lines: Journal, recipe: Recipe, folder: Path) -> None:
    """Every trained arm as a child run with its curves."""
    for arm in arms_of(recipe):
        key = f"{arm.name}/seed-{arm.seed}"
        record = trained_arm.read_record(folder, arm.key)
        assert record is not None, "arms are recorded when they are trained"
        lines.run(key, key, PARENT, tags={"raykd.arm": arm.name})
        lines.params(
            key,
            {
                "seed": arm.seed,
                "params": record["params"],
                "weights_sha256": record["weights_sha256"],
            },
        )
        lines.metrics(key, curves(record["history"]))
        lines.metrics(key, [("seconds", record["seconds"], record["steps"])])
        lines.end(key, "FINISHED")


def trials(lines: Journal, folder: Path, table: Mapping[str, Any]) -> None:
    """Every trial as a child run with its point and its curve."""
    for row in table["trials"]:
        key = f"trial/{row['number']}"
        lines.run(key, key, PARENT, tags={"raykd.arm": "trial", "raykd.state": row["state"]})
        lines.params(key, row["params"])
        path = run_files.trial(folder, str(row["id"])) / run_files.HISTORY
        history = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        lines.metrics(key, curves(history))
        lines.end(key, STATUS_OF.get(row["state"], "FINISHED"))


def result(lines: Journal, report: Mapping[str, Any]) -> None:
    """The report's figures and its files."""
    metrics: list[Metric] = []
    for name in ("teacher", "control", "student", "artefact"):
        metrics += [
            (f"{name}/{key}", metric["value"], 0) for key, metric in report[name]["metrics"].items()
        ]
    metrics += [
        (f"{name}/accuracy", part["metrics"]["accuracy"]["value"], 0)
        for name, part in report["beside"].items()
    ]
    for name, part in report["retention"].items():
        metrics += _interval(f"retention/{name}", part)
    metrics += _interval("gap_closed", report["gap_closed"])
    metrics += [
        (key, report[key]["ratio"], 0)
        for key in ("compression", "training_cost")
        if report[key]["ratio"] is not None
    ]
    lines.metrics(PARENT, metrics)
    for name in (run_files.RECIPE, run_files.REPORT, run_files.REPORT_PAGE, run_files.BEST_RECIPE):
        if (lines.path.parent / name).exists():
            lines.artefact(PARENT, Path(name))
    if run_files.artefact(lines.path.parent).exists():
        lines.artefact(PARENT, Path("artefact"), "artefact")


def curves(history: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """(name, value, step) of a training history; terms stand under `terms/`."""
    metrics: list[Metric] = []
    for point in history:
        flat = {k: v for k, v in point.items() if isinstance(v, float)}
        flat |= {
            f"{table}/{k}": v
            for table in ("terms", "weights")
            for k, v in point.get(table, {}).items()
        }
        metrics += [(name, value, point["step"]) for name, value in flat.items()]
    return metrics


def _interval(name: str, part: Mapping[str, Any]) -> list[Metric]:
    if part["value"] is None:
        return []
    return [
        (name if key == "value" else f"{name}_{key}", part[key], 0) for key in ("value", "lo", "hi")
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _commit() -> str | None:
    """The commit of the current directory; None outside a repository."""
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
