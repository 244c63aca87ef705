"""A search whose processes were killed, given again: no trial is trained twice, and each has the
weights of an undisturbed one.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command import in_workers, raykd
from recipes import SEARCH
from safetensors.torch import load_file

from raykd.orchestration import tuning
from raykd.stages import walk
from raykd.stages.load import load, resolve
from raykd.training import loop, run_files, trial_record
from raykd.training.arm import World
from raykd.training.trial_record import TrialRecord

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(tiny.read_text() + SEARCH)
    return path


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run_files.HISTORY).read_text().splitlines()]


def test_a_killed_search_trains_no_trial_twice(recipe, stocked, session, tmp_path):
    out = stocked("search")
    fired = tmp_path / "fired"
    fault = {"RAYKD_FAULT": "train:step=25,rank=0,arm=student-0", "RAYKD_FAULT_FIRED": str(fired)}
    done = raykd(tmp_path, "tune", recipe, "--out", out, **session, **in_workers(fault))
    assert done.code == 0, done.err
    assert fired.exists(), "a trial's process was killed, and started again by the search"
    run = next(out.glob("tiny-*"))
    table = run_files.read_trials(run)
    assert table is not None
    assert len({row["id"] for row in table["trials"]}) == 3
    for row in table["trials"]:
        folder = run_files.trial(run, row["id"])
        assert row["id"] == trial_record.trial_id(row["params"])
        assert [point["step"] for point in history(folder)] == list(range(10, row["steps"] + 1, 10))
    before = {path: path.stat().st_mtime_ns for path in run_files.trials(run).rglob("*.*")}
    for name in (*run_files.SEARCHED, run_files.DIGESTS):
        (run / name).unlink()

    again = walk.tune(load(recipe), out)
    assert {path: path.stat().st_mtime_ns for path in run_files.trials(run).rglob("*.*")} == before
    by_id = {row["id"]: row | {"number": 0} for row in again["trials"]}
    assert by_id == {row["id"]: row | {"number": 0} for row in table["trials"]}
    assert again["best"]["id"] == table["best"]["id"]

    best = table["best"]
    shared = {"recipe": load(recipe).model_dump(mode="json"), "folder": str(tmp_path / "alone")}
    shared |= {"store": str(next((out / "stores").iterdir())), "source": None, "trial": best["id"]}
    (tmp_path / "alone").mkdir()
    tuning._train_trial(best["params"], shared, World(), lambda _: None)
    alone = run_files.trial(tmp_path / "alone", best["id"])
    assert history(alone) == history(run_files.trial(run, best["id"]))
    found = load_file(run_files.trial(run, best["id"]) / run_files.WEIGHTS)
    for name, value in load_file(alone / run_files.WEIGHTS).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_a_trial_that_was_ended_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    raw = {"technique": "none", "control": False, "data": {"stride": 128}}
    raw |= {"student": {"settings": {"width": 8, "layers": 1}}, "scale": {"checkpoint_every": 10}}
    recipe = resolve(raw | {"optim": {"steps": 40, "batch": 16, "evaluate_every": 10}})
    shared = {"recipe": recipe.model_dump(mode="json"), "folder": str(tmp_path), "trial": "a"}
    shared |= {"store": None, "source": None}
    told: list[int] = []

    def end_at_30(metrics: dict[str, Any]) -> None:
        told.append(metrics["step"])
        if metrics["step"] == 30:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tuning._train_trial({}, shared, World(), end_at_30)
    steps: list[int] = []
    monkeypatch.setattr(loop.faults, "point", lambda name, step=0, **_: steps.append(step))
    told.clear()
    tuning._train_trial({}, shared, World(), lambda metrics: told.append(metrics["step"]))
    assert steps[0] == 21, "the newest checkpoint is of the step before"
    assert steps[-1] == 40
    assert told == [10, 20, 30, 40]
    steps.clear()
    told.clear()
    tuning._train_trial({}, shared, World(), lambda metrics: told.append(metrics["step"]))
    assert steps == []
    assert told == [10, 20, 30, 40]


def test_a_trial_that_is_over_reports_what_it_reported(tmp_path):
    points = [{"step": step, "val_accuracy": step / 100} for step in (10, 20, 30)]
    lines = "".join(json.dumps(point) + "\n" for point in points)
    (tmp_path / run_files.HISTORY).write_text(lines)
    told: list[dict[str, Any]] = []
    ended = TrialRecord(trial_record.FINISHED, 30, 0.25)
    tuning._report_again(tmp_path, ended, "val_accuracy", told.append)
    assert told == [*points[:2], {"step": 30, "val_accuracy": 0.25}], (
        "of the weights it went back to"
    )
    told.clear()
    stopped = TrialRecord(trial_record.STOPPED, 20)
    tuning._report_again(tmp_path, stopped, "val_accuracy", told.append)
    assert told == points[:2]


def test_points_are_known_in_their_order_and_a_point_has_one_id(tmp_path):
    points = [{"optim.learning_rate": rate, "terms.kd.weight": 1} for rate in (0.3, 0.1, 0.2)]
    for number, params in enumerate(points):
        folder = run_files.trial(tmp_path, trial_record.trial_id(params))
        trial_record.begin(folder, params, number)
        trial_record.begin(folder, params, 9)
    assert trial_record.begun(tmp_path) == points
    turned = dict(reversed(points[0].items()))
    assert trial_record.trial_id(turned) == trial_record.trial_id(points[0])
    assert trial_record.begun(tmp_path / "none") == []


def test_a_proposed_point_is_a_known_one_first():
    space = load_space()
    known = [{"optim.learning_rate": 5e-3}]
    searcher = tuning._searcher("optuna", 3, known)
    searcher.set_search_properties("val_accuracy", "max", space)
    assert searcher.suggest("a") == known[0]
    fresh = tuning._searcher("optuna", 3, [])
    fresh.set_search_properties("val_accuracy", "max", space)
    assert searcher.suggest("b") != fresh.suggest("c")


def load_space() -> dict[str, Any]:
    from ray import tune

    return {"optim.learning_rate": tune.loguniform(1e-3, 1e-2)}


def test_a_damaged_record_is_refused(tmp_path):
    assert trial_record.read(tmp_path) is None
    (tmp_path / run_files.TRIAL).write_text(json.dumps({"state": "finished", "stop": os.sep}))
    with pytest.raises(tuning.errors.StoreError, match="delete it and give the same command"):
        trial_record.read(tmp_path)
