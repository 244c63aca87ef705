"""What of a journal a tracker still lacks: steps to be taken in order, under names the tracker
allows.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from raykd.errors import StoreError
from raykd.files.atomic import read_json, write_json
from raykd.tracking import journal

Line = dict[str, Any]
CURSOR = "journal.synced.json"
VALUE_CHARS = 6000  # MLflow's limit
NAME_CHARS = 250  # MLflow's limit
LINES_A_STEP = 400


class _Reached(BaseModel):
    """How far one run has been recorded."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    seq: int


class _Saved(BaseModel):
    """The shape of a saved cursor."""

    model_config = ConfigDict(extra="forbid", strict=True)
    uri: str = ""
    experiment: str = ""
    runs: dict[str, _Reached] = {}


@dataclass
class Cursor:
    """How far each run has been recorded: {key: {"id", "seq"}}, for one server and experiment."""

    uri: str = ""
    experiment: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def lacks(self, line: Line) -> bool:
        return line["run"] not in self.runs or line["seq"] > self.runs[line["run"]]["seq"]

    def save(self, folder: Path) -> None:
        write_json(folder / CURSOR, vars(self))


def load(folder: Path) -> Cursor:
    """The cursor left in a run folder, or one that has recorded nothing.

    One that is damaged is as good as none, because replaying twice equals replaying once.
    """
    try:
        return Cursor(**_Saved.model_validate(read_json(folder / CURSOR) or {}).model_dump())
    except (StoreError, ValidationError):
        return Cursor()


@dataclass(frozen=True)
class SyncStep:
    """Lines of one run that one call records: `values` (params and metrics), or one other line.

    `left_out` names every value of the run up to here that is not finite. MLflow shows such a value
    as a number, 1.8e308, so it is not recorded.
    """

    kind: str
    lines: list[Line]
    params: dict[str, str]
    metrics: list[tuple[str, float, int, int]]  # name, value, time_ms, step
    left_out: str = ""

    @property
    def seq(self) -> int:
        return self.lines[-1]["seq"]


def steps(lines: list[Line], cursor: Cursor) -> Iterator[tuple[Line, list[SyncStep]]]:
    """For each run that lacks something: the line that declared it, and the steps left."""
    for key in dict.fromkeys(line["run"] for line in lines):
        lines_of_run = [line for line in lines if line["run"] == key]
        first = _first(lines_of_run)
        missing = [line for line in lines_of_run if cursor.lacks(line)]
        if missing:
            calls = groupby(missing, _call)
            left_out = _left_out(lines_of_run)
            steps_left = [_step(kind, list(group), first, left_out) for (kind, _), group in calls]
            yield lines_of_run[0], steps_left


def legal_name(name: str) -> str:
    """`name` as MLflow allows it.

    A changed name ends in a digest of the old, so that no two become one.
    """
    legal = re.sub(r"[^\w./ -]", "_", name)
    legal = "/".join(part for part in legal.split("/") if part.strip("."))
    legal = legal.lstrip(".")[: NAME_CHARS - 7]
    if name and legal == name:
        return name
    return f"{legal}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def legal_value(value: str) -> str:
    """`value`, cut where MLflow would refuse it; the cut says where the whole is."""
    note = f"... [{len(value)} characters; the whole is in {journal.NAME}]"
    return value if len(value) <= VALUE_CHARS else value[: VALUE_CHARS - len(note)] + note


def _first(lines: list[Line]) -> dict[str, int]:
    """The line that first set each param; a resumed run sets it again, but MLflow holds one."""
    params = [
        (name, line["seq"]) for line in lines if line["kind"] == "params" for name in line["values"]
    ]
    return dict(reversed(params))


def _call(line: Line) -> tuple[str, int]:
    """Equal for lines recorded together: a few hundred lines of values, or one line of anything
    else.
    """
    kind = line["kind"]
    seq = line["seq"]
    return ("values", seq // LINES_A_STEP) if kind in ("params", "metrics") else (kind, seq)


def _left_out(lines: list[Line]) -> str:
    """The metrics of a run that are not finite, as "loss (5 values, nan from step 3)"."""
    odd: dict[str, list[tuple[Any, int]]] = {}
    for line in lines:
        for name, value, at in line["values"] if line["kind"] == "metrics" else ():
            if not math.isfinite(float(value)):
                odd.setdefault(name, []).append((value, at))
    texts = []
    for name, points in odd.items():
        value, step = points[0]
        count = "1 value" if len(points) == 1 else f"{len(points)} values"
        texts.append(f"{name} ({count}, {value} from step {step})")
    return ", ".join(texts)


def _step(kind: str, lines: list[Line], first: dict[str, int], left_out: str) -> SyncStep:
    params: dict[str, str] = {}
    metrics: list[tuple[str, float, int, int]] = []
    for line in lines:
        if line["kind"] == "params":
            named = {
                name: value for name, value in line["values"].items() if first[name] == line["seq"]
            }
            params |= {legal_name(name): legal_value(value) for name, value in named.items()}
        if line["kind"] == "metrics":
            metrics += [
                (legal_name(name), float(v), line["time_ms"], at)
                for name, v, at in line["values"]
                if math.isfinite(float(v))
            ]
    return SyncStep(kind, lines, params, metrics, left_out)
