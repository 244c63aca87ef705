"""What a shard's file would take in memory, read before anything is decoded.

A footer alone does not show it: dictionaries and run lengths expand, and a page has its own size.
The files of `commit.to_parquet` have plain zstd pages of few types, so any other is refused. Then
rows x width plus the sizes of the pages bound what decoding takes.
"""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError

FLOOR_BYTES = 64 << 20  # any file may decode to so many bytes
EXPANSION = 100  # a larger one may decode to so many times its bytes
DATA_PAGE = 0
PLAIN = 0
NESTED = 8  # levels of a page's header; its statistics are the second


def check(data: bytes, rows: int, name: str) -> None:
    """StoreError unless the Parquet file `data` has `rows` rows and decodes within its bounds."""
    try:
        footer = pq.read_metadata(io.BytesIO(data))
        schema = footer.schema.to_arrow_schema()
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        promised = sum(_promise(data, group) for group in groups)
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        raise StoreError(f"{name} is not a readable Parquet file: {error}") from None
    except StoreError as error:
        raise StoreError(f"{name} {error}") from None
    in_groups = sum(group.num_rows for group in groups)
    if {in_groups, footer.num_rows} != {rows}:
        more = max(in_groups, footer.num_rows)
        raise StoreError(f"{name} promises {more} rows where {rows} belong")
    if strange := [field.name for field in schema if not _is_ours(field.type)]:
        raise StoreError(
            f"{name} has columns of types that no teacher store has: {', '.join(strange[:5])}"
        )
    most = max(FLOOR_BYTES, EXPANSION * len(data))
    if promised > most:
        raise StoreError(
            f"{name} would take {promised:,} bytes of memory; {len(data):,} bytes of file may take "
            f"{most:,}: lower store.rows_per_shard if it is your own"
        )


def _is_ours(kind: pa.DataType) -> bool:
    """Whether a teacher store has columns of this type."""
    if pa.types.is_struct(kind):
        return all(_is_ours(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_binary(kind)


def _promise(data: bytes, group: Any) -> int:
    """Bytes that decoding a row group takes: the pages of every column, and 8 bytes a row."""
    total = 0
    for number in range(group.num_columns):
        column = group.column(number)
        name = column.path_in_schema
        is_plain = column.compression == "ZSTD" and not column.has_dictionary_page
        if not is_plain or column.num_values != group.num_rows:
            raise StoreError(f"has a column {name!r} not plain zstd, which no teacher store has")
        first = column.data_page_offset
        end = first + column.total_compressed_size
        if not 0 <= first <= end <= len(data):
            raise StoreError(f"has a column {name!r} that lies outside the file")
        total += max(_pages(data[first:end]), column.total_uncompressed_size)
        total += 8 * group.num_rows  # offsets or numbers
    return total


def _pages(data: bytes) -> int:
    """The uncompressed bytes of a column's pages, from their headers."""
    at = 0
    total = 0
    while at < len(data):
        header, at = _struct(data, at)
        kind = header.get(1)
        size = header.get(2)
        stored = header.get(3)
        values = header.get(5)
        if kind != DATA_PAGE or not isinstance(values, dict) or values.get(2) != PLAIN:
            raise StoreError("has a page that is no plain data page, which no teacher store has")
        if not isinstance(size, int) or not isinstance(stored, int) or min(size, stored) < 0:
            raise StoreError("has a page without a size")
        total += size
        at += stored
    if at != len(data):
        raise StoreError("has a page that is longer than its column")
    return total


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """({field: value}, where it ends): a struct of Thrift's compact protocol.

    Only the types that page headers have are read.
    """
    fields: dict[int, Any] = {}
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
                fields[number] = head & 15 == 1
            case 3:
                fields[number] = data[at]
                at += 1
            case 4 | 5 | 6:
                fields[number], at = _integer(data, at)
            case 8:
                size, at = _varint(data, at)
                at += size
            case 12:
                fields[number], at = _struct(data, at, depth + 1)
            case other:
                raise StoreError(f"has a page header with a field of type {other}")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(an unsigned number of 7 bits a byte, where it ends)."""
    value = 0
    shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at += 1
        shift += 7
        if shift > 63:
            raise StoreError("has a page header with a number of more than 64 bits")
    return value | data[at] << shift, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """(a signed number in zigzag form, where it ends)."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
