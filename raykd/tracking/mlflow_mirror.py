"""MLflow, filled from the run's journal. The only file that knows MLflow.

Replaying is idempotent. A run is found again by its tags `raykd.journal` and `raykd.key`, so
neither a lost cursor nor a crash halfway makes a second one; a metric replayed with the journal's
own time is the row that is already there. A server that is dead or slow costs at most `limit_s`,
and nothing is lost: the journal keeps it.
"""

import importlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from raykd.errors import StoreError
from raykd.files import links
from raykd.files.address import public_uri
from raykd.files.waiting import bounded, knock, locked
from raykd.tracking import journal, sqlite_file, sync_plan
from raykd.tracking.sync_plan import Cursor, Line, SyncStep, legal_name, legal_value
from raykd.training import run_files

KEY_TAG = "raykd.key"
LEFT_OUT_TAG = "raykd.metrics_left_out"
DIGEST_CHARS = 36  # MLflow's limit; the whole digest is a tag of the input
METRICS_A_CALL = 900  # with the params, MLflow takes 1000 entries in all
PARAMS_A_CALL = 100  # MLflow's limit
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SETTINGS = {
    TIMEOUT: "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Where a server may have artefacts put: nowhere on this machine, nor where keys of its user lead.
REMOTE = ("mlflow-artifacts", "http", "https", "s3", "gs", "wasbs", "abfss", "dbfs", "r2", "b2")
UPLOADED = (
    run_files.RECIPE,
    run_files.REPORT,
    run_files.REPORT_PAGE,
    run_files.BEST_RECIPE,
    run_files.artefact(Path()).name,
)
T = TypeVar("T")


class _RefusedArtefact(Exception):
    """Why an artefact is not uploaded; the run's other lines are recorded."""


@dataclass(frozen=True)
class Synced:
    """What one `sync` reached: `pending` lines are left, for `reason`; `runs` has MLflow's ids."""

    done: bool
    reason: str = ""
    pending: int = 0
    runs: dict[str, str] = field(default_factory=dict)


def default_uri(out: Path) -> str:
    """The store used where no server is named: one sqlite file for everything under `out`."""
    path = str(out.resolve() / "mlflow.db")
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")  # a URL's own signs


def pending(folder: Path) -> int:
    """Journal lines of a run folder that no tracker has been told."""
    return sum(map(sync_plan.load(folder).lacks, journal.read(folder / journal.NAME)))


def sync(folder: Path, *, uri: str, experiment: str, limit_s: float = 10.0) -> Synced:
    """Bring MLflow up to the journal. Never raises for a server that is down, slow or refusing.

    `limit_s` bounds the waiting for a server, not the work on a local sqlite file; below 1 it does
    nothing.
    """
    folder = folder.resolve()
    lines = journal.read(folder / journal.NAME)
    cursor = _cursor(folder, uri, experiment)
    reason = ""
    if any(map(cursor.lacks, lines)):
        reason = _attempt(_Mirror(folder, cursor, uri), lines, limit_s)
        cursor = _cursor(folder, uri, experiment)
    left = sum(map(cursor.lacks, lines))
    return Synced(left == 0, reason, left, {key: run["id"] for key, run in cursor.runs.items()})


def _cursor(folder: Path, uri: str, experiment: str) -> Cursor:
    """The saved cursor, unless it speaks of another store or of one that was deleted."""
    saved = sync_plan.load(folder)
    file = _sqlite_file(uri)
    moved = (saved.uri, saved.experiment) != (public_uri(uri), experiment)
    return Cursor(public_uri(uri), experiment) if moved or (file and not file.exists()) else saved


def _attempt(mirror: "_Mirror", lines: list[Line], limit_s: float) -> str:
    """Record what is new; why something was not, or nothing."""
    start = time.monotonic()
    uri = mirror.uri
    remote = urlsplit(uri).hostname is not None
    try:
        if remote:
            bounded(
                lambda: knock(uri, limit_s), limit_s
            )  # before the import of MLflow, which takes seconds
        with _quiet():
            left_s = start + limit_s - time.monotonic()
            return (
                bounded(lambda: mirror.record(lines, left_s), left_s)
                if remote
                else mirror.record(lines, lock_s=limit_s)
            )
    except StoreError:  # of the run's own files
        raise
    except OSError as error:
        text = str(error)
    except Exception as error:  # what a client of MLflow's makes of an odd answer
        text = f"an answer that MLflow's client cannot read ({type(error).__name__}: {error})"
    text = text.replace(uri, public_uri(uri)).split("\n")[0].split("(Caused by ")[-1]
    return f"MLflow at {public_uri(uri)}: {text[:300] or 'no answer in time'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow without telemetry, printed lines, its own deprecations and four minutes of retries.

    Its errors are raised as OSError.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with warnings.catch_warnings(), _environment(SETTINGS):
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        except (MlflowException, SQLAlchemyError) as error:
            raise OSError(str(error)) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables set, and put back afterwards."""
    before = {name: os.environ.get(name) for name in settings}
    try:
        os.environ.update(settings)
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


class _Mirror:
    """One pass over a journal: the client, the deadline and the ids of the runs that exist."""

    def __init__(self, folder: Path, cursor: Cursor, uri: str):
        self.folder = folder
        self.cursor = cursor
        self.uri = uri
        self.ids: dict[str, str] = {}
        self.gone: list[str] = []
        self.refused: list[str] = []

    @property
    def client(self) -> Any:
        """The client, while there is time; its next request cannot outlast the deadline."""
        left_s = self.deadline - time.monotonic()
        if left_s < 1:
            raise TimeoutError("too slow; what is left waits in the journal")
        if left_s < float("inf"):
            os.environ[TIMEOUT] = str(int(left_s))
        return self._client

    def record(
        self, lines: list[Line], limit_s: float = float("inf"), *, lock_s: float = 10.0
    ) -> str:
        """Take every step that is left; a note on artefacts that are gone or refused, or nothing.

        From the first artefact of a run that is refused, its lines are left to the next call too.
        """
        self.deadline = time.monotonic() + limit_s
        self.journal_id = journal.id_of(lines)
        with locked(self.folder):
            self._open(lock_s)
            try:
                for declared, steps in sync_plan.steps(lines, self.cursor):
                    run_id = self.ids.get(declared["run"]) or self._create(declared)
                    refused = len(self.refused)
                    for step in steps:
                        try:
                            self._take(step, run_id)
                        except _RefusedArtefact as refusal:
                            self.refused.append(str(refusal))
                        if len(self.refused) == refused:
                            self.cursor.runs[declared["run"]] = {"id": run_id, "seq": step.seq}
            finally:
                self.cursor.save(self.folder)
        gone = [f"gone before they were recorded: {', '.join(self.gone)}"] if self.gone else []
        return "; ".join([*dict.fromkeys(self.refused), *gone])

    def _open(self, lock_s: float) -> None:
        file = _sqlite_file(self.uri)
        # MLflow builds its tables unguarded
        with locked(file.parent, wait=True, limit_s=lock_s) if file else nullcontext():
            if file and file.exists():
                sqlite_file.check(file, _own_tables())
            with _no_stray_folder(self.uri):
                self._client = self._connected(file)
            self.experiment_id = self._experiment(
                (file.parent / "mlruns").as_uri() if file else None
            )
        mine = f"tags.`{KEY_TAG}` LIKE '{self.folder.name}/%'"
        if self.journal_id:
            mine = f"tags.`{journal.ID_TAG}` = '{self.journal_id}'"
        for run in self.client.search_runs([self.experiment_id], mine, max_results=50_000):
            name, _, key = run.data.tags[KEY_TAG].partition("/")
            of_this = run.data.tags.get(journal.ID_TAG) == self.journal_id
            if of_this and (self.journal_id or name == self.folder.name):
                self.ids[key] = run.info.run_id
        saved = self.cursor.runs.items()
        self.cursor.runs = {key: run for key, run in saved if self.ids.get(key) == run["id"]}

    def _connected(self, file: Path | None) -> Any:
        """A client of the server, or of a file whose tables are whole.

        Tables that a full disk left half made are dropped, where nothing was recorded in them.
        """
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return MlflowClient(tracking_uri=self.uri)
        except (MlflowException, SQLAlchemyError) as error:
            if file is None or not file.exists():
                raise
            if not sqlite_file.is_unused(file):
                text = str(error).split("\n")[0]
                raise OSError(
                    f"{text}; its tables are not whole: move {file} away, and type: "
                    f"raykd track sync {self.folder}"
                ) from None
            sqlite_file.drop_tables(file)
            return MlflowClient(tracking_uri=self.uri)

    def _experiment(self, artefacts: str | None) -> str:
        name = self.cursor.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment:
            return experiment.experiment_id
        return self.client.create_experiment(name, artefacts)

    def _create(self, line: Line) -> str:
        tags = {legal_name(name): legal_value(value) for name, value in line["tags"].items()}
        tags[KEY_TAG] = f"{self.folder.name}/{line['run']}"
        if self.journal_id:
            tags[journal.ID_TAG] = self.journal_id
        if line["parent"] is not None:
            tags["mlflow.parentRunId"] = self.ids[line["parent"]]
        run = self.client.create_run(self.experiment_id, line["time_ms"], tags, line["name"])
        self.ids[line["run"]] = run.info.run_id
        return run.info.run_id

    def _take(self, step: SyncStep, run_id: str) -> None:
        line = step.lines[-1]
        match step.kind:
            case "values":
                self._values(step, run_id)
            case "dataset":
                self.client.log_inputs(run_id, [_dataset(line)])
            case "artefact":
                self._artefact(line, run_id)
            case "end":
                self.client.set_terminated(run_id, line["status"], line["time_ms"])

    def _values(self, step: SyncStep, run_id: str) -> None:
        from mlflow.entities import Metric, Param

        metrics = _split([Metric(*metric) for metric in step.metrics], METRICS_A_CALL)
        params = _split([Param(*param) for param in step.params.items()], PARAMS_A_CALL)
        if step.left_out:
            self.client.set_tag(run_id, LEFT_OUT_TAG, legal_value(step.left_out))
        for some, others in zip_longest(metrics, params, fillvalue=()):
            self.client.log_batch(run_id, metrics=some, params=others)

    def _artefact(self, line: Line, run_id: str) -> None:
        """Upload a file or folder, from where only a run's own are and to where only MLflow's are.

        A journal and a tracker may both be a stranger's.
        """
        path = journal.inside(self.folder, Path(line["path"]))
        journal.inside(self.folder, Path(line["folder"]))
        parts = Path(line["path"]).parts
        names = [*parts, *Path(line["folder"]).parts]
        if parts[:1] not in [(name,) for name in UPLOADED] or any(n.startswith(".") for n in names):
            raise _RefusedArtefact(
                f"{line['path']!r:.100} is nothing that a run uploads; remove that line of "
                f"{journal.NAME}"
            )
        links.check_tree(path)
        if not path.exists():
            self.gone.append(line["path"])
            return
        artefacts = self._artefacts(run_id)
        if path.is_dir():
            artefacts.log_artifacts(str(path), f"{line['folder']}/{path.name}".lstrip("/"))
        else:
            artefacts.log_artifact(str(path), line["folder"] or None)

    def _artefacts(self, run_id: str) -> Any:
        """Where the tracker has a run's artefacts put, asked once, so that it is what was held
        against the rule.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        uri = self.client.get_run(run_id).info.artifact_uri
        file = _sqlite_file(self.uri)
        if file is None:
            if urlsplit(uri).scheme not in REMOTE:
                raise _RefusedArtefact(
                    f"its artefacts would go to {public_uri(uri)!r:.200}, and a server may name no "
                    "folder of this machine; start it with --serve-artifacts"
                )
        else:
            home = file.parent / "mlruns"
            place = urlsplit(uri)
            named = Path(unquote(place.path)) if place.scheme == "file" else None
            is_ours = named and named.resolve().is_relative_to(home.resolve())
            if place.netloc or not is_ours or home.is_symlink():
                raise _RefusedArtefact(
                    f"its artefacts would go to {public_uri(uri)!r:.200}, outside of {home}; move "
                    f"{file} away"
                )
        return get_artifact_repository(uri, tracking_uri=self.uri)


def _own_tables() -> dict[str, set[str]]:
    """The columns of MLflow's tables, those among them that it makes first and drops later."""
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

    importlib.import_module("mlflow.store.db.utils")  # which imports every module with tables
    found: dict[str, set[str]] = {}
    for tables in (InitialBase.metadata.tables, Base.metadata.tables):
        for name, table in tables.items():
            found[name] = found.get(name, set()) | set(table.columns.keys())
    return found


def _dataset(line: Line) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": line["source"]})
    profile = json.dumps(line["profile"])
    entity = Dataset(line["name"], line["digest"][:DIGEST_CHARS], "local", source, profile=profile)
    return DatasetInput(entity, [InputTag("raykd.digest", line["digest"])])


def _split(values: list[T], size: int) -> list[list[T]]:
    return [values[at : at + size] for at in range(0, len(values), size)]


@contextmanager
def _no_stray_folder(uri: str) -> Iterator[None]:
    """Remove the folder that MLflow makes by the name as it stands in a URL, escapes and all."""
    file = _sqlite_file(uri)
    stray = Path(uri.removeprefix("sqlite:///")).absolute().parent
    is_new = file is not None and stray != file.parent and not stray.exists()
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # it holds something
                os.removedirs(stray)


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()
