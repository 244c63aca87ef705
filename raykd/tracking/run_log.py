"""What a run has measured, as journal lines: a parent run, and a child for each seed, control and
trial.
"""

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
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

Begun = Callable[[], Journal]  # gives the run's journal, begun if it is new
PARENT = "run"
STATUS_OF = {"failed": "FAILED", "stopped": "KILLED"}  # of a trial's state; others finished


def open_journal(recipe: Recipe, table: Table, folder: Path, where: Address | None) -> Journal:
    """The run's journal.

    It starts with its parent run, the recipe's keys, and the data that the run reads. What a
    killed process has not written of that is written now.
    """
    known = _told(folder, PARENT)
    lines = Journal(folder / NAME)
    store = open_place(where) if where else None
    if not known:
        tags = {"raykd.technique": recipe.technique}
        tags |= {"raykd.recipe_digest": run_digest(recipe, table)}
        tags |= {"raykd.store_id": store.name} if store else {}
        commit = _commit()
        tags |= {"mlflow.source.git.commit": commit} if commit else {}
        lines.run(PARENT, folder.name, tags=tags)
    if not any(line["kind"] == "params" for line in known):
        keys = recipe.model_dump(mode="json", exclude={"scale", "track"})
        lines.params(PARENT, dict(_flat(keys)))
    read = {line["name"] for line in known if line["kind"] == "dataset"}
    profile = {"rows": table.rows_of_splits}
    if table.name not in read:
        lines.dataset(PARENT, table.name, table.digest, recipe.data.source, profile)
    if store and f"teacher store {store.name}" not in read:
        manifest = read_json_in(store, "_MANIFEST.json")
        if manifest:
            name = f"teacher store {store.name}"
            lines.dataset(PARENT, name, manifest["sha256"], str(store), profile)
    return lines


def ended(folder: Path, status: str) -> None:
    """Write how the run stands after a command.

    Nothing is written if the run had not begun, or if its last line says the same.
    """
    lines = journal.read(folder / NAME)
    last = lines[-1] if lines else None
    if last and (last["kind"], last["run"], last.get("status")) != ("end", PARENT, status):
        Journal(folder / NAME).end(PARENT, status)


def arms(begun: Begun, recipe: Recipe, folder: Path) -> None:
    """Every trained arm that the journal lacks, as a child run with its curves."""
    for arm in arms_of(recipe):
        key = f"{arm.name}/seed-{arm.seed}"
        record = trained_arm.read_record(folder, arm.key)
        assert record is not None, "arms are recorded when they are trained"
        params = {"seed": arm.seed}
        params |= {name: record[name] for name in ("params", "weights_sha256")}
        if _has(folder, key, params):
            continue
        lines = begun()
        lines.run(key, key, PARENT, tags={"raykd.arm": arm.name})
        lines.params(key, params)
        lines.metrics(key, curves(record["history"]))
        speed = {"seconds": record["seconds"], **record.get("throughput", {})}
        lines.metrics(key, [(name, value, record["steps"]) for name, value in speed.items()])
        lines.end(key, "FINISHED")


def trials(begun: Begun, folder: Path, table: Mapping[str, Any]) -> None:
    """Every trial that the journal lacks, as a child run with its point and its curve."""
    for row in table["trials"]:
        key = f"trial/{row['number']}"
        params = row["params"] | {"trial_id": row["id"]}
        if _has(folder, key, params):
            continue
        lines = begun()
        lines.run(key, key, PARENT, tags={"raykd.arm": "trial", "raykd.state": row["state"]})
        lines.params(key, params)
        path = run_files.trial(folder, str(row["id"])) / run_files.HISTORY
        history = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        lines.metrics(key, curves(history))
        lines.end(key, STATUS_OF.get(row["state"], "FINISHED"))


def _told(folder: Path, key: str) -> list[dict[str, Any]]:
    """What the journal of a run folder tells of one run."""
    return [line for line in journal.read(folder / NAME) if line["run"] == key]


def _has(folder: Path, key: str, params: Mapping[str, Any]) -> bool:
    """Whether the journal tells a run with these params to its end.

    An older journal tells fewer of them.
    """
    told = _told(folder, key)
    at = [number for number, line in enumerate(told) if line["kind"] == "params"]
    if not at or not any(line["kind"] == "end" for line in told[at[-1] :]):
        return False
    wanted = {name: journal.text(value) for name, value in params.items()}
    return told[at[-1]]["values"].items() <= wanted.items()


def has_result(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether the journal tells a report's figures, and its files after them."""
    told = _told(folder, PARENT)
    rows = journal.rows_of(_figures(report))
    at = [
        number
        for number, line in enumerate(told)
        if line["kind"] == "metrics" and sorted(line["values"]) == rows
    ]
    if not at:
        return False
    files = {line["path"] for line in told[at[-1] :] if line["kind"] == "artefact"}
    return files >= {path.as_posix() for path, _ in _files(folder)}


def result(lines: Journal, report: Mapping[str, Any]) -> None:
    """The report's figures and its files."""
    lines.metrics(PARENT, _figures(report))
    for path, folder in _files(lines.path.parent):
        lines.artefact(PARENT, path, folder)


def _figures(report: Mapping[str, Any]) -> list[Metric]:
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
    return sorted(metrics)


def _files(folder: Path) -> list[tuple[Path, str]]:
    """What a run uploads, and into which folder."""
    names = (run_files.RECIPE, run_files.REPORT, run_files.REPORT_PAGE, run_files.BEST_RECIPE)
    found = [(Path(name), "") for name in names if (folder / name).exists()]
    has_artefact = run_files.artefact(folder).exists()
    return [*found, (Path("artefact"), "artefact")] if has_artefact else found


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
