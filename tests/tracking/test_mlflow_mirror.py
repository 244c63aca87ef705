"""Laws of the record:

MLflow holds the journal, once, however often and from wherever it is replayed.
"""

import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from raykd.errors import StoreError
from raykd.tracking import journal, mlflow_mirror, sqlite_file, sync_plan
from raykd.tracking.journal import Journal


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> str:
    """One sqlite store for every test: building its tables takes seconds."""
    out = tmp_path_factory.mktemp("out with space")
    folder = out / "first-00000000"
    Journal(folder / journal.NAME).run("run", "first")
    assert mlflow_mirror.sync(folder, uri=mlflow_mirror.default_uri(out), experiment="first").done
    return mlflow_mirror.default_uri(out)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run folder whose journal has a parent, two children and every kind of line."""
    folder = tmp_path / "gesture-0a1b2c3d"
    lines = Journal(folder / journal.NAME)
    lines.run("run", "gesture", tags={"raykd.technique": "vanilla"})
    lines.params("run", {"optim.steps": 40, "seeds": [0, 1], "setting": "x" * 7000})
    lines.dataset("run", "teacher store", "d" * 64, "stores/abc", {"rows": 12})
    for seed in range(2):
        key = f"student/seed-{seed}"
        lines.run(key, key, "run")
        lines.params(key, {"seed": seed})
        for step in range(5):
            lines.metrics(key, [("loss", 1 / (1 + step), step), ("accuracy", 0.5, step)])
        lines.metrics(key, [("loss", math.nan, 5), ("peak", math.inf, 5)])
        lines.end(key, "FINISHED")
    (folder / "artefact").mkdir()
    (folder / "artefact" / "student.bin").write_bytes(b"weights")
    lines.artefact("run", Path("artefact"))
    lines.artefact("run", folder / "artefact" / "student.bin", "best")
    lines.end("run", "FINISHED")
    return folder


def recorded(uri: str, experiment: str) -> dict:
    """Everything MLflow has of an experiment, by run key, with metrics and inputs as multisets."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    keys = {run.info.run_id: run.data.tags[mlflow_mirror.KEY_TAG] for run in runs}
    assert len(set(keys.values())) == len(runs), "a run was recorded twice"
    return {keys[run.info.run_id]: _contents(client, run, keys) for run in runs}


def _contents(client, run, keys: dict[str, str]) -> dict:
    run_id = run.info.run_id
    points = [
        point for name in run.data.metrics for point in client.get_metric_history(run_id, name)
    ]
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": {name: keys.get(value, value) for name, value in run.data.tags.items()},
        "metrics": Counter((p.key, str(p.value), p.step, p.timestamp) for p in points),
        "inputs": Counter((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
        "artefacts": [f.path for f in client.list_artifacts(run_id)],
    }


def test_everything_in_the_journal_is_in_mlflow(store, folder):
    result = mlflow_mirror.sync(folder, uri=store, experiment="all")
    assert result == mlflow_mirror.Synced(True, "", 0, result.runs)
    assert set(result.runs) == {"run", "student/seed-0", "student/seed-1"}
    runs = recorded(store, "all")
    parent = runs["gesture-0a1b2c3d/run"]
    child = runs["gesture-0a1b2c3d/student/seed-1"]
    assert parent["params"]["seeds"] == "[0, 1]"
    assert parent["params"]["setting"].endswith("[7000 characters; the whole is in journal.jsonl]")
    assert parent["inputs"] == {("teacher store", "d" * 36): 1}
    assert parent["artefacts"] == ["artefact", "best"]
    assert child["tags"]["mlflow.parentRunId"] == "gesture-0a1b2c3d/run"
    assert child["metrics"].total() == 10
    assert {math.isfinite(float(value)) for _, value, *_ in child["metrics"]} == {True}
    left_out = "loss (1 value, nan from step 5), peak (1 value, inf from step 5)"
    assert child["tags"][mlflow_mirror.LEFT_OUT_TAG] == left_out
    assert mlflow_mirror.LEFT_OUT_TAG not in parent["tags"]
    assert child["status"] == parent["status"] == "FINISHED"
    lines = journal.read(folder / journal.NAME)
    assert parent["times"] == (lines[0]["time_ms"], lines[-1]["time_ms"])


@pytest.mark.parametrize("keep_cursor", [True, False])
def test_replaying_twice_is_replaying_once(store, folder, keep_cursor):
    experiment = f"twice-{keep_cursor}"
    first = mlflow_mirror.sync(folder, uri=store, experiment=experiment)
    once = recorded(store, experiment)
    if not keep_cursor:
        (folder / sync_plan.CURSOR).unlink()
    assert mlflow_mirror.sync(folder, uri=store, experiment=experiment) == first
    assert recorded(store, experiment) == once


@pytest.mark.parametrize("cut", [1, 3, 6, 9])
def test_a_crash_halfway_makes_no_duplicates(store, folder, cut):
    """As if killed after `cut` lines and before the cursor was saved."""
    whole = (folder / journal.NAME).read_bytes()
    (folder / journal.NAME).write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]))
    assert mlflow_mirror.sync(folder, uri=store, experiment=f"crash-{cut}").done
    (folder / sync_plan.CURSOR).unlink()
    (folder / journal.NAME).write_bytes(whole)
    assert mlflow_mirror.sync(folder, uri=store, experiment=f"crash-{cut}").done
    mlflow_mirror.sync(folder, uri=store, experiment=f"whole-{cut}")
    assert recorded(store, f"crash-{cut}") == recorded(store, f"whole-{cut}")


def test_two_run_folders_of_one_name_are_two_runs(store, folder, tmp_path):
    """Each is whole, in any order of syncs, and found again without its cursor."""
    other = tmp_path / "elsewhere" / folder.name
    lines = Journal(other / journal.NAME)
    lines.run("run", "gesture", tags={"raykd.technique": "vanilla"})
    lines.metrics("run", [("loss", 0.25, step) for step in range(3)])
    lines.end("run", "FAILED")
    from mlflow import MlflowClient

    told = [mlflow_mirror.sync(each, uri=store, experiment="twins") for each in (folder, other)]
    assert [one.done for one in told] == [True, True]
    for each in (other, folder):
        (each / sync_plan.CURSOR).unlink()
    again = [mlflow_mirror.sync(each, uri=store, experiment="twins") for each in (folder, other)]
    assert [one.runs for one in again] == [one.runs for one in told]
    assert not set(told[0].runs.values()) & set(told[1].runs.values())
    client = MlflowClient(tracking_uri=store)
    found = client.get_run(told[1].runs["run"])
    assert found.info.status == "FAILED"
    assert found.data.metrics == {"loss": 0.25}
    assert found.data.params == {}
    child = client.get_run(told[0].runs["student/seed-0"])
    assert child.data.tags["mlflow.parentRunId"] == told[0].runs["run"]


def test_a_journal_of_before_there_were_ids_finds_its_runs_by_name(store, folder):
    path = folder / journal.NAME
    first, *others = path.read_text().splitlines()
    line = json.loads(first)
    line["tags"].pop(journal.ID_TAG)
    path.write_text("\n".join([json.dumps(line), *others]) + "\n")
    told = mlflow_mirror.sync(folder, uri=store, experiment="older")
    (folder / sync_plan.CURSOR).unlink()
    again = mlflow_mirror.sync(folder, uri=store, experiment="older")
    assert told.done
    assert again.runs == told.runs
    assert len(recorded(store, "older")) == 3


def test_a_resumed_run_keeps_its_first_params(store, folder):
    mlflow_mirror.sync(folder, uri=store, experiment="resumed")
    lines = Journal(folder / journal.NAME)
    lines.run("run", "gesture")
    lines.params("run", {"optim.steps": 99, "resumed": True})
    assert mlflow_mirror.sync(folder, uri=store, experiment="resumed").done
    params = recorded(store, "resumed")["gesture-0a1b2c3d/run"]["params"]
    assert (params["optim.steps"], params["resumed"]) == ("40", "true")


def test_a_dead_server_costs_little_and_loses_nothing(store, folder):
    uri = f"http://me:secret@127.0.0.1:{_closed_port()}"
    start = time.monotonic()
    result = mlflow_mirror.sync(folder, uri=uri, experiment="dead", limit_s=600)
    assert time.monotonic() - start < 300, "it did not wait for the limit"
    assert (result.done, result.pending) == (False, len(journal.read(folder / journal.NAME)))
    assert "refused" in result.reason
    assert "secret" not in result.reason
    assert mlflow_mirror.sync(folder, uri=store, experiment="dead").done
    assert recorded(store, "dead")["gesture-0a1b2c3d/run"]["status"] == "FINISHED"


def test_a_server_that_never_answers_is_left_at_the_limit(folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = mlflow_mirror.sync(folder, uri=uri, experiment="silent", limit_s=3)
        assert time.monotonic() - start < 100, "MLflow's own limit is 120 s a request"
    assert not result.done
    assert mlflow_mirror.pending(folder) == result.pending > 0
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_pending_counts_the_lines_not_yet_told(store, folder):
    assert mlflow_mirror.pending(folder) == len(journal.read(folder / journal.NAME))
    mlflow_mirror.sync(folder, uri=store, experiment="pending")
    assert mlflow_mirror.pending(folder) == 0
    Journal(folder / journal.NAME).metrics("run", [("late", 1.0, 0)])
    assert mlflow_mirror.pending(folder) == 1


def test_another_store_is_filled_from_the_start(store, folder):
    mlflow_mirror.sync(folder, uri=store, experiment="here")
    assert mlflow_mirror.sync(folder, uri=store, experiment="there").done
    assert len(recorded(store, "there")) == 3


ODD = [
    "a/b c",
    "loss(kd)",
    "loss[kd]",
    "../up",
    "/root",
    "a//b",
    "",
    "50%",
    "a:b",
    "a\n",
    "..a",
    "x" * 300,
]


def test_odd_names_stay_apart_and_arrive(store, tmp_path):
    folder = tmp_path / "odd-0a1b2c3d"
    lines = Journal(folder / journal.NAME)
    lines.run("run", "odd/name: %", tags=dict.fromkeys(ODD, "tag"))
    lines.params("run", {name: name for name in ODD})
    lines.metrics("run", [(name, 1.0, 0) for name in ODD])
    result = mlflow_mirror.sync(folder, uri=store, experiment="odd (names) %")
    assert result.done, result.reason
    run = recorded(store, "odd (names) %")["odd-0a1b2c3d/run"]
    assert len(run["params"]) == run["metrics"].total() == len(ODD)
    assert run["params"]["a/b c"] == "a/b c"


def test_more_values_than_one_call_takes(store, tmp_path):
    folder = tmp_path / "many-0a1b2c3d"
    lines = Journal(folder / journal.NAME)
    lines.run("run", "many")
    lines.params("run", {f"p{i}": i for i in range(250)})
    lines.metrics("run", [("loss", i / 7, i) for i in range(2100)])
    assert mlflow_mirror.sync(folder, uri=store, experiment="many").done
    run = recorded(store, "many")["many-0a1b2c3d/run"]
    assert (len(run["params"]), run["metrics"].total()) == (250, 2100)


def test_an_artefact_that_is_gone_is_named_and_holds_nothing_up(store, folder):
    (folder / "artefact" / "student.bin").unlink()
    result = mlflow_mirror.sync(folder, uri=store, experiment="gone")
    assert result.done
    assert "artefact/student.bin" in result.reason


def half_made(file: Path) -> None:
    """A data base whose tables a full disk left half made: MLflow cannot go on from there."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("CREATE TABLE datasets (dataset_uuid VARCHAR(36) NOT NULL)")
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER NOT NULL)")
        connection.execute("INSERT INTO experiments VALUES (0)")


def test_tables_that_a_full_disk_left_half_made_are_made_again(folder):
    half_made(folder.parent / "mlflow.db")
    uri = mlflow_mirror.default_uri(folder.parent)
    result = mlflow_mirror.sync(folder, uri=uri, experiment="healed")
    assert result.done, result.reason
    assert len(recorded(uri, "healed")) == 3


def test_half_made_tables_that_hold_something_are_left_alone_and_named(folder):
    file = folder.parent / "mlflow.db"
    half_made(file)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("INSERT INTO datasets VALUES ('mine')")
    uri = mlflow_mirror.default_uri(folder.parent)
    result = mlflow_mirror.sync(folder, uri=uri, experiment="kept")
    assert not result.done
    assert f"move {file} away, and type: raykd track sync {folder}" in result.reason
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT * FROM datasets").fetchall() == [("mine",)]


def test_a_file_that_is_no_data_base_is_not_emptied(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a data base, but somebody's notes" * 99)
    assert not sqlite_file.is_unused(tmp_path / "mlflow.db")
    with pytest.raises(OSError, match=r"mlflow\.db"):
        sqlite_file.drop_tables(tmp_path / "mlflow.db")


def test_an_artefact_outside_the_run_folder_is_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    for path in (Path("../secret"), tmp_path / "secret", Path("link")):
        with pytest.raises(StoreError, match="outside"):
            Journal(folder / journal.NAME).artefact("run", path)


@pytest.mark.parametrize("torn", [b'{"seq": 99, "ki', b"\x00\xff", b'{"seq": 99}'])
def test_a_torn_last_line_is_ignored_and_then_dropped(folder, torn):
    path = folder / journal.NAME
    before = journal.read(path)
    with path.open("ab") as file:
        file.write(torn)
    assert journal.read(path) == before
    Journal(path).metrics("run", [("after", 1.0, 0)])
    after = journal.read(path)
    assert after[:-1] == before
    assert [line["seq"] for line in after] == list(range(len(after)))


def test_two_writers_share_one_numbering(tmp_path):
    one = Journal(tmp_path / journal.NAME)
    two = Journal(tmp_path / journal.NAME)
    one.run("run", "shared")
    for step in range(5):
        two.metrics("run", [("loss", 1.0, step)])
        one.metrics("run", [("loss", 2.0, step)])
    assert [line["seq"] for line in journal.read(tmp_path / journal.NAME)] == list(range(11))


def test_a_damaged_line_is_an_error_that_names_it(folder):
    path = folder / journal.NAME
    path.write_bytes(path.read_bytes().replace(b'"kind"', b'"kind', 1))
    with pytest.raises(StoreError, match="line 1"):
        journal.read(path)


def test_the_run_folder_holds_no_environment_and_no_password(store, folder, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    mlflow_mirror.sync(
        folder, uri=f"http://me:hunter3@127.0.0.1:{_closed_port()}", experiment="secrets", limit_s=2
    )
    mlflow_mirror.sync(folder, uri=store, experiment="secrets")
    text = b"".join(path.read_bytes() for path in folder.glob("journal*"))
    assert b"hunter" not in text
    assert json.loads((folder / sync_plan.CURSOR).read_bytes())["uri"] == store


def test_the_journal_needs_no_mlflow():
    code = (
        "import sys; from raykd.tracking import journal, sync_plan, mlflow_mirror; "
        "sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
