"""What a model said of a split, kept with its arm: the answer at each place where one is to be
told.

A place is a row of series, and a step of a row of text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.data import Rows
from raykd.files.atomic import write_bytes

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Places:
    """Where a split is told: of text, place = row id * steps + step."""

    place: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,) UNLABELLED where hidden or missing
    group: NDArray[np.int64]  # (n,)
    row: NDArray[np.int64]  # (n,) in the split

    @classmethod
    def of(cls, rows: Rows) -> "Places":
        """The places of a split in their order."""
        if not rows.is_text:
            return cls(rows.row_id, rows.label, rows.group, np.arange(len(rows)))
        row, step = np.nonzero(rows.mask)
        return cls(
            rows.row_id[row] * rows.mask.shape[1] + step,
            rows.label[rows.mask],
            rows.group[row],
            row,
        )


@dataclass(frozen=True)
class Predictions:
    """A model's answers at the n places of a split."""

    place: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,)
    answer: NDArray[np.int64]  # (n,) the likeliest class, or token
    log_q: Floats  # (n,) of the label; NaN without one
    kl: Floats | None = None  # (n,) KL(teacher || model) at temperature 1, where a store tells it
    logits: Floats | None = None  # (n, C) of series

    def metrics(self) -> dict[str, float]:
        """Accuracy and mean negative log-likelihood over the labelled places, and the mean KL where
        it is known.
        """
        known = self.label >= 0
        found = {
            "accuracy": float((self.answer == self.label)[known].mean()),
            "nll": -_mean(self.log_q[known]),
        }
        return found | ({} if self.kl is None else {"kl": _mean(self.kl)})

    def write(self, path: Path) -> None:
        """A Parquet table, one row a place."""
        columns: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None}
        if self.logits is not None:
            flat = pa.array(np.ascontiguousarray(self.logits).ravel())
            columns["logits"] = pa.FixedSizeListArray.from_arrays(flat, self.logits.shape[1])
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(path, sink.getvalue().to_pybytes())


def read(path: Path) -> Predictions:
    """What `Predictions.write` wrote."""
    table = pq.read_table(path).combine_chunks()
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    logits = columns.pop("logits", None)
    if logits is not None:
        values = logits.combine_chunks().flatten().to_numpy()
        logits = values.reshape(len(table), -1)
    return Predictions(
        **{name: column.to_numpy() for name, column in columns.items()}, logits=logits
    )


def of_logits(rows: Rows, logits: Floats) -> Predictions:
    """The predictions of a split of series from its logits (N, C)."""
    places, z = Places.of(rows), logits.astype(np.float64)
    log_q = np.full(len(z), np.nan, np.float32)
    known = places.label >= 0
    norm = np.logaddexp.reduce(z[known], axis=1)
    log_q[known] = z[known, places.label[known]] - norm
    return Predictions(places.place, places.label, z.argmax(1), log_q, logits=logits)


def _mean(values: Floats) -> float:
    return float(values.mean(dtype=np.float64))
