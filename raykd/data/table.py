"""A data set as parts: what is read, scored, cached and shuffled as one.

A `Source` tells its `Table` from a listing and the files' ends, without reading rows, and then
gives the rows of one part at a time. So memory does not grow with the data. `Held` is the source of
rows that are in memory already.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from raykd.data.rows import SPLITS, Dataset, Rows, Unfit, described
from raykd.targets import UNLABELLED

PLACE_BITS = 24  # of a row id; those above are the part's number
MOST_ROWS = 1 << PLACE_BITS  # of a part
SAMPLE_ROWS = 4096  # of a split in parts that are in memory, at most,
SAMPLE_BYTES = 64 << 20  # unless those of fewer come to so much


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
    kind: Literal["series", "tokens", "sentences"]
    classes: tuple[str, ...]  # for tokens, the tokeniser's
    # The sizes that a model is built for: channels, classes and steps, and of sentences tokens.
    shape: dict[str, int]
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
    def is_sentences(self) -> bool:
        return self.kind == "sentences"

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
            kind=_kind_of(self.dataset),
            classes=self.dataset.classes,
            shape=self.dataset.shape,
            digest=self.dataset.digest,
            parts=tuple(parts),
            notes=tuple(self.dataset.cautions),
            labels=self.dataset.labels,
            class_counts=_class_counts(self.dataset),
            unfit=self.dataset.unfit,
        )


def _kind_of(dataset: Dataset) -> Literal["series", "tokens", "sentences"]:
    if dataset.is_text:
        return "tokens"
    return "sentences" if dataset.is_sentences else "series"


def _class_counts(dataset: Dataset) -> tuple[int, ...]:
    """(C,): training rows with a label of each class; empty for text."""
    if dataset.is_text:
        return ()
    label = dataset.splits["train"].label
    counts = np.bincount(label[label != UNLABELLED], minlength=len(dataset.classes))
    return tuple(counts.tolist())


def in_memory(source: Source) -> Dataset:
    """What of a source is in memory: all of it, or the first rows of the splits that are measured
    on.

    Of a source in parts there is no training split, and so no digest; its table has it.
    """
    if isinstance(source, Held):
        return source.dataset
    table = source.table()
    splits = {split: _sample(source, split) for split in ("val", "test")}
    return Dataset(table.name, table.classes, splits, table.notes)


def after(source: Source, split: str, rows: int) -> Iterator[Rows]:
    """The rows of a split behind the first `rows`, part by part."""
    seen = 0
    for part in source.table().of(split):
        seen += part.rows
        if seen > rows:
            skipped = max(rows - (seen - part.rows), 0)
            yield source.read(part).take(slice(skipped, None))


def _sample(source: Source, split: str) -> Rows:
    """The first rows of a split: SAMPLE_ROWS, or those of the parts that come to SAMPLE_BYTES."""
    pieces: list[Rows] = []
    size = 0
    for part in source.table().of(split):
        if sum(map(len, pieces)) >= SAMPLE_ROWS or size >= SAMPLE_BYTES:
            break
        pieces.append(source.read(part))
        size += pieces[-1].inputs.nbytes
    return joined(pieces).take(slice(0, SAMPLE_ROWS))


class RowsDigest:
    """The digest of a split's rows, added part by part; the same for any parts of equal rows.

    Example:
        >>> rows = Rows(*(np.zeros((2, 3, 4)[: n + 1]) for n in (0, 2, 1, 0, 0)))
        >>> whole, halves = RowsDigest(("a",)), RowsDigest(("a",))
        >>> whole.add(rows)
        >>> halves.add(rows.take([0]))
        >>> halves.add(rows.take([1]))
        >>> whole.hexdigest() == halves.hexdigest()
        True
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self.states: dict[str, Any] = {}

    def add(self, rows: Rows) -> None:
        """Count the rows of a part."""
        for name, values in vars(rows).items():
            if values is not None:
                kind = f"{name} {values.dtype} {values.shape[1:]}"
                state = self.states.setdefault(kind, hashlib.sha256())
                state.update(np.ascontiguousarray(values).data)

    def hexdigest(self) -> str:
        """Hex sha256 of all arrays so far, and of the classes."""
        arrays = {name: state.hexdigest() for name, state in self.states.items()}
        told = json.dumps([self.classes, arrays], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


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
