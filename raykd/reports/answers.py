"""answers.parquet: what each model of a run said on each test row, so that runs can be compared row
by row.

Columns: row_id, label, group (the recording), thriving, teacher, artefact, and `<arm>-<seed>` for
each training; a model's is the class it gave. Beside each column of classes a column `<name>_class`
has their names. A run keeps it beside report.json, whose figures it is the ground of.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.files import parquet
from raykd.files.atomic import write_bytes
from raykd.reports.evidence import Evidence
from raykd.training import run_files

NAMES = "_class"  # ends the name of a column of names
NO_CLASSES = ("row_id", "group", "thriving")
STUDENT = re.compile(r"student-(\d+)")


@dataclass(frozen=True)
class RunAnswers:
    """The labelled test rows of a run, and what its students said of them."""

    row_id: NDArray[np.integer]  # (n,)
    label: NDArray[np.integer]  # (n,)
    group: NDArray[np.integer]  # (n,) the recording of each row
    thriving: NDArray[np.int8] | None  # (n,) 1, 0, and -1 where it is unknown
    student: Mapping[int, NDArray[np.integer]]  # by seed, ascending

    @property
    def hits(self) -> NDArray[np.bool_]:
        """(S, n): which rows each seed's student is right on."""
        return np.stack(list(self.student.values())) == self.label


def write(evidence: Evidence, folder: Path) -> None:
    """Write the answers that `evidence` holds into a run folder, whole or not at all."""
    e = evidence
    rows = np.arange(len(e.label)) if e.row_id is None else e.row_id
    columns: dict[str, Any] = {"row_id": rows, "label": e.label, "group": e.group}
    columns |= {name: getattr(e, name) for name in ("thriving", "teacher", "artefact")}
    trained = {"student": e.student, "control": e.control, **e.beside}
    columns |= {
        f"{name}-{seed}": said
        for name, arm in trained.items()
        for seed, said in sorted(arm.items())
    }
    known: dict[str, Any] = {}
    for name, values in columns.items():
        if values is None:
            continue
        known[name] = _truth(values) if name == "thriving" else values
        if name not in NO_CLASSES:
            known[f"{name}{NAMES}"] = _named(np.asarray(values), evidence.classes)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(known), sink)
    write_bytes(folder / run_files.ANSWERS, sink.getvalue().to_pybytes())


def _truth(values: NDArray[np.int8]) -> pa.Array:
    """Whether each row thrives; null where it is unknown."""
    return pa.array(np.asarray(values) == 1, pa.bool_(), mask=np.asarray(values) < 0)


def _named(values: NDArray[np.integer], classes: Sequence[str]) -> pa.DictionaryArray:
    """The names of these classes; null where there is none, such as of a row without a label."""
    inside = (values >= 0) & (values < len(classes))
    index = pa.array(np.where(inside, values, 0), pa.int32(), mask=~inside)
    return pa.DictionaryArray.from_arrays(index, pa.array(list(classes), pa.string()))


def read(folder: Path) -> RunAnswers:
    """The answers of a run folder. StoreError if they are not there, or damaged."""
    path = folder / run_files.ANSWERS
    if not path.exists():
        raise StoreError(
            f"{folder} was reported without {run_files.ANSWERS}; "
            f"type: raykd report RECIPE --out {folder.parent}"
        )
    try:
        columns = _columns(path)
        known = columns["label"] >= 0
        found = {name: values[known] for name, values in columns.items()}
        rows = {name: found[name] for name in ("row_id", "label", "group")}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise StoreError(
            f"{path} is damaged: {error}; delete it and type: raykd report RECIPE"
        ) from None
    student = {
        int(match[1]): found[match[0]] for name in found if (match := STUDENT.fullmatch(name))
    }
    return RunAnswers(**rows, thriving=found.get("thriving"), student=dict(sorted(student.items())))


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    table = parquet.read(path)
    numbers = [name for name in table.column_names if not name.endswith(NAMES)]
    found = {name: table.column(name) for name in numbers}
    if "thriving" in found:
        found["thriving"] = found["thriving"].cast(pa.bool_()).cast(pa.int8()).fill_null(-1)
    kinds = {name: pa.int8() if name == "thriving" else pa.int64() for name in numbers}
    return {name: found[name].cast(kind).to_numpy() for name, kind in kinds.items()}
