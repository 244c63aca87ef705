"""How arrays of entries become one value per sequence, and back, without a loop over rows or
places.

A column is a struct of binary streams, so that the file compresses like with like: Parquet keeps
each child apart. Class ids take 2, 3 or 4 bytes by vocabulary, and rise within a place. Their
stream is laid out in one of three ways, the same for a whole shard, whichever is smallest under the
file's own compression (a comb's has one more, ranked.py):

    plain   id after id        planes   byte plane after byte plane, per row        delta   planes
    of the differences
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
Column: TypeAlias = "pa.Array | pa.ChunkedArray"


class Stream(NamedTuple):
    """Bytes of every row, row after row, and how many of them each row has, (R,)."""

    data: Bytes
    length: Ints


def ragged(first: Ints, length: Ints) -> Ints:
    """(sum of length,): first[0], first[0] + 1, .. for length[0], then the same for every other
    row.
    """
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(int(length.sum()))


def sums(values: NDArray[Any], length: Ints) -> Ints:
    """(R,): the sum of each row's `length` values."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    end = np.cumsum(length)
    return total[end] - total[end - length]


def binary(stream: Stream) -> pa.BinaryArray:
    """(R,) binary: each row's bytes."""
    offsets = np.concatenate([[0], np.cumsum(stream.length)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise StoreError("one shard's column exceeds 2 GiB; lower store.rows_per_shard")
    data = np.ascontiguousarray(stream.data)
    assert (data.size, data.dtype) == (offsets[-1], np.uint8)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(stream.length), buffers)


def bytes_of(column: Column) -> Stream:
    """The inverse of `binary`. StoreError for another type or a missing value."""
    if column.type != pa.binary() or column.null_count:
        raise StoreError(
            f"an encoded column is {column.type} with {column.null_count} nulls, not binary without any"
        )
    data, length = [np.zeros(0, np.uint8)], [np.zeros(0, np.int64)]
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if len(chunk):
            _, offsets, body = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[
                chunk.offset : chunk.offset + len(chunk) + 1
            ].astype(np.int64)
            data.append(np.frombuffer(body or b"", np.uint8)[ends[0] : ends[-1]])
            length.append(np.diff(ends))
    return Stream(np.concatenate(data), np.concatenate(length))


def struct(streams: dict[str, Stream]) -> pa.StructArray:
    """(R,) struct of binaries: each row's bytes of every stream."""
    fields = [pa.field(name, pa.binary(), nullable=False) for name in streams]
    return pa.StructArray.from_arrays([binary(s) for s in streams.values()], fields=fields)


def streams_of(column: Column, names: list[str]) -> dict[str, Stream]:
    """The inverse of `struct`. StoreError where the column has other streams than `names`."""
    found = [f.name for f in column.type] if pa.types.is_struct(column.type) else [str(column.type)]
    if found != names or column.null_count:
        raise StoreError(
            f"an encoded column holds {', '.join(found)} where {', '.join(names)} belong: another codec's"
        )
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return {
        name: bytes_of(pa.chunked_array([c.field(i) for c in chunks], pa.binary()))
        for i, name in enumerate(names)
    }


def check_sizes(streams: dict[str, Stream], expected: dict[str, Ints]) -> None:
    """StoreError unless every row has the expected bytes in each stream."""
    for name, length in expected.items():
        found = streams[name].length
        if len(found) != len(length) or not np.array_equal(found, length):
            row = (
                int(np.argmax(found != length))
                if len(found) == len(length)
                else min(len(found), len(length))
            )
            had = found[row] if row < len(found) else "no"
            raise StoreError(
                f"stream {name!r} of row {row} has {had} bytes where {length[row] if row < len(length) else 'none'} "
                "belong: the column is damaged or of other rows"
            )


def id_bytes(vocab: int) -> int:
    """Bytes of one class id: 2, 3 or 4."""
    return 2 if vocab <= 1 << 16 else 3 if vocab <= 1 << 24 else 4


def put_ids(ids: Ints, start: Ints, entries: Ints, vocab: int, layout: Layout) -> Stream:
    """The id stream of `ids` (M,), rising within each place [start[p], start[p + 1]), `entries`
    (R,) to a row.
    """
    width = id_bytes(vocab)
    if layout == "delta":
        previous = np.concatenate([[0], ids[:-1]])
        previous[start[:-1]] = 0
        ids = ids - previous
    data = np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :width]
    if layout != "plain":
        out = np.empty(data.size, np.uint8)
        for byte, at in enumerate(_planes(entries, width)):
            out[at] = data[:, byte]
        data = out
    return Stream(np.ascontiguousarray(data).reshape(-1), entries * width)


def take_ids(stream: Stream, start: Ints, entries: Ints, vocab: int, layout: Layout) -> Ints:
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
        x: binary(put_ids(ids, start, entries, vocab, x)) for x in LAYOUTS
    }
    layout = min(candidates, key=lambda x: compressed(candidates[x]))
    names = [f.name for f in column.type]
    children = [candidates[layout] if name == "ids" else column.field(name) for name in names]
    return pa.StructArray.from_arrays(children, fields=list(column.type)), layout


def compressed(column: Column) -> int:
    """Bytes of a column's values under zstd-3, each stream by itself, as the shard's file holds
    them.
    """
    if pa.types.is_struct(column.type):
        return sum(compressed(column.field(i)) for i in range(column.type.num_fields))
    data = bytes_of(column).data
    return pa.Codec("zstd", compression_level=3).compress(data.tobytes()).size if len(data) else 0


def _planes(entries: Ints, width: int) -> Iterator[Ints]:
    """For each byte (M,): where that of each entry stands when every row keeps byte plane after
    byte plane.
    """
    at, gap = ragged((np.cumsum(entries) - entries) * width, entries), np.repeat(entries, entries)
    for _ in range(width):
        yield at
        at = at + gap
