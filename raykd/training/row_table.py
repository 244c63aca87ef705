"""Rows as an Arrow table of one column: each row is one record of fixed size."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.data import Rows

COLUMN = "row"
FIELDS = b"fields"  # in the column's metadata: a numpy record's fields, as JSON


def row_table(rows: Rows) -> pa.Table:
    """The rows as a table that can be mapped, and from which any rows can be taken."""
    arrays = {name: values for name, values in vars(rows).items() if values is not None}
    fields = [(name, values.dtype.str, values.shape[1:]) for name, values in arrays.items()]
    record = np.dtype(fields)
    data = pa.allocate_buffer(len(rows) * record.itemsize)
    records: NDArray[Any] = np.frombuffer(data, record)
    for name, values in arrays.items():
        records[name] = values
    width = pa.binary(record.itemsize)
    column = pa.Array.from_buffers(width, len(rows), [None, data])
    field = pa.field(COLUMN, width, nullable=False, metadata={FIELDS: json.dumps(fields)})
    return pa.table([column], schema=pa.schema([field]))


def rows_of(table: pa.Table) -> Rows:
    """The rows of a table that `row_table` made, or of some of its rows."""
    chunks = [_records(table, chunk) for chunk in table.column(COLUMN).chunks]
    records = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    arrays: dict[str, Any] = {name: records[name].copy() for name in records.dtype.names or ()}
    return Rows(**arrays)


def _records(table: pa.Table, chunk: pa.Array) -> NDArray[Any]:
    dtype = _record(table.schema.field(COLUMN).metadata[FIELDS])
    _, data = chunk.buffers()
    first = chunk.offset * dtype.itemsize
    return np.frombuffer(data, dtype, len(chunk), first)


@lru_cache
def _record(fields: bytes) -> np.dtype[Any]:
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(fields)])
