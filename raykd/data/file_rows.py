"""The rows of a source's files: which columns, of which types, and from where."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raykd.data import arrow_columns, labels
from raykd.data.blocks import MISSING, Block
from raykd.data.column_names import NEXT, check_no_labels, column_names
from raykd.data.datasets_folder import is_class_label, without_missing
from raykd.data.formats import TableFile, open_table
from raykd.data.layout import LaidFile, data_files
from raykd.data.sentences import Texts
from raykd.errors import DataError
from raykd.files.data_files import DataFiles
from raykd.files.waiting import in_turn
from raykd.recipe.tables import DataRef, Task
from raykd.recipe.validation import suggestion

REQUESTS = 64  # at a time, to a bucket
PLAIN = ("split", "label", "group")  # the keys of columns whose types must agree in all files


class Batch(NamedTuple):
    """Some rows of one file by key of `data.columns`; `first` is the number of the first in it."""

    first: int
    columns: dict[str, pa.Array]


@dataclass(frozen=True)
class FileRows:
    """The files of a source, and how their rows are read."""

    files: DataFiles
    ref: DataRef
    task: Task = NEXT

    @cached_property
    def names(self) -> dict[str, str]:
        """The columns to read, by key."""
        return column_names(self.ref, self.task)

    @cached_property
    def laid(self) -> list[LaidFile]:
        """The files, in their order."""
        return data_files(self.files, self.ref, set(self.names.values()))

    def where(self, laid: LaidFile) -> str:
        """A file's path for messages."""
        return f"{self.files}/{laid.file.name}"

    def open(self, laid: LaidFile) -> TableFile:
        """A file that has all columns, or whose path says them. DataError names it otherwise."""
        table = open_table(self.files, laid.file, laid.kind, self.ref.columns)
        self.check(laid, table)
        return table

    def check(self, laid: LaidFile, table: TableFile) -> None:
        """DataError where a file lacks a column that its path does not say either."""
        there = table.schema.names
        check_no_labels(there, self.ref, self.task)
        given = self.given(laid, there)
        for key, name in self.names.items():
            if there.count(name) > 1:
                raise DataError(
                    f"{self.where(laid)}: two columns are called {name!r}; rename one of them"
                )
            if name in there:
                arrow_columns.check_type(table.schema.field(name).type, name, self.where(laid))
            elif name not in given:
                raise self._missing(laid, there, key)

    def open_all(self) -> list[TableFile]:
        """All files, many at a time where they are far."""
        return list(in_turn(self.open, self.laid, self.requests))

    @property
    def requests(self) -> int:
        """How many small reads are made at a time."""
        return REQUESTS if self.files.is_remote else 1

    def agreed(self, tables: Sequence[TableFile]) -> pa.Schema:
        """The types of the plain columns in all files. DataError names one that differs."""
        agreed = pa.schema([])
        for laid, table in zip(self.laid, tables, strict=True):
            try:
                types = self.types_of(laid, table.schema)
                agreed = pa.unify_schemas([agreed, types], promote_options="permissive")
            except pa.ArrowException as error:
                raise DataError(
                    f"data.source {self.files}: the files' columns differ in type: those of "
                    f"{laid.file.name} from those before it: {error}"
                ) from None
        label = self.names.get("label")
        told = [*(table.schema.names for table in tables), *(laid.values for laid in self.laid)]
        if label and not any(label in names for names in told):
            raise self._missing(self.laid[0], tables[0].schema.names, "label")
        return agreed

    def batches(
        self,
        laid: LaidFile,
        table: TableFile,
        group: int,
        types: pa.Schema,
        keys: Collection[str] | None = None,
    ) -> Iterator[Batch]:
        """The rows of a group of a file; of all columns, or of those with some `keys`.

        DataError where a column denies what a path says.
        """
        first = sum(table.groups[:group])
        given = self.given(laid, table.schema.names)
        names = {key: name for key, name in self.names.items() if keys is None or key in keys}
        for batch in table.batches(group, list(dict.fromkeys(names.values()))):
            columns = {}
            for key, name in names.items():
                if name in batch.schema.names:
                    column = batch.column(name)
                    if key == "label" and is_class_label(table.schema, name):
                        column = without_missing(column)
                    if name in given:
                        self._check_agrees(laid, column, name, given[name], first)
                else:
                    column = pa.repeat(self._scalar(name, given[name]), batch.num_rows)
                if key in PLAIN:
                    column = _cast(column, types.field(name).type)
                columns[key] = column
            yield Batch(first, columns)
            first += batch.num_rows

    def given(self, laid: LaidFile, there: Sequence[str]) -> dict[str, str | None]:
        """What a file's path says of the columns.

        The split of its name counts only where no column says it. Files of the training split may
        have no labels.
        """
        columns = self.ref.columns
        values = dict(laid.values)
        if laid.split and columns.split not in there:
            values.setdefault(columns.split, laid.split)
        is_near = get_close_matches(columns.label, there, n=1)  # a misspelt name is told
        if values.get(columns.split) == "train" and columns.label not in there and not is_near:
            values.setdefault(columns.label, None)
        return values

    @cached_property
    def _integers(self) -> set[str]:
        """The columns that folders give, and give integers in all of them."""
        return {
            column
            for column in self.names.values()
            if all(labels.is_integer(laid.values.get(column) or "0") for laid in self.laid)
        }

    def _scalar(self, column: str, value: str | None) -> pa.Scalar:
        """What a path gives as a column."""
        if value is None:
            return pa.scalar(None)
        is_integer = column in self._integers and labels.is_integer(value)
        return pa.scalar(int(value) if is_integer else value)

    def types_of(self, laid: LaidFile, schema: pa.Schema) -> pa.Schema:
        """The types of a file's plain columns."""
        given = self.given(laid, schema.names)
        types = {}
        for key in PLAIN:
            name = self.names.get(key)
            if name in schema.names:
                types[name] = arrow_columns.plain_type(schema.field(name).type)
            elif name is not None:
                types[name] = self._scalar(name, given[name]).type
        return pa.schema(list(types.items()))

    def _check_agrees(
        self, laid: LaidFile, column: pa.Array, name: str, value: str | None, first: int
    ) -> None:
        found = arrow_columns.distinct(column)
        wrong = [i for i, own in enumerate(found.values) if str(own) != value]
        if value is not None:
            wrong.append(MISSING)
        differs = np.isin(found.index, wrong)
        if not differs.any():
            return
        row = int(differs.argmax())
        own = column[row].as_py()
        raise DataError(
            f"{self.where(laid)}: row {first + row} has {name} {own!r}, and its folder says "
            f"{name}={value}; mend one of them, or rename the folder"
        )

    def _missing(self, laid: LaidFile, there: Sequence[str], key: str) -> DataError:
        name = self.names[key]
        return DataError(
            f"{self.where(laid)}: no column {name!r} (data.columns.{key}).{suggestion(name, there)}"
        )


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column in the type that it has in all files together."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if column.type == kind else column.cast(kind)


def block_of(batch: Batch, name: str, texts: Texts | None = None) -> Block:
    """The block of a file's rows; `name` begins messages. With `texts` rows are sentences."""
    columns = batch.columns
    first = batch.first
    if texts is None:
        inputs, unfit = arrow_columns.series(columns["inputs"], name, first)
    else:
        inputs, unfit = texts.inputs(columns["text"].to_pylist(), first)
    valence = None
    if "valence" in columns:
        valence = arrow_columns.step_values(columns["valence"], name, first)
    return Block(
        first=first,
        inputs=inputs,
        label=arrow_columns.class_names(columns["label"], name, first),
        split=arrow_columns.distinct(columns["split"]),
        group=arrow_columns.groups(columns["group"]) if "group" in columns else None,
        valence=valence,
        unfit=unfit,
    )
