"""Users' own rows: a folder of Parquet files, or a Python function that returns rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.data import labels, text
from raykd.data.room import check_room
from raykd.data.rows import SPLITS, Dataset, Rows
from raykd.errors import DataError, Problem, RecipeError
from raykd.files import parquet
from raykd.files.digests import parquet_below
from raykd.recipe import imports
from raykd.recipe.tables import DataRef
from raykd.recipe.user_code import user_code
from raykd.recipe.validation import suggestion
from raykd.targets import UNLABELLED

SERIES = ("inputs", "label", "split", "group", "valence")
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # a folder's name for null


def load_parquet(ref: DataRef) -> Dataset:
    """The data set of every Parquet file under a folder, in the order of file names.

    `data.columns` names the columns. A folder `split=train` gives the files below it that column.
    """
    folder = Path(ref.source)
    names = _column_names(ref)
    table = _read_folder(folder, names, ref)
    columns = {key: table.column(name).to_pylist() for key, name in names.items()}
    if ref.tokenizer:
        rows = zip(*columns.values(), strict=True)
        records = (dict(zip(columns, row, strict=True)) for row in rows)
        return text.load(records, folder.name, ref)
    return from_columns(columns, folder.name, ref)


def _read_folder(folder: Path, names: dict[str, str], ref: DataRef) -> pa.Table:
    """Every row of a folder's files, in the columns that `names` gives by key."""
    files = parquet_below(folder)
    if not files:
        raise DataError(f"data.source {folder}: no *.parquet file there")
    wanted = set(names.values())
    of_folders = [_values_of_folders(file.relative_to(folder), wanted) for file in files]
    numbers = {
        column
        for column in wanted
        if all(labels.is_integer(found.get(column) or "0") for found in of_folders)
    }
    tables = [
        _with_folders(file, _read_file(file, names, found, ref), found, numbers)
        for file, found in zip(files, of_folders, strict=True)
    ]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"data.source {folder}: the files' columns differ in type: {error}"
        ) from None


def _values_of_folders(path: Path, wanted: set[str]) -> dict[str, str | None]:
    """What folders named `column=value` say of a file's rows, of the columns that are wanted."""
    found: dict[str, str | None] = {}
    for part in path.parent.parts:
        column, sign, value = part.partition("=")
        if sign and column in wanted:
            found[column] = None if value == NO_VALUE else unquote(value)
    return found


def _read_file(
    file: Path, names: dict[str, str], of_folders: Mapping[str, str | None], ref: DataRef
) -> pa.Table:
    """The columns of a file that are wanted; those that its folders give may be missing."""
    if not file.is_file():
        raise DataError(f"{file}: not a file")
    try:
        opened = parquet.opened(file)
        schema = opened.schema_arrow
        _check_no_labels(schema.names, ref)
        for key, name in names.items():
            if name not in schema.names and name not in of_folders:
                raise DataError(
                    f"{file.name}: no column {name!r} (data.columns.{key})."
                    f"{suggestion(name, schema.names)}"
                )
        there = [name for name in dict.fromkeys(names.values()) if name in schema.names]
        for name in there:
            kind = schema.field(name).type
            if isinstance(kind, pa.BaseExtensionType):
                raise DataError(
                    f"{file}: column {name!r} is {kind}, which is not read; write plain lists: "
                    "for each row a list of steps, each a list of channel values"
                )
        table = opened.read(columns=there, use_threads=False)
        return table if there else pa.table({"": pa.nulls(opened.metadata.num_rows)})
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from None


def _with_folders(
    file: Path, table: pa.Table, of_folders: Mapping[str, str | None], numbers: set[str]
) -> pa.Table:
    """A file's table with the columns of its folders. DataError where a column says otherwise."""
    for column, value in of_folders.items():
        if column in table.column_names:
            for row, own in enumerate(table.column(column).to_pylist()):
                if (None if own is None else str(own)) != value:
                    raise DataError(
                        f"{file}: row {row} has {column} {own!r}, and its folder says "
                        f"{column}={value}; mend one of them, or rename the folder"
                    )
            continue
        typed = int(value) if value is not None and column in numbers else value
        values = [typed] * table.num_rows
        table = table.append_column(column, pa.array(values))
    return table


def _check_no_labels(names: Iterable[str], ref: DataRef) -> None:
    """RecipeError where rows of text have labels, which nothing would read."""
    if ref.tokenizer and ref.columns.label in names:
        raise RecipeError(
            [
                Problem(
                    "data.tokenizer",
                    f"the rows have a column {ref.columns.label!r}, and rows of text have no "
                    "label but their next token; leave that column out of them to train a "
                    "language model (texts with classes are not read yet)",
                )
            ]
        )


def load_function(ref: DataRef) -> Dataset:
    """The data set that `module:function(**data.settings)` gives.

    The function returns a Dataset, or dicts with the keys that `data.columns` names.
    """
    names = _column_names(ref)
    rows: list[dict[str, Any]] = []
    function = imports.load(ref.source, "data.source")
    with user_code(_Where(ref.source, rows), DataError):
        given = function(**ref.settings)
        if isinstance(given, Dataset):
            return _checked_classes(given, ref)
        if not isinstance(given, Iterable):
            raise DataError(
                f"data.source {ref.source}: gives {str(given)[:40]!r} of type "
                f"{type(given).__name__}; return a list of dicts, or yield dicts"
            )
        for row in given:
            rows.append(_checked_row(row, len(rows), names, ref))
    name = ref.source.partition(":")[2]
    if ref.tokenizer:
        return text.load(rows, name, ref)
    columns = {key: [row[key] for row in rows] for key in names}
    return from_columns(columns, name, ref)


@dataclass(frozen=True)
class _Where:
    """How far a function has come, as text for messages."""

    source: str
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        after = f", after {len(self.rows)} rows," if self.rows else ""
        return f"data.source {self.source}{after}"


def _checked_classes(given: Dataset, ref: DataRef) -> Dataset:
    if ref.classes and tuple(ref.classes) != given.classes:
        raise DataError(
            f"{ref.source}: its classes {list(given.classes)} are not data.classes {ref.classes}"
        )
    return given


def _checked_row(row: Any, number: int, names: dict[str, str], ref: DataRef) -> dict[str, Any]:
    """The values of a function's row by key. DataError where it has not all of them."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"data.source {ref.source}: row {number} is {str(row)[:40]!r} of type "
            f"{type(row).__name__}, not a dict"
        )
    _check_no_labels(row, ref)
    for key, name in names.items():
        if name not in row:
            raise DataError(
                f"{ref.source}: row {number} has no {name!r} (data.columns.{key}); "
                f"it has {list(row)}"
            )
    return {key: row[name] for key, name in names.items()}


def from_columns(columns: dict[str, list[Any]], name: str, ref: DataRef) -> Dataset:
    """The data set of plain lists by column; `inputs` are rows of steps of channel values."""
    if not columns["label"]:
        raise DataError(f"{name}: 0 rows")
    names = labels.class_names(columns["label"], name)
    classes = tuple(ref.classes or labels.in_order(names))
    if not classes:
        raise DataError(
            f"{name}: no row has a label; name the teacher's classes in their order under "
            "data.classes"
        )
    number = {label: i for i, label in enumerate(classes)}
    if unknown := sorted({label for label in names if label is not None} - set(number)):
        raise DataError(f"{name}: labels {unknown[:5]} are outside data.classes {list(classes)}")
    label = np.array([UNLABELLED if one is None else number[one] for one in names], np.int64)
    inputs, mask = _padded(columns["inputs"], name)
    group = _numbered(columns["group"]) if "group" in columns else np.arange(len(label))
    valence = _aligned(columns["valence"], mask, name) if "valence" in columns else None
    split = text.split_names(columns["split"], name, ref)
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


def _numbered(values: Sequence[Any]) -> NDArray[np.int64]:
    """A number for each distinct group, in the sorted order of the groups as text.

    A row without a group is one of its own.
    """
    keys = text.group_keys(values)
    known = sorted({key for key in keys if key is not None})
    number = {key: i for i, key in enumerate(known)}
    numbers = np.arange(len(known), len(known) + len(values))
    for row, key in enumerate(keys):
        if key is not None:
            numbers[row] = number[key]
    return numbers


def _steps_of(row: Any, number: int, name: str) -> NDArray[np.float32]:
    """(T, K): a row's inputs. DataError names the row."""
    try:
        if np.iscomplexobj(row):
            raise TypeError("they are complex")
        return np.asarray(row, np.float32)
    except Exception as error:  # whatever a user's object raises
        raise DataError(
            f"{name}: row {number}: inputs must be lists of steps of channel values: {error}"
        ) from None


def _padded(rows: Sequence[Any], name: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(inputs (N, T, K), mask (N, T)): rows of any length, padded with zeros on the right."""
    steps = [_steps_of(row, number, name) for number, row in enumerate(rows)]
    for i, step in enumerate(steps):
        if step.ndim == 1 and len(step):
            raise DataError(
                f"{name}: row {i}: inputs are one flat list of {len(step)} numbers; write a list "
                "of steps, each a list of channel values: [[0.1], [0.2]] is two steps of one "
                "channel"
            )
        if step.ndim != 2 or step.shape[1] != steps[0].shape[1]:
            raise DataError(
                f"{name}: inputs must be (steps, channels) with one channel count, but row {i} has "
                f"shape {step.shape} and row 0 {steps[0].shape}"
            )
    length = np.array([len(step) for step in steps])
    channels = steps[0].shape[1]
    check_room(length, channels, name)
    mask = np.arange(length.max()) < length[:, None]
    inputs = np.zeros((*mask.shape, channels), np.float32)
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
        except Exception as error:  # whatever a user's object raises
            raise DataError(
                f"{name}: row {i}, valence must be a list of numbers: {error}"
            ) from None
        if values.shape != (mask[i].sum(),):
            raise DataError(
                f"{name}: row {i} has {values.size} valence values for {mask[i].sum()} steps"
            )
        aligned[i, mask[i]] = values
    return aligned
