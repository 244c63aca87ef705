"""The whole walk on one small recipe: what a run leaves, that it is left alone by the next, and
what MLflow holds.
"""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import child
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from recipes import SEARCH

from raykd.reports import answers, compare, schema
from raykd.stages import plan, walk
from raykd.stages.load import load
from raykd.training import predictions, run_files
from raykd.training.arms import arms_of
from raykd.training.run_arms import ArmRunner

pytestmark = pytest.mark.ray
KEPT = (
    "stores",
    "arms",
    "artefact",
    "trials",
    "tune.json",
    "best.toml",
    "answers.parquet",
    "report.json",
    "report.html",
)


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(tiny.read_text() + SEARCH)
    return path


@pytest.fixture(scope="module")
def made(recipe, scored) -> dict[str, Any]:
    return walk.run(load(recipe), scored)


@pytest.fixture(scope="module")
def folder(made, scored) -> Path:
    return next(scored.glob("tiny-*"))


def test_the_report_is_whole(made, folder):
    assert json.loads((folder / "report.json").read_bytes()) == made
    again = schema.Report.model_validate(made)
    assert again.model_dump(mode="json", by_alias=True) == made
    assert made["schema"] == 1
    for name in ("teacher", "control", "student", "artefact"):
        assert 0 <= made[name]["metrics"]["accuracy"]["value"] <= 1
    assert made["artefact"]["parity"]["agreement"] == 1
    assert (
        made["search"]["best"] in made["search"]["trials"]
        or made["search"]["best"]["test_accuracy"] >= 0
    )


def test_the_run_can_be_compared(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    made = compare.compare([folder, Path(copy)], tmp_path)
    assert made["runs"][1]["accuracy"] | {"n": 0} == {
        "value": 0, "lo": 0, "hi": 0, "n": 0, "verdict": "not shown to differ"
    }  # fmt: skip
    (student,) = answers.read(folder).student.values()
    np.testing.assert_array_equal(
        student, predictions.read(folder / "arms/student-0/predictions.parquet").answer
    )


def test_a_run_reported_without_its_answers_is_reported_again(made, recipe, folder, scored):
    kept = (folder / run_files.ANSWERS).read_bytes()
    (folder / run_files.ANSWERS).unlink()
    assert walk.report(load(recipe), scored) == made
    assert (folder / run_files.ANSWERS).read_bytes() == kept


def test_all_trials_are_there_over_one_store_without_a_look_at_test_rows(folder, scored):
    table = json.loads((folder / "tune.json").read_bytes())
    assert [trial["number"] for trial in table["trials"]] == [0, 1, 2]
    assert len({json.dumps(trial["params"]) for trial in table["trials"]}) == 3
    assert {trial["state"] for trial in table["trials"]} <= {"finished", "stopped"}
    assert len(list((scored / "stores").iterdir())) == 1
    left = {path.name for path in (folder / "trials").rglob("*") if path.is_file()}
    assert left == {"history.jsonl", "weights.safetensors", "point.json", "trial.json"}
    assert not any(
        "test" in path.read_text() for path in (folder / "trials").rglob("history.jsonl")
    )
    assert not any("test_accuracy" in trial for trial in table["trials"])


def test_the_best_trial_is_a_recipe_that_runs(folder, scored):
    best = load(folder / "best.toml")
    table = json.loads((folder / "tune.json").read_bytes())
    assert best.optim.learning_rate == table["best"]["params"]["optim.learning_rate"]
    assert (
        best.terms["kd"].settings["temperature"] == table["best"]["params"]["terms.kd.temperature"]
    )
    assert best.search is None
    found = {stage["stage"]: stage["done"] for stage in plan.plan(best, scored)["stages"]}
    assert found == {"score": True, "train": False, "export": False, "report": False}


def test_a_second_run_does_nothing_again_and_starts_no_ray(made, recipe, folder, scored):
    before = times(folder, scored)
    assert len(before) > 15
    new = multiprocessing.get_context("spawn")  # others are forked with Ray imported
    process = new.Process(target=_walk_again, args=(str(recipe), str(scored), made))
    process.start()
    assert child.wait([process]) == [0]
    assert times(folder, scored) == before


def times(folder: Path, out: Path) -> dict[Path, int]:
    roots = [out / "stores", *(folder / name for name in KEPT)]
    return {
        p: p.stat().st_mtime_ns for root in roots for p in (root, *root.rglob("*")) if p.is_file()
    }


def _walk_again(recipe: str, out: str, made: dict[str, Any]) -> None:
    assert walk.run(load(recipe), Path(out)) == made
    assert "ray" not in sys.modules


def test_mlflow_holds_the_run_its_arms_and_its_trials(made, folder):
    tracked = made["mlflow"]
    client = MlflowClient(tracking_uri=tracked["uri"])
    experiment = client.get_experiment_by_name(tracked["experiment"])
    runs = {
        run.data.tags["raykd.key"].partition("/")[2]: run
        for run in client.search_runs([experiment.experiment_id])
    }
    trials = {f"trial/{number}" for number in range(3)}
    assert runs.keys() == {"run", "control/seed-0", "student/seed-0"} | trials
    parent = runs.pop("run")
    assert parent.info.run_id == tracked["run_id"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["raykd.technique"] == "vanilla"
    assert parent.data.tags["raykd.store_id"] == made["store"]["id"]
    assert [run.data.tags["mlflow.parentRunId"] for run in runs.values()] == [
        parent.info.run_id
    ] * 5
    assert {key: runs[key].data.tags["raykd.arm"] for key in runs} == {
        "control/seed-0": "control",
        "student/seed-0": "student",
        **dict.fromkeys(trials, "trial"),
    }
    assert {item.dataset.name for item in parent.inputs.dataset_inputs} == {
        "watch_gestures",
        f"teacher store {made['store']['id']}",
    }
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert kept >= {"recipe.json", "report.json", "report.html", "best.toml", "artefact"}
    assert (
        parent.data.metrics["student/accuracy"] == made["student"]["metrics"]["accuracy"]["value"]
    )


def test_control_and_student_start_from_equal_weights(recipe, scored):
    found = load(recipe)
    store = next((scored / "stores").iterdir())
    shop = ArmRunner(found, store, torch.device("cpu"))
    control, student = (shop.student(arm).module.state_dict() for arm in arms_of(found))
    assert [arm.name for arm in arms_of(found)] == ["control", "student"]
    assert control.keys() == student.keys()
    assert all(torch.equal(control[name], student[name]) for name in control)
