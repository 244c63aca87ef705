"""What is read and committed as one while rows are prepared: files, row groups and ranges of lines.

A range of a file of JSON lines has the lines that begin in it. Other files but Parquet have to be
read whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from raykd.data.file_rows import Batch, FileRows
from raykd.data.formats import ParquetTable, TableFile, WholeTable, lines_table
from raykd.data.layout import LINES, PARQUET, LaidFile
from raykd.files.data_files import DataFile
from raykd.files.waiting import in_turn

UNIT_BYTES = 32 << 20  # of a source, about
BATCH_BYTES = 4 << 20  # of the columns that are handled at a time
LINE_BYTES = 1 << 20  # that are read at a time to find the end of a line
MARKS = 8  # files that are hashed at a time


class Piece(NamedTuple):
    """A row group of a file, or its lines that begin in a range of bytes."""

    file: int  # its place in the list of files
    group: int = 0
    first: int = 0
    end: int = 0  # 0 where no range is meant


class Unit(NamedTuple):
    """Some pieces of a source, in the order of its rows."""

    number: int
    pieces: tuple[Piece, ...]
    bytes: int  # of the source
    rows: int  # 0 where they are not known before they are read


class Some(NamedTuple):
    """Some rows of a file, and what begins messages about them."""

    batch: Batch
    name: str


@dataclass(frozen=True)
class FileUnits:
    """The files of a source in units."""

    rows: FileRows

    @cached_property
    def marks(self) -> list[list[Any]]:
        """What stands for the files in a digest: [name, bytes, mark] of each."""
        files = self.rows.files
        listed = [laid.file for laid in self.rows.laid]
        found = in_turn(files.mark, listed, MARKS)
        return [[file.name, file.bytes, mark] for file, mark in zip(listed, found, strict=True)]

    @cached_property
    def types(self) -> pa.Schema | None:
        """The types of the plain columns where footers tell them, in all files together."""
        if any(laid.kind != PARQUET for laid in self.rows.laid):
            return None
        return self.rows.agreed(self.rows.open_all())

    @cached_property
    def all(self) -> tuple[Unit, ...]:
        """Every unit; those of Parquet cost the files' footers."""
        units: list[Unit] = []
        pieces: list[Piece] = []
        size = 0
        rows = 0
        numbers = range(len(self.rows.laid))
        for found in in_turn(self._pieces, numbers, self.rows.requests):
            for piece, of_piece, count in found:
                if pieces and size + of_piece > UNIT_BYTES:
                    units.append(Unit(len(units), tuple(pieces), size, rows))
                    pieces = []
                    size = 0
                    rows = 0
                pieces.append(piece)
                size += of_piece
                rows += count
        if pieces:
            units.append(Unit(len(units), tuple(pieces), size, rows))
        return tuple(units)

    @property
    def bytes(self) -> int:
        """Of the files."""
        return sum(laid.file.bytes for laid in self.rows.laid)

    def count(self) -> int:
        """How many rows there are; where footers do not tell it, by the beginning of a file."""
        if all(unit.rows for unit in self.all):
            return sum(unit.rows for unit in self.all)
        laid = self.rows.laid[0]
        end = min(laid.file.bytes, LINE_BYTES)
        if laid.kind in LINES:
            lines = lines_between(self.rows, laid.file, 0, end)
            rows = lines.count(b"\n") + (not lines.endswith(b"\n"))
            return round(rows * self.bytes / max(len(lines), 1))
        rows = sum(self.rows.open(laid).groups)
        return round(rows * self.bytes / max(laid.file.bytes, 1))

    def read(self, unit: Unit) -> Iterator[Some]:
        """The rows of a unit, some megabytes at a time."""
        for piece in unit.pieces:
            laid = self.rows.laid[piece.file]
            name = self.rows.where(laid)
            if piece.end:
                table: TableFile = self._lines(laid, piece)
                name = f"{name}, from byte {piece.first:,} on" if piece.first else name
            else:
                table = self.rows.open(laid)
            if not table.groups[piece.group]:
                continue
            types = self.types or self.rows.types_of(laid, table.schema)
            for batch in self.rows.batches(laid, table, piece.group, types):
                for some in _cut(batch):
                    yield Some(some, name)

    def _pieces(self, number: int) -> list[tuple[Piece, int, int]]:
        """(piece, bytes, rows) of a file, in its order."""
        laid = self.rows.laid[number]
        if laid.kind == PARQUET:
            table = self.rows.open(laid)
            assert isinstance(table, ParquetTable)
            return [
                (Piece(number, group), table.bytes_of(group), rows)
                for group, rows in enumerate(table.groups)
                if rows
            ]
        size = laid.file.bytes
        if laid.kind not in LINES or size <= UNIT_BYTES:
            return [(Piece(number), size, 0)]
        edges = [*range(0, size, UNIT_BYTES), size]
        return [
            (Piece(number, first=first, end=end), end - first, 0) for first, end in pairwise(edges)
        ]

    def _lines(self, laid: LaidFile, piece: Piece) -> TableFile:
        """The lines that begin in a range; a column that none of them has is null there.

        The first range must have all columns.
        """
        content = lines_between(self.rows, laid.file, piece.first, piece.end)
        found = lines_table(self.rows.files, laid.file, content, self.rows.ref.columns)
        if not piece.first:
            self.rows.check(laid, found)
            return found
        table = found.table
        there = {*table.schema.names, *self.rows.given(laid, table.schema.names)}
        for name in dict.fromkeys(self.rows.names.values()):
            if name not in there:
                table = table.append_column(name, pa.nulls(table.num_rows))
        return WholeTable(table)


def lines_between(rows: FileRows, file: DataFile, first: int, end: int) -> bytes:
    """The lines of a file that begin from the byte `first` on and before `end`, whole."""
    start = max(first - 1, 0)
    content = rows.files.read(file, start, end - start)
    if first:
        newline = content.find(b"\n")
        if newline < 0:
            return b""  # a line that began before and goes on
        content = content[newline + 1 :]
    pieces = [content]
    if not content:
        return b""
    while not pieces[-1].endswith(b"\n") and end < file.bytes:
        count = min(LINE_BYTES, file.bytes - end)
        more = rows.files.read(file, end, count)
        newline = more.find(b"\n")
        pieces.append(more if newline < 0 else more[: newline + 1])
        end += count
    return b"".join(pieces)


def _cut(batch: Batch) -> Iterator[Batch]:
    """A batch in pieces of some megabytes."""
    rows = len(next(iter(batch.columns.values())))
    size = sum(column.nbytes for column in batch.columns.values())
    at_once = max(1, rows * BATCH_BYTES // max(size, 1))
    for first in range(0, rows, at_once):
        columns = {key: column.slice(first, at_once) for key, column in batch.columns.items()}
        yield Batch(batch.first + first, columns)
