"""The sources that `data.source` can name: a built-in data set, a folder or a function."""

from dataclasses import replace

import numpy as np

from raykd.data import python_library, tables, watch_gestures
from raykd.data.column_names import NEXT
from raykd.data.file_rows import FileRows
from raykd.data.parquet_parts import ParquetParts, can_be_read_in_place
from raykd.data.prepared.parts import PreparedParts
from raykd.data.prepared.work import Work
from raykd.data.rows import Dataset, Rows, check_dataset, hide_labels
from raykd.data.table import Held, Source
from raykd.errors import DataError
from raykd.files.address import Address
from raykd.files.data_files import open_files
from raykd.recipe.tables import DataRef, Task
from raykd.recipe.toml import is_path
from raykd.recipe.validation import suggestion

BUILT_IN = {"watch_gestures": watch_gestures.load, "python_library": python_library.load}


def load(ref: DataRef, task: Task = NEXT, *, most: int | None = None) -> Dataset:
    """The checked data set of a recipe, its training labels hidden down to `label_fraction`.

    `task` is the recipe's. DataError if the rows cannot be used; it names the first of them.
    TooManyRows where a function gives more than `most`.

    Example:
        >>> from raykd.recipe.recipe import DataRef
        >>> dataset = load(DataRef(source="watch_gestures"))
        >>> dataset.shape
        {'channels': 6, 'classes': 7, 'steps': 16}
    """
    dataset = _read(ref, most, task)
    if ref.limit:
        fewer = {name: _spread(rows, ref.limit) for name, rows in dataset.splits.items()}
        dataset = replace(dataset, splits=fewer)
    check_dataset(dataset)
    train = hide_labels(dataset.splits["train"], ref.label_fraction, ref.label_seed)
    return replace(dataset, splits=dataset.splits | {"train": train})


def open_source(
    ref: DataRef, order: str = "auto", home: Address | None = None, task: Task = NEXT
) -> Source:
    """The source of a recipe's rows: in memory, or read in parts where there are many.

    `order` is the recipe's: "rows" holds all of them in memory, "blocks" none, and "auto" those of
    at most MOST_ROWS rows and MOST_BYTES. What cannot be read in parts where it lies is prepared
    below `home`, and gives no table before that is done. Texts with a class are always in memory.

    Example:
        >>> from raykd.recipe.recipe import DataRef
        >>> open_source(DataRef(window=32)).table().rows("train")
        8666
    """
    if order == "rows" or (ref.tokenizer and task.of_texts):
        return Held(load(ref, task))
    if is_path(ref.source):
        rows = FileRows(open_files(ref.source), ref)
        if order == "auto" and not tables.is_large(rows):
            return Held(load(ref))
        if not ref.tokenizer and can_be_read_in_place(rows):
            return ParquetParts(rows)
    elif order == "auto":
        return _function(ref, home)
    elif ref.source == "watch_gestures":
        raise DataError(
            'optim.order = "blocks": watch_gestures is small and in memory; leave it out'
        )
    return _prepared(ref, home)


def _function(ref: DataRef, home: Address | None) -> Source:
    """What a function gives: in memory, unless these are too many rows."""
    try:
        return Held(load(ref, most=tables.MOST_ROWS if home else None))
    except tables.TooManyRows:
        return _prepared(ref, home)


def _prepared(ref: DataRef, home: Address | None) -> PreparedParts:
    if home is None:
        raise DataError(
            f"data.source {ref.source}: has to be prepared to be read in parts, and no folder is "
            "named for that; name one in open_source(..., home=...)"
        )
    return PreparedParts(Work(ref, home))


def _read(ref: DataRef, most: int | None, task: Task) -> Dataset:
    if is_path(ref.source):
        return tables.load_files(ref, task)
    if ":" in ref.source:
        return tables.load_function(ref, most, task)
    if ref.tokenizer and ref.source == "watch_gestures":
        raise DataError(
            "data.source: missing; a tokenizer reads text, so name a folder, module:function or "
            '"python_library"'
        )
    if ref.source not in BUILT_IN:
        raise DataError(
            f"data.source {ref.source!r}: no such data set.{suggestion(ref.source, BUILT_IN)}"
        )
    return BUILT_IN[ref.source](ref)


def _spread(rows: Rows, limit: int) -> Rows:
    """At most `limit` rows, as far apart as they can be."""
    if len(rows) <= limit:
        return rows
    return rows.take(np.arange(limit) * len(rows) // limit)
