"""How arrays of entries become one value per row, and back, without a loop over rows or places.

A column is a struct of binary streams: Parquet stores each child apart, so that the file compresses
like with like. Class ids take 2, 3 or 4 bytes by vocabulary, and rise within a place. The id stream
of a shard has the layout that is smallest under the file's own compression (ranked.py has one more
layout, for a comb):

    plain    id after id
    planes   byte plane after byte plane, in each row
    delta    planes of the differences between ids
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import StoreError

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Layout: TypeAlias = str  # of a shard: one of LAYOUTS, or a name of ranked.py's
LAYOUTS = ("plain", "planes", "delta")
EncodedColumn: TypeAlias = "pa.Array | pa.ChunkedArray"


class ByteStream(NamedTuple):
    """The bytes of all rows in turn, and the number of bytes of each row, (R,)."""

    data: Bytes
    length: Ints


def ragged(first: Ints, length: Ints) -> Ints:
    """(sum of `length`,): for each row the `length` integers from its `first` on."""
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(int(length.sum()))


def sums(values: NDArray[Any], length: Ints) -> Ints:
    """(R,): the sum of each row's `length` values."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    end = np.cumsum(length)
    return total[end] - total[end - length]


def binary(stream: ByteStream) -> pa.BinaryArray:
    """(R,) binary: each row's bytes."""
    offsets = np.concatenate([[0], np.cumsum(stream.length)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise StoreError("one shard's column exceeds 2 GiB; lower store.rows_per_shard")
    data = np.ascontiguousarray(stream.data)
    assert (data.size, data.dtype) == (offsets[-1], np.uint8)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(stream.length), buffers)


def bytes_of(column: EncodedColumn) -> ByteStream:
    """The inverse of `binary`. StoreError for another type or a missing value."""
    if column.type != pa.binary() or column.null_count:
        raise StoreError(
            f"an encoded column is {column.type} with {column.null_count} nulls, not binary "
            "without any"
        )
    data = [np.zeros(0, np.uint8)]
    length = [np.zeros(0, np.int64)]
    for chunk in _chunks(column):
        if not len(chunk):
            continue
        _, offsets, body = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        ends = ends.astype(np.int64)
        data.append(np.frombuffer(body or b"", np.uint8)[ends[0] : ends[-1]])
        length.append(np.diff(ends))
    return ByteStream(np.concatenate(data), np.concatenate(length))


def _chunks(column: EncodedColumn) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def struct(streams: dict[str, ByteStream]) -> pa.StructArray:
    """(R,) struct of binaries: each row's bytes of every stream."""
    fields = [pa.field(name, pa.binary(), nullable=False) for name in streams]
    children = [binary(stream) for stream in streams.values()]
    return pa.StructArray.from_arrays(children, fields=fields)


def streams_of(column: EncodedColumn, names: list[str]) -> dict[str, ByteStream]:
    """The inverse of `struct`. StoreError where the column has other streams than `names`."""
    present = [str(column.type)]
    if pa.types.is_struct(column.type):
        present = [field.name for field in column.type]
    if present != names or column.null_count:
        raise StoreError(
            f"an encoded column holds {', '.join(present)} where {', '.join(names)} belong: "
            "another codec's"
        )
    streams = {}
    for number, name in enumerate(names):
        children = [chunk.field(number) for chunk in _chunks(column)]
        streams[name] = bytes_of(pa.chunked_array(children, pa.binary()))
    return streams


def check_sizes(streams: dict[str, ByteStream], expected: dict[str, Ints]) -> None:
    """StoreError unless every row has the expected bytes in each stream."""
    for name, wanted in expected.items():
        length = streams[name].length
        if np.array_equal(length, wanted):
            continue
        row = min(len(length), len(wanted))
        if len(length) == len(wanted):
            row = int(np.argmax(length != wanted))
        stored = length[row] if row < len(length) else "no"
        belong = wanted[row] if row < len(wanted) else "none"
        raise StoreError(
            f"stream {name!r} of row {row} has {stored} bytes where {belong} belong: "
            "the column is damaged or of other rows"
        )


def id_bytes(vocab: int) -> int:
    """Bytes of one class id: 2, 3 or 4."""
    if vocab <= 1 << 16:
        return 2
    return 3 if vocab <= 1 << 24 else 4


def put_ids(ids: Ints, start: Ints, entries: Ints, vocab: int, layout: Layout) -> ByteStream:
    """The id stream of `ids` (M,), of which `entries` (R,) belong to each row.

    The ids of a place are [start[p], start[p + 1]), and rise.
    """
    width = id_bytes(vocab)
    if layout == "delta":
        previous = np.concatenate([[0], ids[:-1]])
        previous[start[:-1]] = 0
        ids = ids - previous
    data = np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :width]
    if layout != "plain":
        planes = np.empty(data.size, np.uint8)
        for byte, at in enumerate(_planes(entries, width)):
            planes[at] = data[:, byte]
        data = planes
    return ByteStream(np.ascontiguousarray(data).reshape(-1), entries * width)


def take_ids(stream: ByteStream, start: Ints, entries: Ints, vocab: int, layout: Layout) -> Ints:
    """(M,) int64: the inverse of `put_ids`.

    StoreError for ids that do not rise or leave the vocabulary.
    """
    if layout not in LAYOUTS:
        raise StoreError(
            f"ids are laid out as {layout[:20]!r}; this version reads {', '.join(LAYOUTS)}"
        )
    width = id_bytes(vocab)
    if layout == "plain":
        planes = iter(stream.data.reshape(-1, width).T)
    else:
        planes = (stream.data[at] for at in _planes(entries, width))
    ids = next(planes).astype(np.int64)
    for byte, plane in enumerate(planes, 1):
        ids |= plane.astype(np.int64) << (8 * byte)
    if layout == "delta":
        total = np.cumsum(ids)
        ids = total - np.repeat((total - ids)[start[:-1]], np.diff(start))
    rises = ids[1:] > ids[:-1]
    rises[start[1:-1] - 1] = True
    if len(ids) and (ids.max() >= vocab or not rises.all()):
        raise StoreError(
            f"stored class ids do not rise within 0 to {vocab - 1}: the column is damaged"
        )
    return ids


def smallest(
    column: pa.StructArray, ids: Ints, start: Ints, entries: Ints, vocab: int
) -> tuple[pa.Array, Layout]:
    """The column with its id stream in the layout of fewest bytes, and that layout."""
    candidates: dict[Layout, Any] = {
        name: binary(put_ids(ids, start, entries, vocab, name)) for name in LAYOUTS
    }
    layout = min(candidates, key=lambda name: compressed(candidates[name]))
    children = [
        candidates[layout] if field.name == "ids" else column.field(field.name)
        for field in column.type
    ]
    return pa.StructArray.from_arrays(children, fields=list(column.type)), layout


def compressed(column: EncodedColumn) -> int:
    """Bytes of a column's values under zstd-3, each stream by itself, as in the shard's file."""
    if pa.types.is_struct(column.type):
        return sum(compressed(column.field(i)) for i in range(column.type.num_fields))
    data = bytes_of(column).data
    if not len(data):
        return 0
    return pa.Codec("zstd", compression_level=3).compress(data.tobytes()).size


def _planes(entries: Ints, width: int) -> Iterator[Ints]:
    """For each byte of an id in turn, (M,): the position of that byte of each entry."""
    at = ragged((np.cumsum(entries) - entries) * width, entries)
    gap = np.repeat(entries, entries)
    for _ in range(width):
        yield at
        at = at + gap
