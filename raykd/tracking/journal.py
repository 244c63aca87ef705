"""The run's journal: each param, metric, data set and artefact as a JSON line, before MLflow hears
of it.

`journal.jsonl` in the run folder is the truth; `mlflow_mirror` fills MLflow from it, now or after
an outage. A line is whole or ignored: what a killed process left half written is dropped by the
next writer.
"""

import fcntl
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from raykd.errors import StoreError

NAME = "journal.jsonl"
ID_TAG = "raykd.journal"  # of a run without a parent: tells this journal from others of its name
STATUSES = ("FINISHED", "FAILED", "KILLED")
EMPTY: Mapping[str, Any] = {}
Metric = tuple[str, float, int]  # name, value, step


class _Line(BaseModel):
    """What every line has; each kind has more."""

    model_config = ConfigDict(strict=True)
    seq: int
    time_ms: int
    run: str


class _RunLine(_Line):
    kind: Literal["run"]
    name: str
    parent: str | None
    tags: dict[str, str]


class _ParamsLine(_Line):
    kind: Literal["params"]
    values: dict[str, str]


class _MetricsLine(_Line):
    kind: Literal["metrics"]
    # a JSON array is a list of name, value, step
    values: list[Annotated[tuple[str, float | Literal["nan", "inf", "-inf"], int], Strict(False)]]


class _DatasetLine(_Line):
    kind: Literal["dataset"]
    name: str
    digest: str
    source: str
    profile: dict[str, Any]


class _ArtefactLine(_Line):
    kind: Literal["artefact"]
    path: str
    folder: str


class _EndLine(_Line):
    kind: Literal["end"]
    status: Literal["FINISHED", "FAILED", "KILLED"]


LINE: TypeAdapter[_Line] = TypeAdapter(
    Annotated[
        _RunLine | _ParamsLine | _MetricsLine | _DatasetLine | _ArtefactLine | _EndLine,
        Field(discriminator="kind"),
    ]
)


class Journal:
    """Appends to one journal file.

    `key` names a run of the folder: "run", "student/seed-0", "trial/3".
    """

    def __init__(self, path: Path):
        self.path = path
        self._end = 0  # bytes known to be whole lines
        self._seq = 0
        self._keys: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)

    def run(
        self, key: str, name: str, parent: str | None = None, tags: Mapping[str, Any] = EMPTY
    ) -> None:
        """Declare a run. A key that the journal already holds is resumed: nothing is written.

        A run without a parent gives the journal its id.
        """
        assert re.fullmatch(r"[\w./:=+-]+", key), (
            f"run key {key!r}: letters, digits and ./:=+-_ only"
        )
        told = {k: text(v) for k, v in tags.items()}
        if parent is None:
            told |= {ID_TAG: uuid.uuid4().hex}
        self._append("run", key, name=name, parent=parent, tags=told)

    def params(self, key: str, values: Mapping[str, Any]) -> None:
        """Settings of a run; anything but a string is kept as JSON.

        The first value of a name stands.
        """
        self._append("params", key, values={name: text(value) for name, value in values.items()})

    def metrics(self, key: str, values: Iterable[Metric]) -> None:
        """Measured values; NaN and infinities are kept as the strings nan, inf and -inf."""
        self._append("metrics", key, values=rows_of(values))

    def dataset(
        self, key: str, name: str, digest: str, source: str, profile: Mapping[str, Any]
    ) -> None:
        """A data set or teacher store that the run read, with the digest of its manifest."""
        self._append("dataset", key, name=name, digest=digest, source=source, profile=dict(profile))

    def artefact(self, key: str, path: Path, folder: str = "") -> None:
        """A file or folder in the run folder, `path` absolute or relative to it; StoreError if
        outside.
        """
        whole = inside(self.path.parent, path)
        inside(self.path.parent, Path(folder))
        relative = whole.relative_to(self.path.parent.resolve())
        self._append("artefact", key, path=relative.as_posix(), folder=folder)

    def end(self, key: str, status: str) -> None:
        """The run's end, on disk when this returns."""
        assert status in STATUSES, f"status {status!r}: one of {', '.join(STATUSES)}"
        self._append("end", key, status=status)

    def _append(self, kind: str, key: str, **fields: Any) -> None:
        self.path.touch()
        with self.path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a trial in another process may write too
            self._catch_up(file)
            if kind == "run" and key in self._keys:
                return
            assert kind == "run" or key in self._keys, f"run {key!r} has not been declared"
            assert fields.get("parent") in self._keys | {None}, "the parent has not been declared"
            head = {
                "seq": self._seq,
                "time_ms": time.time_ns() // 1_000_000,
                "kind": kind,
                "run": key,
            }
            line = json.dumps(head | fields, allow_nan=False).encode() + b"\n"
            if file.write(line) != len(line):
                raise OSError(f"{self.path}: the disk took only part of a line; free some space")
            if kind == "end":
                os.fsync(file.fileno())
            self._keys.add(key)
            self._seq += 1
            self._end += len(line)

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what others appended, drop a torn last line, and stand at the end."""
        file.seek(self._end)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for line in _parse(whole, self.path):
            self._keys.add(line["run"])
            self._seq = line["seq"] + 1
        self._end += len(whole)
        file.truncate(self._end)
        file.seek(self._end)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a journal, in order; none where there is no file.

    StoreError if it was damaged.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = _parse(data[: data.rfind(b"\n") + 1], path)
    declared: set[str | None] = {None}
    for number, line in enumerate(lines, 1):
        if line["kind"] == "run" and line["parent"] in declared:
            declared.add(line["run"])
        if line["run"] not in declared:
            raise _damaged(path, number, f"is of {line['run']!r}, which no line before it declares")
    return lines


def inside(folder: Path, path: Path) -> Path:
    """`path` made absolute against `folder`, links followed; StoreError if it leads out of the
    folder.
    """
    whole = (folder / path).resolve()
    if not whole.is_relative_to(folder.resolve()):
        raise StoreError(f"{path} lies outside the run folder {folder}; copy it in first")
    return whole


def _parse(data: bytes, path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, raw in enumerate(data.split(b"\n")[:-1], 1):
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            raise _damaged(path, number, "is not JSON") from None
        try:
            LINE.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            fault = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
            raise _damaged(path, number, f"is no line of a journal ({fault})") from None
        lines.append(value)
    return lines


def _damaged(path: Path, number: int, fault: str) -> StoreError:
    return StoreError(f"{path}: line {number} of those read {fault}; remove that line")


def id_of(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """The id of a journal of these lines; None of one that is older than ids."""
    tags = next((line["tags"] for line in lines if line["kind"] == "run"), {})
    found = tags.get(ID_TAG, "")
    return found if re.fullmatch(r"[0-9a-f]{32}", found) else None


def rows_of(values: Iterable[Metric]) -> list[list[Any]]:
    """Metrics as a line has them."""
    return [[name, _number(value), int(step)] for name, value, step in values]


def text(value: Any) -> str:
    """A param or tag as a line has it: anything but a string as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _number(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
