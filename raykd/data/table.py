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

from raykd.data.rows import SPLITS, Dataset, Rows

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

    @property
    def is_text(self) -> bool:
        return self.kind == "tokens"

    def of(self, split: str) -> tuple[Part, ...]:
        """The parts of a split, in their order."""
        return tuple(part for part in self.parts if part.split == split)

    def rows(self, split: str) -> int:
        """How many rows a split has."""
        return sum(part.rows for part in self.of(split))


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
        )


def in_memory(source: Source) -> Dataset:
    """What of a source is in memory: all of it, or the splits that are measured on."""
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


def read_split(source: Source, split: str) -> Rows:
    """All rows of a split, in memory."""
    return joined([source.read(part) for part in source.table().of(split)])
