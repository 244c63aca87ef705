"""Data: a recipe's `[data]` table to checked rows in their splits."""

import numpy as np

from raykd.data import python_library, tables, watch_gestures
from raykd.data.rows import SPLITS, Dataset, Rows, checked, hide_labels
from raykd.errors import DataError
from raykd.recipe.digest import is_path
from raykd.recipe.recipe import DataRef
from raykd.recipe.validation import suggestion

BUILT_IN = {"watch_gestures": watch_gestures.load, "python_library": python_library.load}

__all__ = ["BUILT_IN", "SPLITS", "Dataset", "Rows", "load"]


def load(ref: DataRef) -> Dataset:
    """The checked data set of a recipe, its training labels hidden down to `label_fraction`.

    DataError if unusable.
    """
    if is_path(ref.source):
        dataset = tables.load_parquet(ref)
    elif ":" in ref.source:
        dataset = tables.load_function(ref)
    elif ref.tokenizer and ref.source == "watch_gestures":
        raise DataError(
            'data.source: missing; a tokenizer reads text, so name a folder, module:function or "python_library"'
        )
    elif ref.source in BUILT_IN:
        dataset = BUILT_IN[ref.source](ref)
    else:
        raise DataError(
            f"data.source {ref.source!r}: no such data set.{suggestion(ref.source, BUILT_IN)}"
        )
    if ref.limit:
        dataset = Dataset(
            dataset.name,
            dataset.classes,
            {n: _few(r, ref.limit) for n, r in dataset.splits.items()},
        )
    dataset = checked(dataset)
    hidden = hide_labels(dataset.splits["train"], ref.label_fraction, ref.label_seed)
    return Dataset(dataset.name, dataset.classes, dataset.splits | {"train": hidden})


def _few(rows: Rows, limit: int) -> Rows:
    """At most `limit` rows, as far apart as they can be."""
    return rows if len(rows) <= limit else rows.take(np.arange(limit) * len(rows) // limit)
