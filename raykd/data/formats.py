"""Files of tables, by their suffix, as batches of Arrow's columns.

Parquet is read by row groups, with only the ranges of bytes that are wanted. The others have one
group and are read whole: JSON lines, CSV, and the Arrow streams that `datasets` saves.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from pyarrow import json as json_lines

from raykd.data.layout import ARROW, CSV, LINES, PARQUET
from raykd.errors import DataError
from raykd.files import parquet
from raykd.files.data_files import DataFile, DataFiles
from raykd.files.ranges import RangeFile
from raykd.recipe.tables import Columns

FOOTERS = 64  # that a process keeps
BATCH_BYTES = 16 << 20  # of a batch, about
NAMES = {PARQUET: "Parquet file", ARROW: "Arrow stream", CSV: "CSV file"}


class TableFile(Protocol):
    """The rows of one file."""

    schema: pa.Schema
    groups: tuple[int, ...]  # the rows of each group

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a group in some columns."""
        ...


def open_table(files: DataFiles, file: DataFile, kind: str, columns: Columns) -> TableFile:
    """A file of rows. DataError names it if it cannot be read as what its suffix says."""
    with named(files, file, kind):
        if kind == PARQUET:
            return ParquetTable(files, file)
        content = files.read(file, 0, file.bytes)
        if kind == ARROW:
            alone = pa.ipc.IpcReadOptions(use_threads=False)
            return WholeTable(pa.ipc.open_stream(content, options=alone).read_all())
        if kind == CSV:
            return WholeTable(_csv(content, columns))
        return WholeTable(_lines(content, columns))


def lines_table(files: DataFiles, file: DataFile, content: bytes, columns: Columns) -> "WholeTable":
    """Some lines of a file of JSON lines, which may be none."""
    with named(files, file, LINES[0]):
        return WholeTable(_lines(content, columns) if content.strip() else pa.table({}))


@contextmanager
def named(files: DataFiles, file: DataFile, kind: str) -> Iterator[None]:
    """An error of Arrow within it becomes a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        name = "file of JSON lines" if kind in LINES else NAMES[kind]
        text = str(error).strip().partition("\n")[0]
        raise DataError(f"{files}/{file.name}: not a readable {name}: {text}") from None


@lru_cache(maxsize=FOOTERS)
def _footer(files: DataFiles, file: DataFile) -> pq.FileMetaData:
    return parquet.opened(RangeFile(files, file)).metadata


class ParquetTable:
    """A Parquet file, of which only the footer is read before a group is asked for.

    Footers of the last files are kept for the process. A table is of one thread.
    """

    def __init__(self, files: DataFiles, file: DataFile):
        self.files = files
        self.file = file
        self.ranges = RangeFile(files, file)
        with named(files, file, PARQUET):
            self.footer = _footer(files, file)
            self.opened = parquet.opened(self.ranges, self.footer)
        self.schema = self.opened.schema_arrow
        numbers = range(self.footer.num_row_groups)
        self.groups = tuple(self.footer.row_group(number).num_rows for number in numbers)

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = [name for name in columns if name in self.schema.names]
        rows = self.groups[group]
        if not wanted:  # its folders say all of them
            yield pa.record_batch([pa.nulls(rows)], [""])
            return
        chunks = list(self.chunks(group, wanted))
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        with named(self.files, self.file, PARQUET):
            self.ranges.fetch([_range(chunk) for chunk in chunks])
            at_once = max(1, min(rows, rows * BATCH_BYTES // max(size, 1)))
            yield from parquet.batches(self.opened, group, wanted, at_once)
        self.ranges.fetch([])

    def bytes_of(self, group: int) -> int:
        """The bytes of a group's columns before compression."""
        return self.footer.row_group(group).total_byte_size

    def values_of(self, group: int, column: str) -> int:
        """How many values a column holds in a group, by the footer."""
        return sum(chunk.num_values for chunk in self.chunks(group, [column]))

    def chunks(self, group: int, columns: Sequence[str]) -> Iterator[Any]:
        """What the footer says of each column that lies in the columns of a group."""
        table = self.footer.row_group(group)
        for number in range(table.num_columns):
            chunk = table.column(number)
            path = f"{chunk.path_in_schema}."
            if any(path.startswith(f"{name}.") for name in columns):
                yield chunk


def _range(chunk: Any) -> tuple[int, int]:
    """(first, end) of a column chunk's bytes."""
    first = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < first:
        first = chunk.dictionary_page_offset
    return first, first + chunk.total_compressed_size


class WholeTable:
    """Rows that had to be read together."""

    def __init__(self, table: pa.Table):
        self.table = table
        self.schema = table.schema
        self.groups = (table.num_rows,)

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        wanted = [name for name in columns if name in self.schema.names]
        if not wanted:
            yield pa.record_batch([pa.nulls(self.table.num_rows)], [""])
            return
        yield from self.table.select(wanted).to_batches()


def _lines(content: bytes, columns: Columns) -> pa.Table:
    """JSON lines. What is text stays text, where Arrow would see a date in it."""
    names = (columns.text, columns.prompt, columns.completion, columns.split)
    texts = [name for name in dict.fromkeys(names) if name]
    table = json_lines.read_json(
        pa.BufferReader(content),
        read_options=json_lines.ReadOptions(use_threads=False, block_size=max(len(content), 1)),
        parse_options=json_lines.ParseOptions(
            explicit_schema=pa.schema([(name, pa.string()) for name in texts])
        ),
    )
    absent = [name for name in texts if table.column(name).null_count == table.num_rows]
    return table.drop_columns(absent)  # a named column that is in no line


def _csv(content: bytes, columns: Columns) -> pa.Table:
    """CSV. Every column is text, an empty cell is null, and inputs are JSON in a cell."""
    lists = [name for name in (columns.inputs, columns.valence) if name]
    header = csv.open_csv(
        pa.BufferReader(content), read_options=csv.ReadOptions(use_threads=False)
    ).schema.names
    table = csv.read_csv(
        pa.BufferReader(content),
        read_options=csv.ReadOptions(use_threads=False, block_size=max(len(content), 1)),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    for name in lists:
        if name in table.column_names:
            place = table.column_names.index(name)
            table = table.set_column(place, name, _parsed(table.column(name).to_pylist(), name))
    return table


def _parsed(cells: list[str | None], name: str) -> pa.Array:
    """The lists that the cells of a column write as JSON. An ArrowInvalid names the row."""
    values = []
    for row, cell in enumerate(cells):
        try:
            values.append(None if cell is None else json.loads(cell))
        except ValueError:
            raise pa.ArrowInvalid(
                f"row {row}: {name} is {str(cell)[:40]!r}; write a list of steps as JSON, such as "
                "[[0.1, 0.2], [0.3, 0.4]]"
            ) from None
    return pa.array(values)
