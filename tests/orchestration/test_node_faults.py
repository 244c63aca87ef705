"""A user's fault on a node is told once, a trial's fails it alone; what is waited for is said."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import SEARCH

from raykd.errors import DataError, Diverged, InfraError
from raykd.orchestration import session, training, tuning
from raykd.recipe.recipe import Recipe
from raykd.stages.load import load


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray warns of its own settings
def test_a_users_fault_in_one_rank_ends_the_group_at_once_and_is_not_tried_again(tmp_path):
    """While the other rank waits, as in a collective; it was tried four times."""
    attempts = tmp_path / "attempts"

    def fail(config: dict[str, Any]) -> None:
        import time

        import ray.train

        from raykd.errors import DataError
        from raykd.orchestration.session import at_node

        if ray.train.get_context().get_world_rank() == 0:
            time.sleep(600)
        with Path(config["attempts"]).open("a") as file:
            file.write("attempt\n")
        raise at_node(DataError("row 7 is bad"))

    recipe = Recipe.model_validate({"terms": {"ce": {}}, "scale": {"workers": 2, "retries": 3}})
    config = {"attempts": str(attempts)}
    group = training.worker_group(recipe, fail, config, folder=tmp_path, cpus=0.5)
    with pytest.raises(Exception, match="row 7 is bad") as failed:
        group.fit()
    told = session.plain_error(failed.value, "train")
    assert type(told) is DataError
    assert str(told).startswith("row 7 is bad (on node ")
    assert attempts.read_text() == "attempt\n"


@pytest.fixture
def reported(monkeypatch) -> list[dict[str, Any]]:
    """What a trial reports."""
    from ray import tune

    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", lines.append)
    return lines


@pytest.fixture
def shared(tiny, tmp_path) -> dict[str, Any]:
    path = tmp_path / "search.toml"
    path.write_text(tiny.read_text() + SEARCH)
    raw = load(path).model_dump(mode="json")
    return {"recipe": raw, "folder": str(tmp_path), "trial": "t1"}


def test_a_trials_own_fault_fails_it_once_and_is_kept(reported, shared, tmp_path):
    def diverge() -> None:
        raise Diverged("arm student-0: the gradient is not finite")

    tuning._told_once(diverge, {}, shared)
    (line,) = reported
    assert line["step"] == 40
    assert math.isnan(line["val_accuracy"])
    fault = tuning._fault_of({"id": "t1"}, tmp_path)
    assert type(fault) is Diverged
    with pytest.raises(Diverged, match="not finite"):
        tuning._with_best([{"state": "failed"}], [fault], "val_accuracy")


def test_a_trial_whose_cluster_failed_is_tried_again(reported, shared, tmp_path):
    def lose() -> None:
        raise InfraError("the teacher's actor gave no answer")

    with pytest.raises(InfraError):
        tuning._told_once(lose, {}, shared)
    assert reported == []
    assert tuning._fault_of({"id": "t1"}, tmp_path) is None


def ticks(count: int) -> Callable[[float], bool]:
    """An event's wait, which is over after some calls."""
    over = iter([*[False] * count, True])
    return lambda _: next(over)


def test_waiting_for_workers_is_said_until_they_have_started(monkeypatch, tmp_path, capsys):
    import ray

    monkeypatch.setattr(training, "WAITING_S", 0)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(training, "described", lambda: "1 node, 0 of 2 CPUs free")
    (tmp_path / "progress.jsonl").write_text('{"arm": "student-0", "step": 0}\n')
    progress = training.Progress("train", 40, "steps")
    watch = training._ProgressWatch(tmp_path, ["student-0"], steps=40, progress=progress)
    watch.over.wait = ticks(2)
    watch._watch()
    told = capsys.readouterr().err
    assert told.count("waits for its workers to start: 1 node, 0 of 2 CPUs free") == 2
    training._append_progress(tmp_path, "student-0", step=0, metrics={})
    watch.over.wait = ticks(1)
    watch._watch()
    assert "waits" not in capsys.readouterr().err
    assert json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[1])["step"] == 0
