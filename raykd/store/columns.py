"""Arrays of steps as Parquet columns: one binary value a row, fp16 or int32, only the valid steps.

One binary value per sequence is smaller and faster to read than list columns. Shape and dtype stand
in the field's metadata, so any Parquet reader can decode a value with `numpy.frombuffer(value,
dtype).reshape(-1, *shape)`.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import StoreError

DTYPES = {"float16": np.dtype("<f2"), "int32": np.dtype("<i4")}


def encode(values: NDArray[Any], mask: NDArray[np.bool_]) -> pa.BinaryArray:
    """(N,) binary: the valid steps of `values` (N, T, ...), integers as int32 and all else as fp16."""
    dtype = DTYPES[_dtype(values)]
    flat = np.ascontiguousarray(values[mask].astype(dtype, copy=False))
    width = dtype.itemsize * int(np.prod(values.shape[2:], dtype=np.int64))
    offsets = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int64) * width
    if offsets[-1] > np.iinfo(np.int32).max:
        raise StoreError("one shard's column exceeds 2 GiB; lower store.rows_per_shard")
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(flat)]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def decode(
    column: pa.ChunkedArray, shape: list[int], steps: NDArray[np.int32], kind: str = "float16"
) -> NDArray[Any]:
    """(sum of steps, *shape): the flat steps of all rows of a column.

    StoreError where sizes disagree.
    """
    if kind not in DTYPES:
        raise StoreError(f"a column holds values of type {kind!r}, which no teacher store has")
    width = DTYPES[kind].itemsize * int(np.prod(shape, dtype=np.int64))
    parts = []
    for chunk in column.chunks:
        _, offset_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, np.int32)[
            chunk.offset : chunk.offset + len(chunk) + 1
        ]
        parts.append(np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]])
    raw = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    if len(raw) != int(steps.sum()) * width:
        raise StoreError(
            f"a column holds {len(raw)} bytes where {int(steps.sum())} steps of {width} bytes belong"
        )
    return raw.view(DTYPES[kind]).reshape(-1, *shape)


def field(name: str, values: NDArray[Any], steps: str) -> pa.Field:
    """The schema entry of an encoded column: the shape of one step, and the column that counts its
    steps.
    """
    metadata = {
        "dtype": _dtype(values),
        "shape": json.dumps(list(values.shape[2:])),
        "steps": steps,
    }
    return pa.field(name, pa.binary(), nullable=False, metadata=metadata)


def _dtype(values: NDArray[Any]) -> str:
    return "int32" if np.issubdtype(values.dtype, np.integer) else "float16"
