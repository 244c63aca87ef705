"""A data set as parts: what is read, scored, cached and shuffled as one.

A `Source` tells its `Table` from a listing and the files' ends, without reading rows, and then
gives the rows of one part at a time. So memory does not grow with the data. `Held` is the source of
rows that are in memory already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from raykd.data.rows import SPLITS, Dataset, Rows, Unfit, described
from raykd.targets import UNLABELLED

PLACE_BITS = 24  # of a row id; those above are the part's number
MOST_ROWS = 1 << PLACE_BITS  # of a part


class Part(NamedTuple):
    """Some rows of one split, about 16 MiB of them, that lie together in a file."""

    number: int  # over all splits; its rows have the ids number << 24 | place
    split: str
    rows: int
    labelled: int  # rows with a label
    file: str  # its name below the source; empty where rows are in memory
    group: int  # the row group in the file

    @property
    def first_id(self) -> int:
        """The id of its first row."""
        return self.number << PLACE_BITS


@dataclass(frozen=True)
class Table:
    """What is known of a data set before any row is read.

    Parts of a split ascend, and so do the ids of their rows.

    Example:
        >>> parts = (Part(0, "train", 5, 5, "a", 0), Part(1, "val", 2, 2, "b", 0))
        >>> shape = {"channels": 3, "classes": 2, "steps": 8}
        >>> table = Table("rows", "series", ("left", "right"), shape, "0123", parts)
        >>> table.rows("train"), [part.file for part in table.of("val")]
        (5, ['b'])
    """

    name: str
    kind: Literal["series", "tokens"]
    classes: tuple[str, ...]  # for tokens, the tokeniser's
    shape: dict[str, int]  # the sizes that a model is built for: channels, classes and steps
    digest: str  # hex sha256 of everything that a result can depend on
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()  # what a reader of results must know of these rows
    labels: int = 0  # of training rows; for tokens, those that are learned
    class_counts: tuple[int, ...] = ()  # training rows with a label, by class; empty for tokens
    unfit: tuple[Unfit, ...] = ()  # the rows that were left out

    @property
    def is_text(self) -> bool:
        return self.kind == "tokens"

    @property
    def in_parts(self) -> bool:
        """Whether training rows are read in parts, and not held in memory."""
        return any(part.file for part in self.parts)

    @property
    def cautions(self) -> list[str]:
        return list(self.notes)

    def of(self, split: str) -> tuple[Part, ...]:
        """The parts of a split, in their order."""
        return tuple(part for part in self.parts if part.split == split)

    def rows(self, split: str) -> int:
        """How many rows a split has."""
        return sum(part.rows for part in self.of(split))

    @property
    def rows_of_splits(self) -> dict[str, int]:
        """How many rows each split has."""
        return {split: self.rows(split) for split in SPLITS if self.of(split)}

    @property
    def rows_of_parts(self) -> dict[str, list[int]]:
        """How many rows each part has, by its split."""
        return {split: [part.rows for part in self.of(split)] for split in self.rows_of_splits}

    def labelled(self, split: str) -> int:
        """How many rows of a split have a label."""
        return sum(part.labelled for part in self.of(split))

    def describe(self) -> str:
        """One line: rows, classes, splits and digest."""
        return described(self, self.rows_of_splits)


class Source(Protocol):
    """Rows that can be read in parts.

    A source can be sent to other processes, which then read by themselves.
    """

    def table(self) -> Table:
        """What the parts are; it costs a listing and the files' ends."""
        ...

    def read(self, part: Part) -> Rows:
        """The checked rows of one part; their ids ascend within a split."""
        ...


@dataclass(frozen=True)
class Held:
    """Rows in memory as a source: a part for each split, with the ids that they have."""

    dataset: Dataset

    def table(self) -> Table:
        return self._table

    def read(self, part: Part) -> Rows:
        return self.dataset.splits[part.split]

    @cached_property
    def _table(self) -> Table:
        parts = [
            Part(number, split, len(rows), int(rows.labelled.sum()), "", 0)
            for number, split in enumerate(SPLITS)
            if (rows := self.dataset.splits.get(split)) is not None
        ]
        return Table(
            name=self.dataset.name,
            kind="tokens" if self.dataset.is_text else "series",
            classes=self.dataset.classes,
            shape=self.dataset.shape,
            digest=self.dataset.digest,
            parts=tuple(parts),
            notes=tuple(self.dataset.cautions),
            labels=self.dataset.labels,
            class_counts=_class_counts(self.dataset),
            unfit=self.dataset.unfit,
        )


def _class_counts(dataset: Dataset) -> tuple[int, ...]:
    """(C,): training rows with a label of each class; empty for text."""
    if dataset.is_text:
        return ()
    label = dataset.splits["train"].label
    counts = np.bincount(label[label != UNLABELLED], minlength=len(dataset.classes))
    return tuple(counts.tolist())


def in_memory(source: Source) -> Dataset:
    """What of a source is in memory: all of it, or the splits that are measured on.

    Of a source in parts there is no training split, and so no digest; its table has it.
    """
    if isinstance(source, Held):
        return source.dataset
    table = source.table()
    splits = {split: read_split(source, split) for split in ("val", "test")}
    return Dataset(table.name, table.classes, splits, table.notes)


def joined(pieces: Sequence[Rows]) -> Rows:
    """The rows of several parts of one split, in the order given."""
    if len(pieces) == 1:
        return pieces[0]
    arrays: dict[str, Any] = {
        key: None if value is None else np.concatenate([getattr(rows, key) for rows in pieces])
        for key, value in vars(pieces[0]).items()
    }
    return Rows(**arrays)


def first_rows(source: Source, split: str) -> Rows:
    """The rows of a split's first part, as a sample of all."""
    return source.read(source.table().of(split)[0])


def read_split(source: Source, split: str) -> Rows:
    """All rows of a split, in memory."""
    return joined([source.read(part) for part in source.table().of(split)])
