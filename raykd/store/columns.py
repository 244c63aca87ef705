"""Arrays of steps as Parquet columns: one binary value a row, fp16 or int32, only the valid steps.

One binary value a row is smaller and faster to read than a list column. Shape and dtype are in the
field's metadata, so any Parquet reader can decode a value with
`numpy.frombuffer(value, dtype).reshape(-1, *shape)`.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import StoreError

DTYPES = {"float16": np.dtype("<f2"), "int32": np.dtype("<i4")}


def encode(values: NDArray[Any], mask: NDArray[np.bool_]) -> pa.BinaryArray:
    """(N,) binary: the valid steps of `values` (N, T, ...), integers as int32, others as fp16."""
    dtype = DTYPES[_dtype(values)]
    flat = np.ascontiguousarray(values[mask].astype(dtype, copy=False))
    width = dtype.itemsize * int(np.prod(values.shape[2:], dtype=np.int64))
    offsets = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int64) * width
    if offsets[-1] > np.iinfo(np.int32).max:
        raise StoreError("one shard's column exceeds 2 GiB; lower store.rows_per_shard")
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(flat)]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def decode(
    column: pa.ChunkedArray, shape: list[int], steps: NDArray[np.int32], dtype: str = "float16"
) -> NDArray[Any]:
    """(sum of `steps`, *shape): the steps of all rows of a column in turn.

    StoreError if the column's bytes are not those of so many steps.
    """
    if dtype not in DTYPES:
        raise StoreError(f"a column holds values of type {dtype!r}, which no teacher store has")
    width = DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
    chunks = [np.zeros(0, np.uint8)]
    for chunk in column.chunks:
        _, offset_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, np.int32)
        offsets = offsets[chunk.offset : chunk.offset + len(chunk) + 1]
        chunks.append(np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]])
    raw = np.concatenate(chunks)
    count = int(steps.sum())
    if len(raw) != count * width:
        raise StoreError(
            f"a column holds {len(raw)} bytes where {count} steps of {width} bytes belong"
        )
    return raw.view(DTYPES[dtype]).reshape(-1, *shape)


def field(name: str, values: NDArray[Any], steps: str) -> pa.Field:
    """The schema entry of an encoded column; `steps` names the column that counts its steps."""
    metadata = {
        "dtype": _dtype(values),
        "shape": json.dumps(list(values.shape[2:])),
        "steps": steps,
    }
    return pa.field(name, pa.binary(), nullable=False, metadata=metadata)


def _dtype(values: NDArray[Any]) -> str:
    return "int32" if np.issubdtype(values.dtype, np.integer) else "float16"
