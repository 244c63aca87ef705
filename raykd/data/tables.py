"""Users' own rows: a folder of Parquet files, or a Python function that returns rows."""

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.data.rows import SPLITS, UNLABELLED, Dataset, Rows
from raykd.errors import DataError
from raykd.recipe import DataRef, suggestion


def load_parquet(ref: DataRef) -> Dataset:
    """Rows from every *.parquet under a folder, in the order of file names. Columns as `data.columns` names them."""
    folder = Path(ref.source)
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
                    raise DataError(f"{file.name}: no column {name!r} (data.columns.{key}).{suggestion(name, known)}")
            tables.append(parquet.read(columns=list(dict.fromkeys(wanted.values()))))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {error}") from None
    table = pa.concat_tables(tables, promote_options="permissive")
    return from_columns({k: table.column(name).to_pylist() for k, name in wanted.items()}, folder.name, ref)


def load_function(ref: DataRef) -> Dataset:
    """Rows from `module:function(**data.settings)`: dicts with the keys that `data.columns` names."""
    module, _, function = ref.source.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"data.source {ref.source!r} can not be imported: {error}") from None
    rows: list[dict[str, Any]] = list(make(**ref.settings))
    wanted = _wanted(ref)
    for number, row in enumerate(rows):
        for key, name in wanted.items():
            if name not in row:
                raise DataError(f"{ref.source}: row {number} has no {name!r} (data.columns.{key}); it has {list(row)}")
    return from_columns({k: [row[name] for row in rows] for k, name in wanted.items()}, function, ref)


def from_columns(columns: dict[str, list[Any]], name: str, ref: DataRef) -> Dataset:
    """A Dataset from plain lists; `inputs` are steps of channel values, of any length per row."""
    classes = _classes(columns["label"], ref)
    number = {c: i for i, c in enumerate(classes)}
    if unknown := sorted({str(v) for v in columns["label"] if v is not None} - set(number)):
        raise DataError(f"{name}: labels {unknown[:5]} are outside data.classes {list(classes)}")
    label = np.array([UNLABELLED if v is None else number[str(v)] for v in columns["label"]], np.int64)
    inputs, mask = _padded(columns["inputs"], name)
    group = _numbered(columns["group"]) if "group" in columns else np.arange(len(label))
    valence = _aligned(columns["valence"], mask, name) if "valence" in columns else None
    split = np.array([str(v) for v in columns["split"]])
    if unknown := sorted(set(split) - set(SPLITS)):
        raise DataError(f"{name}: column {ref.columns.split!r} holds {unknown[:5]}; write train, val or test")
    every = Rows(np.arange(len(label)), inputs, mask, label, group, valence)
    return Dataset(name, classes, {s: every.take(split == s) for s in SPLITS})


def _wanted(ref: DataRef) -> dict[str, str]:
    return {key: name for key, name in ref.columns.model_dump().items() if name is not None}


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
        raise DataError(f"{name}: inputs must be lists of steps of channel values: {error}") from None
    widths = {step.shape[1:] for step in steps}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise DataError(f"{name}: every row's inputs must be (steps, channels) with one channel count, found {widths}")
    length = np.array([len(step) for step in steps])
    mask = np.arange(length.max()) < length[:, None]
    inputs = np.zeros((*mask.shape, *widths.pop()), np.float32)
    inputs[mask] = np.concatenate(steps)
    return inputs, mask


def _aligned(rows: Sequence[Any], mask: NDArray[np.bool_], name: str) -> NDArray[np.float32]:
    """(N, T) one value a step, NaN where missing or padded."""
    out = np.full(mask.shape, np.nan, np.float32)
    for i, row in enumerate(rows):
        if row is None:
            continue
        if len(row) != mask[i].sum():
            raise DataError(f"{name}: row {i} has {len(row)} valence values for {mask[i].sum()} steps")
        out[i, mask[i]] = [np.nan if v is None else v for v in row]
    return out
