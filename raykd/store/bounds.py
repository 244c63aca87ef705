"""What a shard's file promises, read before anything is decoded: a small file must not become a
large memory.

A footer alone does not tell: dictionaries and run lengths unfold, and a page has a size of its own.
The files of `commit.to_parquet` have plain zstd pages of few types, so any other is refused, and
rows x width plus the pages' own sizes bound what decoding takes.
"""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError

FLOOR_BYTES, UNFOLDS = (
    64 << 20,
    100,
)  # a file may decode to UNFOLDS times its bytes, and to FLOOR_BYTES anyway
DATA_PAGE, PLAIN = 0, 0
NESTED = 8  # levels of a page's header; its statistics are the second


def check(data: bytes, rows: int, name: str) -> None:
    """StoreError unless the Parquet file `data` has `rows` rows and decodes within its bounds."""
    try:
        footer = pq.read_metadata(io.BytesIO(data))
        schema = footer.schema.to_arrow_schema()
        promised = sum(_promise(data, footer.row_group(g)) for g in range(footer.num_row_groups))
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        raise StoreError(f"{name} is not a readable Parquet file: {error}") from None
    except StoreError as error:
        raise StoreError(f"{name} {error}") from None
    found = sum(footer.row_group(g).num_rows for g in range(footer.num_row_groups))
    if {found, footer.num_rows} != {rows}:
        raise StoreError(f"{name} promises {max(found, footer.num_rows)} rows where {rows} belong")
    if strange := [f.name for f in schema if not _is_ours(f.type)]:
        raise StoreError(
            f"{name} has columns of types that no teacher store has: {', '.join(strange[:5])}"
        )
    if promised > (most := max(FLOOR_BYTES, UNFOLDS * len(data))):
        raise StoreError(
            f"{name} would take {promised:,} bytes of memory; {len(data):,} bytes of file may take {most:,}: "
            "lower store.rows_per_shard if it is your own"
        )


def _is_ours(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return all(_is_ours(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_binary(kind)


def _promise(data: bytes, group: Any) -> int:
    """Bytes that decoding a row group takes: of every column its pages, and 8 a row for offsets or
    numbers.
    """
    total = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if (
            column.compression != "ZSTD"
            or column.has_dictionary_page
            or column.num_values != group.num_rows
        ):
            raise StoreError(
                f"has a column {column.path_in_schema!r} not plain zstd, which no teacher store has"
            )
        first, size = column.data_page_offset, column.total_compressed_size
        if not 0 <= first <= first + size <= len(data):
            raise StoreError(f"has a column {column.path_in_schema!r} that lies outside the file")
        total += (
            max(_pages(data[first : first + size]), column.total_uncompressed_size)
            + 8 * group.num_rows
        )
    return total


def _pages(data: bytes) -> int:
    """The uncompressed bytes of a column's pages, from their headers."""
    at = total = 0
    while at < len(data):
        header, at = _struct(data, at)
        kind, size, stored, values = (header.get(i) for i in (1, 2, 3, 5))
        if kind != DATA_PAGE or not isinstance(values, dict) or values.get(2) != PLAIN:
            raise StoreError("has a page that is no plain data page, which no teacher store has")
        if not isinstance(size, int) or not isinstance(stored, int) or min(size, stored) < 0:
            raise StoreError("has a page without a size")
        total, at = total + size, at + stored
    if at != len(data):
        raise StoreError("has a page that is longer than its column")
    return total


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """({field: value}, where it ends): a struct of Thrift's compact protocol, of the types that
    page headers have.
    """
    found: dict[int, Any] = {}
    number = 0
    if depth > NESTED:
        raise StoreError("has a page header that nests too deep")
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        match head & 15:
            case 1 | 2:
                found[number] = head & 15 == 1
            case 3:
                found[number], at = data[at], at + 1
            case 4 | 5 | 6:
                found[number], at = _integer(data, at)
            case 8:
                size, at = _varint(data, at)
                at += size
            case 12:
                found[number], at = _struct(data, at, depth + 1)
            case other:
                raise StoreError(f"has a page header with a field of type {other}")
    return found, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise StoreError("has a page header with a number of more than 64 bits")
    return value | data[at] << shift, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed number in zigzag form."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
