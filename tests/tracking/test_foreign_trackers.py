"""A tracker, its file and a journal may be a stranger's: nothing is written but below MLflow's own
folder, nothing of another program's is changed, and an odd answer costs the run nothing.
"""

import http.server
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from raykd.errors import StoreError
from raykd.files.waiting import locked
from raykd.tracking import journal, mlflow_mirror
from raykd.tracking.journal import Journal

REPORT = "report.json"


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """A file of MLflow's whose one run is recorded up to its artefacts."""
    out = tmp_path_factory.mktemp("out")
    run = run_in(out)
    assert mlflow_mirror.sync(run, uri=mlflow_mirror.default_uri(out), experiment="raykd").done
    return out


@pytest.fixture
def out(tables, tmp_path) -> Path:
    """A copy of it: what is in it names the first file's folder, so its artefacts go elsewhere."""
    return Path(shutil.copytree(tables, tmp_path / "copy"))


def run_in(out: Path) -> Path:
    """A run folder with nothing to upload yet."""
    run = out / "gesture-0a1b2c3d"
    lines = Journal(run / journal.NAME)
    lines.run("run", "gesture")
    (run / REPORT).write_text("{}")
    return run


def sync(out: Path, uri: str = "", limit_s: float = 10.0) -> mlflow_mirror.Synced:
    uri = uri or mlflow_mirror.default_uri(out)
    return mlflow_mirror.sync(
        out / "gesture-0a1b2c3d", uri=uri, experiment="raykd", limit_s=limit_s
    )


def put(out: Path, uri: str) -> None:
    """Let every run of the file have its artefacts elsewhere."""
    with closing(sqlite3.connect(out / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET artifact_uri = ?", [uri])


def log(out: Path, name: str, folder: str = "") -> None:
    """Journal a file of the run folder as an artefact, as a stranger's journal may."""
    run = out / "gesture-0a1b2c3d"
    lines = journal.read(run / journal.NAME)
    line = {"seq": len(lines), "time_ms": 0, "kind": "artefact", "run": "run"}
    with (run / journal.NAME).open("a") as file:
        file.write(json.dumps(line | {"path": name, "folder": folder}) + "\n")


@pytest.mark.parametrize("form", ["file://{}", "{}", "file://{}/../home", "file:{}"])
def test_artefacts_go_nowhere_but_below_the_sqlite_file(form, out, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    put(out, form.format(home))
    log(out, REPORT)
    Journal(out / "gesture-0a1b2c3d" / journal.NAME).metrics("run", [("loss", 1.0, 0)])
    result = sync(out)
    assert not list(home.iterdir())
    assert (result.done, result.pending) == (False, 2)
    assert f"outside of {out / 'mlruns'}" in result.reason
    with closing(sqlite3.connect(out / "mlflow.db")) as connection:
        assert connection.execute("SELECT key FROM metrics").fetchall() == [("loss",)]
    put(out, (out / "mlruns" / "0").as_uri())
    assert sync(out).done
    assert (out / "mlruns" / "0" / REPORT).exists()


@pytest.mark.parametrize("name", [".", "artefact/.bashrc", "journal.jsonl", "checkpoints"])
def test_only_what_a_run_uploads_is_uploaded(name, out):
    (out / "gesture-0a1b2c3d" / "artefact").mkdir()
    (out / "gesture-0a1b2c3d" / "artefact" / ".bashrc").write_text("echo mine")
    put(out, (out / "mlruns" / "0").as_uri())
    log(out, name)
    result = sync(out)
    assert not (out / "mlruns" / "0").exists()
    assert not result.done
    assert f"{name!r} is nothing that a run uploads" in result.reason


@pytest.mark.parametrize("name", ["../../victim", "artefact/../../victim"])
def test_a_journal_that_names_a_file_outside_of_its_run_is_damaged(name, out):
    """It is the run's own fault, and no answer of a tracker's."""
    put(out, (out / "mlruns" / "0").as_uri())
    log(out, name)
    with pytest.raises(StoreError, match="lies outside the run folder"):
        sync(out)


OWN = {
    "of another program": ["CREATE TABLE experiments (title TEXT)", "CREATE TABLE samples (id)"],
    "with MLflow's names": ["CREATE TABLE experiments (title TEXT)", "CREATE TABLE tags (id)"],
    "empty tables": ["CREATE TABLE users (id)", "CREATE TABLE tags (id)"],
    "of Alembic": ["CREATE TABLE alembic_version (version_num)", "CREATE TABLE mine (id)"],
}


@pytest.mark.parametrize("case", OWN)
def test_another_programs_file_is_refused_as_it_was(case, tmp_path):
    run = run_in(tmp_path)
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        for statement in OWN[case]:
            connection.execute(statement)
    before = file.read_bytes()
    result = sync(run.parent)
    assert file.read_bytes() == before
    assert not result.done
    assert f"{file} is no file of MLflow's" in result.reason


def test_a_lock_that_is_not_given_back_ends_at_the_limit(tables, tmp_path):
    run_in(tmp_path)
    with locked(tmp_path):
        result = sync(tmp_path, limit_s=0.3)
    assert not result.done
    assert "is in use by another process" in result.reason


@contextmanager
def answering(answer: Callable[[str], Any]) -> Iterator[str]:
    """The address of a server that answers each path with this value as JSON."""

    class Odd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            data = json.dumps(answer(self.path)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


RUN = {
    "info": {"run_id": "x", "run_uuid": "x", "experiment_id": "1", "status": "RUNNING"},
    "data": {"tags": [{"key": "raykd.key", "value": "gesture-0a1b2c3d/run"}]},
}
EXPERIMENT = {"experiment_id": "1", "name": "raykd", "lifecycle_stage": "active"}


def test_a_server_names_no_folder_of_this_machine(tmp_path):
    run_in(tmp_path)
    log(tmp_path, REPORT)
    home = tmp_path / "home"
    home.mkdir()
    for uri in (home.as_uri(), str(home), f"FILE://{home}", f"sftp://localhost{home}"):
        there = RUN | {"info": RUN["info"] | {"artifact_uri": uri}}

        def answer(path: str, there: Any = there) -> Any:
            if "experiments" in path:
                return {"experiment": EXPERIMENT}
            return {"runs": [there]} if "search" in path else {"run": there}

        with answering(answer) as server:
            result = sync(tmp_path, server)
        assert not list(home.iterdir())
        assert not result.done
        assert "a server may name no folder of this machine" in result.reason


@pytest.mark.parametrize("odd", [[1], "x", {"runs": [{"info": 3}]}, {"runs": [{}]}, 7])
def test_an_odd_answer_is_a_reason(odd, tmp_path):
    run_in(tmp_path)

    def answer(path: str) -> Any:
        return odd if "search" in path else {"experiment": EXPERIMENT}

    with answering(answer) as server:
        result = sync(tmp_path, server)
    assert (result.done, result.pending) == (False, 1)
    assert result.reason.startswith(f"MLflow at {server}: ")


def test_mlflows_tables_are_known_before_it_was_asked_for_anything():
    """In a new process, where no module of MLflow's has told its tables yet."""
    code = (
        "from raykd.tracking.mlflow_mirror import _own_tables as own\n"
        "print(*own(), 'lifecycle_stage' in own()['experiments'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    words = done.stdout.split()
    assert {"datasets", "experiment_tags", "registered_models", "runs"} <= set(words), done.stderr
    assert words[-1] == "True"
