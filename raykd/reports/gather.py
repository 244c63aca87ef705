"""A run folder and its store, read into the Evidence that a report is made of."""

import importlib.metadata
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data import Table
from raykd.data.table import Held, RowsDigest, Source
from raykd.errors import StoreError
from raykd.files.address import Address
from raykd.files.atomic import read_json
from raykd.generation import acceptance
from raykd.losses.reads import reads_of
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import Valence, ends_of
from raykd.reports import teacher_check, text_measures
from raykd.reports.evidence import Evidence
from raykd.reports.text_measures import Measure
from raykd.store import layer_signals
from raykd.store.manifest import seconds_of
from raykd.store.reader import Store
from raykd.teacher import teacher_size
from raykd.teacher.identity import run_digest
from raykd.training import predictions, run_files, trained_arm
from raykd.training.arms import ROUNDED_CONTROL, UNROUNDED, arms_of, best_seed
from raykd.training.predictions import Predictions, TestPlaces

QUANTILES = 5  # of a split's saliency in a store's statistics
LEAST_ESS = 0.1  # of a batch's rows; below, its gradient is that of a few
VALENCE_SIGNALS = {"valence", "trajectory", "saliency"}
PACKAGES = ("raykd", "torch", "ray", "pyarrow", "numpy", "mlflow")


def gather(
    found: Recipe,
    source: Source,
    folder: Path,
    where: Address | None,
    mlflow: dict[str, Any],
) -> Evidence:
    """Everything measured so far about a run: predictions, sizes, times, curves, trials."""
    table = source.table()
    records = {arm.key: trained_arm.read_record(folder, arm.key) for arm in arms_of(found)}
    test, test_digest = _tested(source)
    opened = Store(where) if where else None
    manifest = read_json(run_files.artefact(folder) / run_files.MANIFEST)
    saliency = _saliency(opened, test) if opened else None
    predicted = {name: _predicted(folder, records, name, test) for name in ("student", "control")}
    deployed = answers_of(folder / run_files.ARTEFACT_ANSWERS, test) if manifest else None
    every = predicted | ({"artefact": {0: deployed}} if deployed else {})
    return Evidence(
        recipe_digest=run_digest(found, table),
        technique=found.technique,
        setting=found.setting,
        seeds=found.seeds,
        data_name=table.name,
        data_rows=table.rows_of_splits,
        tested=table.labelled("test"),
        test_digest=test_digest,
        classes=table.classes,
        row_id=test.place,
        label=test.label,
        group=test.group,
        **{name: _answer_of(arm) for name, arm in predicted.items()},
        measures=_measures(found, folder, records, every, opened, test) if table.is_text else {},
        beside=_beside(found, folder, records, test),
        teacher=teacher_check.answers(opened, test, "test") if opened else None,
        artefact=deployed.answer if deployed else None,
        thriving=_thriving(opened, saliency),
        saliency=_saliency_of_train(opened) if opened else None,
        histogram=_histogram(opened) if opened else None,
        best_seed=(manifest or {}).get("seed", best_seed(found, folder)),
        student_params=_params(records, "student"),
        control_params=_params(records, "control"),
        teacher_info=teacher_size.told(found.teacher, table.shape)
        if found.teacher and found.teacher.weights
        else {},
        artefact_info=_artefact_info(manifest),
        training_cost=_cost(records, opened),
        throughput=_throughput(records, (manifest or {}).get("seed", best_seed(found, folder))),
        store=_store(found, opened),
        mlflow=mlflow,
        history=_history(records),
        search=run_files.read_trials(folder),
        machine={
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        warnings=_warnings(found, table, opened, records),
        asks_control=found.control,
        asks_valence=_asks_valence(found),
        phase_ends=ends_of(found.phases, found.optim.steps),
    )


def _tested(source: Source) -> tuple[TestPlaces, str]:
    """Where the test split is told, and its digest; it is read once, part by part."""
    if isinstance(source, Held):
        return TestPlaces.of_source(source, "test"), source.dataset.test_digest
    digest = RowsDigest(source.table().classes)
    return TestPlaces.of_source(source, "test", digest.add), digest.hexdigest()


def _predicted(
    folder: Path, records: dict[str, Any], name: str, test: TestPlaces
) -> dict[int, Predictions]:
    own = _seeds(folder, records, name)
    return {seed: answers_of(arm / run_files.PREDICTIONS, test) for seed, arm in own.items()}


def answers_of(path: Path, test: TestPlaces) -> Predictions:
    """The predictions in a file. StoreError unless they are of these test rows and their labels."""
    predicted = predictions.read(path, logits=False)
    for name in ("place", "label"):
        if not np.array_equal(getattr(predicted, name), getattr(test, name)):
            raise predictions.damaged(path, f"its column {name} is not that of the test rows")
    return replace(predicted, place=test.place, label=test.label)


def _measures(
    recipe: Recipe,
    folder: Path,
    records: dict[str, Any],
    predicted: dict[str, dict[int, Predictions]],
    store: Store | None,
    places: TestPlaces,
) -> dict[str, Measure]:
    """Losses of each model, of which the teacher's is nll alone; and how students and artefact did
    as drafters.
    """
    known = places.label >= 0
    found = text_measures.of_predictions(predicted, places.group[known])
    if store and not store.unscored("test"):
        nll = -store.stepwise("log_p", "test", places.row_id, places.steps).astype(np.float32)
        found["nll"] = replace(found["nll"], top={**found["nll"].top, "teacher": {0: nll[known]}})
    if recipe.drafter is None:
        return found
    drafts = {
        name: {
            seed: acceptance.read_acceptance(arm / run_files.DRAFTS) for seed, arm in own.items()
        }
        for name, own in ((name, _seeds(folder, records, name)) for name in predicted)
    }
    deployed = folder / run_files.DRAFTS
    return found | text_measures.of_drafts(
        drafts
        | ({"artefact": {0: acceptance.read_acceptance(deployed)}} if deployed.exists() else {})
    )


def _saliency(store: Store, test: TestPlaces) -> NDArray[np.floating]:
    """(n,): the saliency of each place's row, NaN where it is unknown."""
    return store.aligned("saliency", "test", test.row_id, np.nan)[test.row]


def _saliency_of_train(store: Store) -> NDArray[np.floating] | None:
    """(N,): the saliency of all training rows; None where the store's statistics tell it."""
    if "histogram" in _told_saliency(store):
        return None
    return store.column("saliency", "train").values


def _histogram(store: Store) -> dict[str, Any] | None:
    """The saliency of training rows as their scorers have counted it; None where they have not, or
    none is known.
    """
    told = _told_saliency(store)
    if told.get("histogram") is None:
        return None
    try:
        return {**told["histogram"], "q75": told["quantiles"][3]}
    except (KeyError, TypeError, IndexError):
        raise _damaged_statistics(store, "saliency") from None


def _told_saliency(store: Store) -> dict[str, Any]:
    """What a store's statistics say of saliency; nothing where that is no table."""
    told = store.manifest["statistics"].get("saliency")
    return told if isinstance(told, dict) else {}


def _seeds(folder: Path, records: dict[str, Any], name: str) -> dict[int, Path]:
    return {
        record["seed"]: run_files.arm(folder, key)
        for key, record in records.items()
        if record["arm"] == name
    }


def _beside(
    recipe: Recipe, folder: Path, records: dict[str, Any], test: TestPlaces
) -> dict[str, Any]:
    """Other trainings by name and seed; "post_training" is the unrounded student, rounded as it
    stands.
    """
    trainings = {
        name: _predicted(folder, records, name, test) for name in (UNROUNDED, ROUNDED_CONTROL)
    }
    answers = {name: _answer_of(arm) for name, arm in trainings.items()}
    if recipe.quant:
        answers["post_training"] = {
            seed: answers_of(arm / run_files.ROUNDED, test).answer
            for seed, arm in _seeds(folder, records, UNROUNDED).items()
        }
    return {name: arm for name, arm in answers.items() if arm}


def _answer_of(arm: dict[int, Predictions]) -> dict[int, NDArray[np.int64]]:
    return {seed: predicted.answer for seed, predicted in arm.items()}


def _thriving(
    store: Store | None, saliency: NDArray[np.floating] | None
) -> NDArray[np.int8] | None:
    """Which test rows are at or above the training split's 75th percentile of saliency; -1 where
    theirs is unknown.
    """
    if store is None or saliency is None:
        return None
    quantiles = _statistic(store, "saliency", "quantiles")
    if quantiles is None:
        return None
    if not isinstance(quantiles, list) or len(quantiles) != QUANTILES:
        raise _damaged_statistics(store, "saliency")
    return np.where(np.isnan(saliency), -1, saliency >= quantiles[3]).astype(np.int8)


def _statistic(store: Store, table: str, key: str) -> Any:
    """One value of a store's statistics. StoreError if they lack it."""
    values = store.manifest["statistics"].get(table)
    if not isinstance(values, dict) or key not in values:
        raise _damaged_statistics(store, table)
    return values[key]


def _damaged_statistics(store: Store, table: str) -> StoreError:
    return StoreError(
        f"{store.place}/_MANIFEST.json: no statistics of {table} in it; delete it and type: raykd "
        "score RECIPE"
    )


def _params(records: dict[str, Any], name: str) -> int | None:
    return next((record["params"] for record in records.values() if record["arm"] == name), None)


def _artefact_info(manifest: dict[str, Any] | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    kept = ("format", "bytes", "parity", "bytes_by_kind", "tensors")
    kept += ("computed_in_float32", "needs_raykd")
    found = {"path": "artefact"} | {key: manifest[key] for key in kept if key in manifest}
    return found | ({"latency": _latency(manifest["latency"])} if "latency" in manifest else {})


def _latency(measured: dict[str, Any]) -> dict[str, Any]:
    """With the two ratios that a script relies on: the artefact's time over the other's."""
    times = {(row["model"], row["runtime"]): row["ratio"] for row in measured["rows"]}
    found = dict(measured)
    for key, name in (("ratio_vs_teacher", "teacher"), ("ratio_vs_fp32_student", "fp32 student")):
        other = times.get((name, "onnxruntime"), times.get((name, "torch")))
        found[key] = 1 / other if other else None
    return found


def _throughput(records: dict[str, dict[str, Any] | None], seed: int | None) -> dict[str, float]:
    """How fast the student of a seed was trained; nothing of one that was trained before that was
    told.
    """
    record = records.get(f"student-{seed}") or {}
    return record.get("throughput", {})


def _cost(records: dict[str, Any], store: Store | None) -> float | None:
    """A student's seconds with all of the teacher's, over a control's; means over seeds."""
    seconds = {
        n: [r["seconds"] for r in records.values() if r["arm"] == n] for n in ("student", "control")
    }
    teacher = seconds_of(store.place) if store else 0.0
    if not any(seconds["control"]) or teacher is None:
        return None
    return float((np.mean(seconds["student"]) + teacher) / np.mean(seconds["control"]))


def _store(recipe: Recipe, store: Store | None) -> dict[str, Any]:
    """What the run reads of its store: the answers, and the inner layers of its own terms."""
    if store is None:
        return {}
    manifest = store.manifest
    rows = sum(record["rows"] for record in manifest["shards"])
    inner = [
        Store(layer_signals.place_of(store.place, name))
        for name in reads_of(recipe)
        if layer_signals.is_signal(name)
    ]
    size = sum(s.manifest["bytes"] for s in (store, *inner))
    codec = manifest["identity"]["store"]["codec"]
    return {
        "id": manifest["store_id"],
        "rows": rows,
        "bytes": size,
        "bytes_per_row": size / rows,
        "codec": codec,
    }


def _history(records: dict[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for record in records.values():
        curves.setdefault(record["arm"], {})[record["seed"]] = record["history"]
    return curves


def _asks_valence(recipe: Recipe) -> bool:
    """Whether anything of a recipe is about valence: its table, its row weights, or a term."""
    reads = reads_of(recipe) & VALENCE_SIGNALS
    return recipe.weighting is not None or recipe.valence != Valence() or bool(reads)


def _warnings(
    recipe: Recipe, table: Table, store: Store | None, records: dict[str, Any]
) -> list[str]:
    found = list(table.cautions)
    if store and table.is_text and not (store.serves("test", 1.0) and not store.unscored("test")):
        found.append(
            "no KL to the teacher: its store does not tell it at temperature 1, "
            "or not of every test row"
        )
    total = table.rows("train")
    hidden = total - table.labelled("train")
    if hidden:
        found.append(f"{hidden} of {total} training rows were used without their label")
    gate = _statistic(store, "value_head", "val_correlation") if store else None
    if gate is not None and gate < 0.2 and _asks_valence(recipe):
        found.append(
            f"the teacher's value head follows the future valence at r = {gate:.2f}: "
            "saliency is mostly noise"
        )
    shares = [
        p["weights"]["ess"]
        for record in records.values()
        for p in record["history"]
        if "weights" in p
    ]
    if shares and min(shares) < LEAST_ESS:
        found.append(
            f"row weights leave {min(shares):.1%} of a batch as its effective sample, "
            "so a few rows are all that is "
            'learnt; set weighting.mode = "ess" or lower weighting.boost'
        )
    return found
