"""Parquet as parts that are read where they lie: a part is a row group.

The table costs a listing, the files' footers, and the column of labels. Rows are read when a part
is asked for, as ranges of bytes. Every row group must hold one split, and fit into memory at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.data import arrow_columns, label_draw, label_scan
from raykd.data.blocks import (
    MISSING,
    Block,
    Encoded,
    Padding,
    check_steps,
    check_valence,
    group_number,
    kept_places,
)
from raykd.data.file_rows import FileRows, block_of
from raykd.data.formats import ParquetTable, TableFile
from raykd.data.held import classes_of
from raykd.data.layout import PARQUET, LaidFile
from raykd.data.rows import SPLITS, Rows, check_counts, check_rows
from raykd.data.table import MOST_ROWS, Part, Table
from raykd.data.text import split_names
from raykd.errors import DataError
from raykd.files.digests import digest_of
from raykd.files.waiting import in_turn
from raykd.recipe.digest import data_identity
from raykd.targets import UNLABELLED

Ints = NDArray[np.int64]
GROUP_BYTES = 64 << 20  # of a row group's rows, at most
READERS = 8  # whole columns of inputs that are read at a time
MIB = 1 << 20


class Group(NamedTuple):
    """A row group of one split, and which of the split's rows it holds."""

    laid: LaidFile
    number: int
    split: str
    rows: int
    first: int  # the rows of its file before it
    start: int  # the rows of its split before it,
    total: int  # and all of them


class Known(NamedTuple):
    """What is found out once, and then needed to read a part."""

    table: Table
    groups: tuple[Group, ...]  # by the number of the part
    types: pa.Schema  # of the plain columns in all files together
    cutoffs: NDArray[np.uint64] | None  # of each class, where labels are hidden


@dataclass(frozen=True)
class ParquetParts:
    """The source of Parquet files whose row groups are read as parts.

    Sent to another process it takes along what it knows; nothing is listed or scanned again there.
    """

    rows: FileRows

    def table(self) -> Table:
        return self._known.table

    def read(self, part: Part) -> Rows:
        known = self._known
        group = known.groups[part.number]
        name = self.rows.where(group.laid)
        opened = ParquetTable(self.rows.files, group.laid.file)
        batches = self.rows.batches(group.laid, opened, group.number, known.types)
        padding = Padding(
            part.rows,
            known.table.shape["steps"],
            known.table.shape["channels"],
            has_valence="valence" in self.rows.names,
        )
        place = self._kept(group)
        for batch in batches:
            block = block_of(batch, name)
            self._check(block, known.table, name)
            first = block.first - group.first
            keeps = np.isin(np.arange(first, first + len(block)), place)
            self._fill(padding, block, part, keeps)
        where = f"{name}, row group {group.number}"
        numbered = replace(padding.rows, row_id=group.first + place)
        check_rows(where, numbered, len(known.table.classes))
        return padding.rows

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_known": self._known}

    # what is found out

    @cached_property
    def _known(self) -> Known:
        for laid in self.rows.laid:
            if laid.kind != PARQUET:
                raise DataError(
                    f"{self.rows.where(laid)}: only Parquet is read in parts where it lies; "
                    "write its rows as Parquet"
                )
        opened = self.rows.open_all()
        types = self.rows.agreed(opened)
        name = self.rows.files.name
        groups = self._groups(opened, name)
        shape = self._shape(groups)
        labels = label_scan.scan(self._labels(groups, types), name, self.rows.ref)
        parts = []
        for number, group in enumerate(groups):
            rows = len(self._kept(group))
            labelled = labels.labelled[number]
            if rows:  # a limit may leave none of a part
                file = group.laid.file.name
                parts.append(Part(number, group.split, rows, labelled, file, group.number))
        table = Table(
            name=name,
            kind="series",
            classes=labels.classes,
            shape={"channels": shape[1], "classes": len(labels.classes), "steps": shape[0]},
            digest=self._digest(),
            parts=tuple(parts),
            notes=labels.notes,
            labels=sum(labels.counts),
            class_counts=labels.counts,
        )
        for part in SPLITS:
            labelled = sum(one.labelled for one in table.of(part))
            check_counts(name, part, table.rows(part), labelled)
        return Known(table, tuple(groups), types, labels.cutoffs)

    def _digest(self) -> str:
        files = self.rows.files
        listed = [laid.file for laid in self.rows.laid]
        marks = in_turn(files.mark, listed, READERS)
        told = [[file.name, file.bytes, mark] for file, mark in zip(listed, marks, strict=True)]
        return digest_of({"files": told, "data": data_identity(self.rows.ref)})

    def _groups(self, opened: Sequence[TableFile], name: str) -> list[Group]:
        """The row groups with their splits, in the order of the splits and then of the files."""
        found: dict[str, list[Group]] = {split: [] for split in SPLITS}
        totals: dict[str, int] = dict.fromkeys(SPLITS, 0)
        for laid, table in zip(self.rows.laid, opened, strict=True):
            assert isinstance(table, ParquetTable)
            first = 0
            for number, rows in enumerate(table.groups):
                if rows:
                    self._check_size(laid, table, number)
                    split = self._split_of(laid, table, number)
                    group = Group(laid, number, split, rows, first, start=totals[split], total=0)
                    found[split].append(group)
                    totals[split] += rows
                    first += rows
        for split, total in totals.items():
            check_counts(name, split, total, total)
        return [group._replace(total=totals[split]) for split in SPLITS for group in found[split]]

    def _check_size(self, laid: LaidFile, table: ParquetTable, number: int) -> None:
        """DataError if a row group is too large to be read at once."""
        rows = table.groups[number]
        size = self.size_of(table, number)
        if size <= GROUP_BYTES and rows <= MOST_ROWS:
            return
        fewer = max(1, min(rows * GROUP_BYTES // (4 * size), MOST_ROWS))
        raise DataError(
            f"{self.rows.where(laid)}: row group {number} holds {rows:,} rows of "
            f"{size / MIB:,.0f} MiB, and at most {GROUP_BYTES / MIB:.0f} MiB are read at once; "
            f"write the file again in smaller ones: pq.write_table(..., row_group_size={fewer})"
        )

    def size_of(self, table: ParquetTable, number: int) -> int:
        """The bytes that a row group takes in memory, about."""
        return max(table.values_of(number, self.rows.names["inputs"]) * 4, table.bytes_of(number))

    def told_split(self, laid: LaidFile, table: ParquetTable, number: int) -> str | None:
        """What all rows of a group have as their split, by the file's path or the footer's
        statistics; None where they have several, or the footer does not say it.
        """
        column = self.rows.names["split"]
        given = self.rows.given(laid, table.schema.names)
        if column in given:
            return str(given[column])
        [chunk] = table.chunks(number, [column])
        told = chunk.statistics
        if told is None or not told.has_min_max or told.min != told.max or told.null_count:
            return None
        return told.min.decode() if isinstance(told.min, bytes) else str(told.min)

    def _split_of(self, laid: LaidFile, table: ParquetTable, number: int) -> str:
        """The split that all rows of a group have. DataError where it is not known."""
        where = f"{self.rows.where(laid)}, row group {number}"
        told = self.told_split(laid, table, number)
        if told is None:
            column = self.rows.names["split"]
            raise DataError(
                f"{where}: its footer does not say that all of its rows have one {column!r}; write "
                "a file for each split and name them under data.splits, or sort the rows by it"
            )
        return split_names([told], where, self.rows.ref)[0]

    def _shape(self, groups: Sequence[Group]) -> tuple[int, int]:
        """(steps, channels) of padded rows.

        Rows are of one length where every footer counts as many values as the first group's rows
        have. Where not, `data.steps` tells the most, or all inputs are looked through.
        """
        first = groups[0]
        blocks = list(self._inputs(first))
        channels = next((b.inputs.values.shape[1] for b in blocks if len(b.inputs.values)), 0)
        if self.rows.ref.steps:
            return self.rows.ref.steps, channels
        length = np.concatenate([block.inputs.length for block in blocks])
        steps = int(length.max())
        name = self.rows.names["inputs"]
        is_even = (length == steps).all() and all(
            self._opened(group).values_of(group.number, name) == group.rows * steps * channels
            for group in groups
        )
        if is_even:
            return steps, channels
        longest = in_turn(self._longest, groups, READERS if self.rows.files.is_remote else 1)
        return max(longest), channels

    def _longest(self, group: Group) -> int:
        return max(int(block.inputs.length.max()) for block in self._inputs(group))

    def _inputs(self, group: Group) -> Iterator[Block]:
        """The rows of a group as to their inputs alone."""
        name = self.rows.where(group.laid)
        table = self._opened(group)
        empty = pa.schema([])
        for batch in self.rows.batches(group.laid, table, group.number, empty, ("inputs",)):
            inputs, unfit = arrow_columns.series(batch.columns["inputs"], name, batch.first)
            missing = Encoded([], np.full(len(inputs.length), MISSING))
            yield Block(batch.first, inputs, label=missing, split=missing, unfit=unfit)

    def _labels(self, groups: Sequence[Group], types: pa.Schema) -> Iterator[tuple[str, Encoded]]:
        """The split of each group, and the classes of its rows that are used."""

        def read(group: Group) -> Encoded:
            column = self._label_column(group, types)
            return replace(column, index=column.index[self._kept(group)])

        found = in_turn(read, groups, self.rows.requests)
        for group, column in zip(groups, found, strict=True):
            yield group.split, column

    def _label_column(self, group: Group, types: pa.Schema) -> Encoded:
        """The classes of a group's rows; no other column is read."""
        name = self.rows.where(group.laid)
        table = self._opened(group)
        found = [
            arrow_columns.class_names(batch.columns["label"], name, batch.first)
            for batch in self.rows.batches(group.laid, table, group.number, types, ("label",))
        ]
        values = list(dict.fromkeys(value for column in found for value in column.values))
        number = {value: i for i, value in enumerate(values)}
        return Encoded(values, np.concatenate([one.mapped(number, MISSING) for one in found]))

    def _opened(self, group: Group) -> ParquetTable:
        return ParquetTable(self.rows.files, group.laid.file)

    # rows

    def _kept(self, group: Group) -> Ints:
        """The places in a group of the rows that `data.limit` leaves."""
        return kept_places(self.rows.ref.limit, group.start, group.rows, group.total)

    def _check(self, block: Block, table: Table, name: str) -> None:
        """DataError names the first row that cannot be one of a part."""
        if block.unfit:
            unfit = block.unfit[0]
            raise DataError(
                f"{name}: row {unfit.row} {unfit.why}; of rows that are read in parts none can be "
                "left out: drop it from the file"
            )
        check_steps(block.inputs.length, table.shape["steps"], block.first, name)
        check_valence(block, name)
        channels = block.inputs.values.shape[1]
        if channels != table.shape["channels"]:
            raise DataError(
                f"{name}: the steps of row {block.first} have {channels} channels, and those of "
                f"the first part {table.shape['channels']}; give all rows one count"
            )
        told = self.rows.ref.model_copy(update={"classes": list(table.classes)})
        classes_of(block.label.values, name, told)

    def _fill(self, padding: Padding, block: Block, part: Part, keeps: NDArray[np.bool_]) -> None:
        """Put those rows of a block that are kept into a part's."""
        known = self._known
        row_id = part.first_id + padding.filled + np.arange(int(keeps.sum()))
        number_of = {label: number for number, label in enumerate(known.table.classes)}
        label = block.label.mapped(number_of, UNLABELLED)[keeps]
        if known.cutoffs is not None and part.split == "train":
            seed = self.rows.ref.label_seed
            stays = label_draw.stays(row_id, np.maximum(label, 0), known.cutoffs, seed)
            label = np.where(stays, label, UNLABELLED)
        group = row_id
        if block.group is not None:
            hashed = {key: group_number(key) for key in block.group.values}
            group = block.group.mapped(hashed, MISSING)[keeps]
            group = np.where(group == MISSING, row_id, group)
        padding.fill(block.where(keeps), row_id=row_id, label=label, group=group)


def can_be_read_in_place(rows: FileRows) -> bool:
    """Whether files are Parquet whose row groups are parts already: small, and of one split."""
    if any(laid.kind != PARQUET for laid in rows.laid):
        return False
    parts = ParquetParts(rows)
    for laid, table in zip(rows.laid, rows.open_all(), strict=True):
        assert isinstance(table, ParquetTable)
        for number, count in enumerate(table.groups):
            is_small = parts.size_of(table, number) <= GROUP_BYTES and count <= MOST_ROWS
            if count and not (is_small and parts.told_split(laid, table, number) is not None):
                return False
    return True
