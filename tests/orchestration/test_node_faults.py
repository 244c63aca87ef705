"""A user's fault on a node is told once, a trial's fails it alone; what is waited for is said."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipes import SEARCH

from raykd.errors import DataError, Diverged, InfraError
from raykd.orchestration import scoring, session, training, tuning
from raykd.orchestration.patience import Patience
from raykd.recipe.recipe import Recipe
from raykd.stages.load import load
from raykd.store.commit import Shard, plan_shards
from raykd.training.arm import ONE_PROCESS


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


def test_a_trials_fault_says_on_which_node_it_was_met(shared, monkeypatch):
    import ray

    monkeypatch.setattr(session, "node_name", lambda: "n2, 10.0.0.2")
    actor = SimpleNamespace(get_actor_id=lambda: "a1")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: actor)
    absent = shared | {"folder": shared["folder"] + "/absent"}
    with pytest.raises(InfraError, match=r"absent is not seen here; .*\(on node n2, 10\.0\.0\.2\)"):
        tuning._train_trial({}, absent, ONE_PROCESS, lambda _: None)


def test_a_trial_whose_cluster_failed_is_tried_again(reported, shared, tmp_path):
    def lose() -> None:
        raise InfraError("the teacher's actor gave no answer")

    with pytest.raises(InfraError):
        tuning._told_once(lose, {}, shared)
    assert reported == []
    assert tuning._fault_of({"id": "t1"}, tmp_path) is None


class ActorDiedError(Exception):
    """As Ray's: the names of its errors are asked for."""


class UserExceptionError(Exception):
    pass


def test_losses_are_made_good_as_long_as_work_goes_forward_and_for_a_time_without():
    """They were counted, and a dead node used them up within seconds."""
    now = [0.0]
    patience = Patience(120, least=10, clock=lambda: now[0])
    lost = ActorDiedError("its node is dead")
    assert patience.again(lost, 0)
    now[0] = 119.0
    assert patience.again(lost, 9)
    now[0] = 500.0
    assert patience.again(lost, 10), "it went forward"
    now[0] = 619.0
    assert patience.again(lost, 10)
    now[0] = 620.0
    assert not patience.again(lost, 19)


def test_what_user_code_raised_is_no_loss():
    patience = Patience(120)
    assert not patience.again(UserExceptionError("no such layer"), 10)
    carried = ActorDiedError("a rank ended")
    carried.__cause__ = DataError("row 7 is bad")
    assert not patience.again(carried, 10)


class Group:
    """A group of workers that does what it is told when it is fitted."""

    def __init__(self, then: Callable[[], Any]):
        self.fit = then


def test_a_group_that_lost_too_many_workers_is_followed_by_another(monkeypatch, tmp_path, capsys):
    recipe = Recipe.model_validate({"terms": {"ce": {}}, "scale": {"checkpoint_every": 10}})
    done = [0]

    def lose() -> None:
        done[0] += 10
        raise ActorDiedError("its node is dead")

    def fail() -> None:
        raise UserExceptionError("no such layer")

    groups = [lose, lose, lambda: SimpleNamespace(return_value=None)]
    monkeypatch.setattr(training, "worker_group", lambda *_, **__: Group(groups.pop(0)))
    assert training._fit(recipe, {}, tmp_path, lambda: done[0]) is None
    told = capsys.readouterr().err
    assert told.count("its node is dead; its group starts again from the newest checkpoint") == 2
    groups.append(fail)
    with pytest.raises(UserExceptionError):
        training._fit(recipe, {}, tmp_path, lambda: done[0])


class Writer:
    """A store that lacks some shards, without files."""

    def __init__(self, lacks: list[Shard]):
        self.lacks = lacks
        self.place = SimpleNamespace(put=lambda name, data: None, get=lambda name: None)

    def missing(self, shards: list[Shard]) -> list[Shard]:
        return list(self.lacks)

    def quarantined(self, shards: list[Shard]) -> dict[int, str]:
        return {}


def test_scoring_goes_on_with_what_is_missing_after_losing_its_actors(monkeypatch, capsys):
    shards = plan_shards({"train": 30}, 10)
    writer: Any = Writer(list(shards))
    asked: list[list[int]] = []

    def results(recipe: Any, source: Any, writer: Any, missing: list[Shard]) -> Any:
        asked.append([shard.number for shard in missing])

        def rows() -> Iterator[dict[str, Any]]:
            for shard in missing:
                if shard.number == 1 and len(asked) == 1:
                    raise RuntimeError from ActorDiedError("its node is dead")
                writer.lacks.remove(shard)
                yield {"rows": 10, "bad": 0, "seconds": 0.5}

        return SimpleNamespace(iter_rows=rows)

    monkeypatch.setattr(scoring, "shard_results", results)
    recipe = Recipe.model_validate({"terms": {"ce": {}}})
    scoring._score_missing(recipe, None, {"": writer}, shards)  # type: ignore[arg-type]
    assert asked == [[0, 1, 2], [1, 2]]
    assert "its node is dead; goes on with the shards that are missing" in capsys.readouterr().err


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
