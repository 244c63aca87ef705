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
from raykd.recipe.tables import DataRef
from raykd.recipe.validation import suggestion
from raykd.targets import UNLABELLED

SERIES = ("inputs", "label", "split", "group", "valence")


def load_parquet(ref: DataRef) -> Dataset:
    """The data set of every *.parquet file under a folder, in the order of file names.

    `data.columns` names the columns.
    """
    folder = Path(ref.source)
    names = _column_names(ref)
    table = _read_folder(folder, names)
    columns = {key: table.column(name).to_pylist() for key, name in names.items()}
    if ref.tokenizer:
        rows = zip(*columns.values(), strict=True)
        records = (dict(zip(columns, row, strict=True)) for row in rows)
        return text.load(records, folder.name, ref)
    return from_columns(columns, folder.name, ref)


def _read_folder(folder: Path, names: dict[str, str]) -> pa.Table:
    """Every row of a folder's files, in the columns that `names` gives by key."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"data.source {folder}: no *.parquet file there")
    tables = [_read_file(file, names) for file in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"data.source {folder}: the files' columns differ in type: {error}"
        ) from None


def _read_file(file: Path, names: dict[str, str]) -> pa.Table:
    try:
        parquet = pq.ParquetFile(file)
        known = parquet.schema_arrow.names
        for key, name in names.items():
            if name not in known:
                raise DataError(
                    f"{file.name}: no column {name!r} (data.columns.{key})."
                    f"{suggestion(name, known)}"
                )
        return parquet.read(columns=list(dict.fromkeys(names.values())))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from None


def load_function(ref: DataRef) -> Dataset:
    """The data set that `module:function(**data.settings)` gives.

    The function returns a Dataset, or dicts with the keys that `data.columns` names.
    """
    given = imports.load(ref.source, "data.source")(**ref.settings)
    if isinstance(given, Dataset):
        if ref.classes and tuple(ref.classes) != given.classes:
            raise DataError(
                f"{ref.source}: its classes {list(given.classes)} are not data.classes "
                f"{ref.classes}"
            )
        return given
    rows: list[dict[str, Any]] = list(given)
    names = _column_names(ref)
    for number, row in enumerate(rows):
        for key, name in names.items():
            if name not in row:
                raise DataError(
                    f"{ref.source}: row {number} has no {name!r} (data.columns.{key}); "
                    f"it has {list(row)}"
                )
    function = ref.source.partition(":")[2]
    if ref.tokenizer:
        records = ({key: row[name] for key, name in names.items()} for row in rows)
        return text.load(records, function, ref)
    columns = {key: [row[name] for row in rows] for key, name in names.items()}
    return from_columns(columns, function, ref)


def from_columns(columns: dict[str, list[Any]], name: str, ref: DataRef) -> Dataset:
    """The data set of plain lists by column; `inputs` are rows of steps of channel values."""
    if not columns["label"]:
        raise DataError(f"{name}: 0 rows")
    classes = _classes(columns["label"], ref)
    number = {label: i for i, label in enumerate(classes)}
    if unknown := sorted(_names(columns["label"]) - set(number)):
        raise DataError(f"{name}: labels {unknown[:5]} are outside data.classes {list(classes)}")
    label = np.array(
        [UNLABELLED if value is None else number[str(value)] for value in columns["label"]],
        np.int64,
    )
    inputs, mask = _padded(columns["inputs"], name)
    group = _numbered(columns["group"]) if "group" in columns else np.arange(len(label))
    valence = _aligned(columns["valence"], mask, name) if "valence" in columns else None
    split = np.array([str(value) for value in columns["split"]])
    if unknown := sorted(set(split.tolist()) - set(SPLITS)):
        raise DataError(
            f"{name}: column {ref.columns.split!r} holds {unknown[:5]}; write train, val or test"
        )
    rows = Rows(
        row_id=np.arange(len(label)),
        inputs=inputs,
        mask=mask,
        label=label,
        group=group,
        valence=valence,
    )
    return Dataset(name, classes, {part: rows.take(split == part) for part in SPLITS})


def _column_names(ref: DataRef) -> dict[str, str]:
    """The names of the columns to read, by key."""
    keys = SERIES
    if ref.tokenizer:
        of_text = text.PARTS if ref.columns.prompt else ("text",)
        keys = ("split", "group", *of_text)
    return {
        key: name
        for key, name in ref.columns.model_dump().items()
        if key in keys and name is not None
    }


def _classes(labels: Iterable[Any], ref: DataRef) -> tuple[str, ...]:
    """The classes as the recipe orders them, else every label in sorted order."""
    return tuple(ref.classes or sorted(_names(labels)))


def _names(labels: Iterable[Any]) -> set[str]:
    """The labels as text, without those that are missing."""
    return {str(label) for label in labels if label is not None}


def _numbered(values: Sequence[Any]) -> NDArray[np.int64]:
    """A number for each distinct value, in the sorted order of the values as text."""
    names = np.array([str(value) for value in values])
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _padded(rows: Sequence[Any], name: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(inputs (N, T, K), mask (N, T)): rows of any length, padded with zeros on the right."""
    try:
        steps = [np.asarray(row, np.float32) for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: inputs must be lists of steps of channel values: {error}"
        ) from None
    for i, step in enumerate(steps):
        if step.ndim != 2 or step.shape[1] != steps[0].shape[1]:
            raise DataError(
                f"{name}: inputs must be (steps, channels) with one channel count, but row {i} has "
                f"shape {step.shape} and row 0 {steps[0].shape}"
            )
    length = np.array([len(step) for step in steps])
    mask = np.arange(length.max()) < length[:, None]
    inputs = np.zeros((*mask.shape, steps[0].shape[1]), np.float32)
    inputs[mask] = np.concatenate(steps)
    return inputs, mask


def _aligned(rows: Sequence[Any], mask: NDArray[np.bool_], name: str) -> NDArray[np.float32]:
    """(N, T): one value a step, NaN where it is missing or the row is padded."""
    aligned = np.full(mask.shape, np.nan, np.float32)
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
        aligned[i, mask[i]] = values
    return aligned
