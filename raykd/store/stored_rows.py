"""Some rows of a store as arrays: their answers, still encoded, and the signals beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import StoreError
from raykd.store import columns
from raykd.store.logits import StoredLogits, codec_of


@dataclass(frozen=True)
class Column:
    """One stored signal of one split: flat valid steps, and how many belong to each row."""

    values: NDArray[Any]  # (sum of steps, ...) for step columns, (N,) for row columns
    steps: NDArray[np.int32]  # (N,)

    def padded(self, mask: NDArray[np.bool_], *, once: bool | None = None) -> NDArray[Any]:
        """(N, T, ...): the steps at their places in `mask` (N, T), zero elsewhere.

        T = 1 if the teacher answers `once` a sequence. StoreError if the steps are of other rows.
        """
        mask = stored_steps(self.steps, mask, once=once)
        padded = np.zeros((*mask.shape, *self.values.shape[1:]), self.values.dtype)
        padded[mask] = self.values
        return padded


def stored_steps(
    steps: NDArray[np.int32],
    mask: NDArray[np.bool_],
    *,
    is_text: bool = False,
    once: bool | None = None,
) -> NDArray[np.bool_]:
    """(N, T): `mask`, or (N, 1) if the teacher answers `once` a sequence, as it never does for
    text.

    `steps` (N,) are the stored steps of each row. Where a split is seen whole, they tell whether
    the teacher answers once. StoreError if they are of other rows.
    """
    if once is None:
        once = bool((steps == 1).all()) and mask.shape[1] > 1 and not is_text
    expected = np.ones((len(steps), 1), bool) if once else mask
    if not np.array_equal(steps, expected.sum(1)):
        raise StoreError("the store's steps do not fit the data's; it belongs to other rows")
    return expected


def column_of(table: pa.Table, name: str) -> Column:
    """One signal of the rows of a store's table. StoreError if it is not there."""
    if name not in table.column_names:
        raise StoreError(f"the store holds no {name!r}; it has {', '.join(table.column_names)}")
    entry = table.schema.field(name)
    if entry.type != pa.binary():
        return Column(table.column(name).to_numpy(), np.ones(table.num_rows, np.int32))
    shape = json.loads(entry.metadata[b"shape"])
    steps = steps_of(table, name)
    dtype = entry.metadata.get(b"dtype", b"float16").decode()
    return Column(columns.decode(table.column(name), shape, steps, dtype), steps)


def steps_of(table: pa.Table, name: str) -> NDArray[np.int32]:
    """(N,): how many steps of a signal each row of a store's table has; 1 of one value a row."""
    metadata = table.schema.field(name).metadata or {}
    if b"steps" not in metadata:
        return np.ones(table.num_rows, np.int32)
    return table.column(metadata[b"steps"].decode()).to_numpy()


def logits_of(table: pa.Table) -> StoredLogits:
    """The teacher's answers in a store's table, still encoded."""
    codec, layout = codec_of(table.schema.field("logits").metadata)
    return StoredLogits(table.column("logits"), table.column("steps").to_numpy(), codec, layout)


@dataclass(frozen=True)
class StoredRows:
    """What a store holds of some rows: in the table "" the teacher's answers, in others a layer.

    `once` says of a signal whether the teacher gives it once a sequence; a whole split tells it by
    itself.
    """

    tables: Mapping[str, pa.Table]
    once: Mapping[str, bool] = field(default_factory=dict)

    @property
    def answers(self) -> pa.Table:
        return self.tables[""]

    def logits(self) -> StoredLogits:
        """The teacher's answers, still encoded."""
        return logits_of(self.answers)

    def steps(self, mask: NDArray[np.bool_], *, is_text: bool) -> NDArray[np.bool_]:
        """(N, T) or (N, 1): the valid steps of the answers to rows with this `mask`."""
        steps = self.answers.column("steps").to_numpy()
        return stored_steps(steps, mask, is_text=is_text, once=self.once.get("logits"))

    def padded(self, name: str, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """(N, T, ...): a signal's steps at their places in `mask` (N, T), zero elsewhere."""
        return self.column(name).padded(mask, once=self.once.get(name))

    def column(self, name: str) -> Column:
        return column_of(self.tables[name if name in self.tables else ""], name)

    def value(self, name: str) -> NDArray[Any] | None:
        """(N,): a signal of one value a row; None in a store that was written without it."""
        if name not in self.answers.column_names:
            return None
        return column_of(self.answers, name).values
