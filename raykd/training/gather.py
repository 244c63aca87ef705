"""Rows out of many mapped tables: only the bytes of the rows that are asked for are read.

Arrow's own take() costs tens of microseconds a table, and a batch comes from nearly as many tables
as it has rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.store.codecs.layout import ByteStream, binary

Ints = NDArray[np.int64]


class Ragged(NamedTuple):
    """A column of bytes, of another length in each row."""

    ends: NDArray[np.int32]  # (n + 1,): where each value begins, and the last one ends
    data: memoryview


class Opened(NamedTuple):
    """A table, and its columns where they lie: (n,) values of one size, Ragged, or a list of the
    fields of a struct.
    """

    table: pa.RecordBatch
    columns: dict[str, Any]


def opened(table: pa.RecordBatch) -> Opened:
    """A table that rows can be taken from."""
    return Opened(table, {name: _lying(table.column(name)) for name in table.schema.names})


def taken(tables: Sequence[Opened], number: Ints, place: Ints) -> pa.Table:
    """(B,): the rows at these places of the tables with these numbers, in this order."""
    order = np.argsort(number, kind="stable")
    begins = np.searchsorted(number[order], np.arange(1, len(tables)))
    targets = np.split(order, begins)  # of each table's rows in the result
    schema = tables[0].table.schema
    arrays = []
    for field in schema:
        columns = [table.columns[field.name] for table in tables]
        arrays.append(_column(field.type, columns, targets, place))
    return pa.table(arrays, schema=schema)


def _lying(column: pa.Array) -> Any:
    if pa.types.is_struct(column.type):
        return [_lying(child) for child in column.flatten()]
    rows = slice(column.offset, column.offset + len(column))
    if pa.types.is_binary(column.type):
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets or bytes(4), np.int32)[rows.start : rows.stop + 1]
        return Ragged(ends, memoryview(data or b""))
    _, data = column.buffers()
    return np.frombuffer(data or b"", np.dtype((np.void, column.type.bit_width // 8)))[rows]


def _column(
    kind: pa.DataType, columns: Sequence[Any], targets: Sequence[Ints], place: Ints
) -> pa.Array:
    """One column of the result."""
    if pa.types.is_struct(kind):
        children = [
            _column(kind.field(i).type, [column[i] for column in columns], targets, place)
            for i in range(kind.num_fields)
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    if pa.types.is_binary(kind):
        pieces: list[Any] = [b""] * len(place)
        for (ends, data), target in zip(columns, targets, strict=True):
            for at, row in zip(target.tolist(), place[target].tolist(), strict=True):
                pieces[at] = data[ends[row] : ends[row + 1]]
        length = np.array([len(piece) for piece in pieces], np.int64)
        return binary(ByteStream(np.frombuffer(b"".join(pieces), np.uint8), length))
    data = pa.allocate_buffer(len(place) * columns[0].itemsize)  # of no heap that small ones pin
    values = np.frombuffer(data, columns[0].dtype)
    for column, target in zip(columns, targets, strict=True):
        values[target] = column[place[target]]
    return pa.Array.from_buffers(kind, len(place), [None, data])
