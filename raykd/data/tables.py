"""Users' own rows: a folder of Parquet files, or a Python function that returns rows."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.data import text
from raykd.data.rows import SPLITS, Dataset, Rows
from raykd.errors import DataError
from raykd.recipe import imports
from raykd.recipe.recipe import DataRef
from raykd.recipe.validation import suggestion
from raykd.targets import UNLABELLED

SERIES = ("inputs", "label", "split", "group", "valence")


def load_parquet(ref: DataRef) -> Dataset:
    """Rows from every *.parquet under a folder, in the order of file names.

    Columns as `data.columns` names them.
    """
    table, wanted = _read(Path(ref.source), ref)
    columns = {key: table.column(name).to_pylist() for key, name in wanted.items()}
    if ref.tokenizer:
        rows = (
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        )
        return text.load(rows, Path(ref.source).name, ref)
    return from_columns(columns, Path(ref.source).name, ref)


def _read(folder: Path, ref: DataRef) -> tuple[pa.Table, dict[str, str]]:
    """Every row of a folder's files, and the names of the columns that are read, by key."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"data.source {folder}: no *.parquet file there")
    wanted = _wanted(ref)
    tables = []
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
            known = parquet.schema_arrow.names
            for key, name in wanted.items():
                if name not in known:
                    raise DataError(
                        f"{file.name}: no column {name!r} (data.columns.{key}).{suggestion(name, known)}"
                    )
            tables.append(parquet.read(columns=list(dict.fromkeys(wanted.values()))))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {error}") from None
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"data.source {folder}: the files' columns differ in type: {error}"
        ) from None
    return table, wanted


def load_function(ref: DataRef) -> Dataset:
    """What `module:function(**data.settings)` gives: a Dataset, or dicts with the keys that
    `data.columns` names.
    """
    given = imports.load(ref.source, "data.source")(**ref.settings)
    if isinstance(given, Dataset):
        if ref.classes and tuple(ref.classes) != given.classes:
            raise DataError(
                f"{ref.source}: its classes {list(given.classes)} are not data.classes {ref.classes}"
            )
        return given
    rows: list[dict[str, Any]] = list(given)
    wanted = _wanted(ref)
    for number, row in enumerate(rows):
        for key, name in wanted.items():
            if name not in row:
                raise DataError(
                    f"{ref.source}: row {number} has no {name!r} (data.columns.{key}); it has {list(row)}"
                )
    name = ref.source.partition(":")[2]
    if ref.tokenizer:
        return text.load(
            ({key: row[column] for key, column in wanted.items()} for row in rows), name, ref
        )
    return from_columns(
        {key: [row[column] for row in rows] for key, column in wanted.items()}, name, ref
    )


def from_columns(columns: dict[str, list[Any]], name: str, ref: DataRef) -> Dataset:
    """A Dataset from plain lists; `inputs` are steps of channel values, of any length per row."""
    if not columns["label"]:
        raise DataError(f"{name}: 0 rows")
    classes = _classes(columns["label"], ref)
    number = {c: i for i, c in enumerate(classes)}
    if unknown := sorted({str(v) for v in columns["label"] if v is not None} - set(number)):
        raise DataError(f"{name}: labels {unknown[:5]} are outside data.classes {list(classes)}")
    label = np.array(
        [UNLABELLED if v is None else number[str(v)] for v in columns["label"]], np.int64
    )
    inputs, mask = _padded(columns["inputs"], name)
    group = _numbered(columns["group"]) if "group" in columns else np.arange(len(label))
    valence = _aligned(columns["valence"], mask, name) if "valence" in columns else None
    split = np.array([str(v) for v in columns["split"]])
    if unknown := sorted(set(split.tolist()) - set(SPLITS)):
        raise DataError(
            f"{name}: column {ref.columns.split!r} holds {unknown[:5]}; write train, val or test"
        )
    every = Rows(np.arange(len(label)), inputs, mask, label, group, valence)
    return Dataset(name, classes, {s: every.take(split == s) for s in SPLITS})


def _wanted(ref: DataRef) -> dict[str, str]:
    """The columns to read, by key."""
    of_text = text.PARTS if ref.columns.prompt else ("text",)
    keys = ("split", "group", *of_text) if ref.tokenizer else SERIES
    return {
        key: name
        for key, name in ref.columns.model_dump().items()
        if key in keys and name is not None
    }


def _classes(labels: Iterable[Any], ref: DataRef) -> tuple[str, ...]:
    """The classes as the recipe orders them, else every label in sorted order."""
    return tuple(ref.classes or sorted({str(v) for v in labels if v is not None}))


def _numbered(values: Sequence[Any]) -> NDArray[np.int64]:
    return np.unique(np.array([str(v) for v in values]), return_inverse=True)[1].astype(np.int64)


def _padded(rows: Sequence[Any], name: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(N, T, K) right-padded with zeros, and its mask (N, T)."""
    try:
        steps = [np.asarray(row, np.float32) for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: inputs must be lists of steps of channel values: {error}"
        ) from None
    for i, step in enumerate(steps):
        if step.ndim != 2 or step.shape[1] != steps[0].shape[1]:
            shape = f"row {i} has shape {step.shape} and row 0 {steps[0].shape}"
            raise DataError(
                f"{name}: inputs must be (steps, channels) with one channel count, but {shape}"
            )
    length = np.array([len(step) for step in steps])
    mask = np.arange(length.max()) < length[:, None]
    inputs = np.zeros((*mask.shape, steps[0].shape[1]), np.float32)
    inputs[mask] = np.concatenate(steps)
    return inputs, mask


def _aligned(rows: Sequence[Any], mask: NDArray[np.bool_], name: str) -> NDArray[np.float32]:
    """(N, T) one value a step, NaN where missing or padded."""
    out = np.full(mask.shape, np.nan, np.float32)
    for i, row in enumerate(rows):
        if row is None:
            continue
        try:
            values = np.asarray(row, np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{name}: row {i}, valence must be a list of numbers: {error}"
            ) from None
        if values.shape != (mask[i].sum(),):
            raise DataError(
                f"{name}: row {i} has {values.size} valence values for {mask[i].sum()} steps"
            )
        out[i, mask[i]] = values
    return out
