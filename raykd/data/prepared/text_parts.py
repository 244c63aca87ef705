"""Parts of text: documents as their tokens, 2 or 4 bytes each, and how rows come out of them.

A part holds whole documents, or fragments of a long one. Training rows hold several documents, so a
row that begins in one part may end in the next: what a part gives are the rows that begin in it.
Rows are those of the same texts in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.data.blocks import MISSING, group_number
from raykd.data.prepared.folder import PartTable
from raykd.data.rows import Rows
from raykd.data.text import Document, laid_out

PART_TOKENS = 1 << 20  # of a part, about; as rows they take 17 MiB
SMALL = 1 << 16  # tokens that two bytes number


class Fragment(NamedTuple):
    """A document, or a piece of a long one; `has_more` says that the next one continues it.

    Both then have the token that lies between them: the label of the first's last step.
    """

    document: Document
    has_more: bool = False

    @property
    def steps(self) -> int:
        return len(self.document.tokens) - 1


class Layout(NamedTuple):
    """Which training rows begin in a part: so many, behind what ends a row of the part before."""

    rows: int
    skip: int  # steps of documents, or, where rows hold whole documents, documents


class TextParts:
    """Documents of one unit that are gathered, by split, until they make a part."""

    def __init__(self, count: int, window: int, unit: int, *, whole: bool):
        self.kind = pa.uint16() if count <= SMALL else pa.uint32()
        self.window = window
        self.unit = unit
        self.whole = whole
        self.open: dict[str, list[Fragment]] = {}
        self.sizes: dict[str, int] = {}
        self.count = 0  # of documents

    def add(self, split: str, document: Document) -> Iterator[PartTable]:
        """Add a document; gives the parts that are full with it."""
        tokens = document.tokens
        if self.whole:  # what the window cuts is never read
            document = replace(document, tokens=tokens[: self.window + 1])
        self.count += 1
        for fragment in self._fragments(split, document):
            self.open.setdefault(split, []).append(fragment)
            self.sizes[split] = self.sizes.get(split, 0) + len(fragment.document.tokens)
            if self.sizes[split] >= PART_TOKENS:
                yield self._part(split)

    def rest(self) -> Iterator[PartTable]:
        """The parts that are not full."""
        for split in [split for split, some in self.open.items() if some]:
            yield self._part(split)

    def _fragments(self, split: str, document: Document) -> Iterator[Fragment]:
        """A document of the training split in pieces of a part's size, others whole."""
        steps = len(document.tokens) - 1
        if split != "train" or self.whole or steps <= PART_TOKENS:
            yield Fragment(document)
            return
        group = document.group
        if group == MISSING:  # its pieces may lie in several parts
            group = group_number(("document", f"{self.unit} {self.count}"))
        for first in range(0, steps, PART_TOKENS):
            tokens = document.tokens[first : first + PART_TOKENS + 1]
            yield Fragment(Document(tokens, group=group), first + PART_TOKENS < steps)

    def _part(self, split: str) -> PartTable:
        fragments = self.open[split]
        self.open[split] = []
        self.sizes[split] = 0
        facts: dict[str, Any] = {
            "documents": len(fragments),
            "steps": sum(fragment.steps for fragment in fragments),
        }
        if self.whole:
            facts["labels"] = sum(
                fragment.steps - fragment.document.first_label + 1 for fragment in fragments
            )
        if split != "train":
            facts["rows"] = sum(-(-fragment.steps // self.window) for fragment in fragments)
        elif self.whole:
            facts["lengths"] = [fragment.steps for fragment in fragments]
        return PartTable(split, table_of(fragments, self.kind), facts)


def table_of(fragments: Sequence[Fragment], kind: pa.DataType) -> pa.Table:
    """Fragments as a table without nulls."""
    tokens = [fragment.document.tokens for fragment in fragments]
    ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    values = pa.array(np.concatenate(tokens).astype(kind.to_pandas_dtype()), kind)
    columns = {
        "tokens": pa.ListArray.from_arrays(pa.array(ends), values),
        "first_label": pa.array([one.document.first_label for one in fragments], pa.int32()),
        "group": pa.array([one.document.group for one in fragments], pa.int64()),
        "has_more": pa.array([int(one.has_more) for one in fragments], pa.uint8()),
    }
    return pa.table(columns)


def fragments_of(table: pa.Table, first_id: int) -> list[Fragment]:
    """The fragments of a table; a document without a group is one of its own, by `first_id`."""
    lists = table.column("tokens").combine_chunks()
    values = lists.flatten().to_numpy().astype(np.int32)
    ends = np.cumsum(lists.value_lengths().to_numpy())
    pieces = np.split(values, ends[:-1])
    group = table.column("group").to_numpy()
    group = np.where(group == MISSING, first_id + np.arange(len(group)), group)
    return [
        Fragment(Document(tokens, first_label, of), bool(has_more))
        for tokens, first_label, of, has_more in zip(
            pieces,
            table.column("first_label").to_pylist(),
            group.tolist(),
            table.column("has_more").to_pylist(),
            strict=True,
        )
    ]


def layouts(parts: Iterable[dict[str, Any]], window: int, *, whole: bool) -> Iterator[Layout]:
    """Which rows begin in each part of the training split, by the parts' records in order."""
    if whole:
        yield from _layouts_of_whole(parts, window)
        return
    steps = 0
    begun = 0  # rows that began in the parts before
    for part in parts:
        skip = begun * window - steps
        steps += part["steps"]
        rows = -(-steps // window) - begun
        begun += rows
        yield Layout(rows, skip)


def _layouts_of_whole(parts: Iterable[dict[str, Any]], window: int) -> Iterator[Layout]:
    """Where a row holds only whole documents, as many as fit."""
    at = 0  # steps of the row that is open, or 0
    for part in parts:
        rows = 0
        skip = 0
        for steps in part["lengths"]:
            if at == 0 or at + steps > window:
                rows += 1
                at = 0
            elif not rows:
                skip += 1
            at = (at + steps) % window
        yield Layout(rows, skip)


@dataclass(frozen=True)
class TrainingRows:
    """The training rows that begin in each part; `read` gives a part's fragments by its number."""

    parts: Sequence[dict[str, Any]]  # with `rows` and `skip`
    read: Callable[[int], Sequence[Fragment]]
    window: int
    whole: bool

    def of(self, number: int, first_id: int) -> Rows:
        """The rows that begin in a part."""
        fragments = self._of_whole(number) if self.whole else self._of_steps(number)
        documents = _joined(fragments)
        return laid_out(documents, self.window, shared=True, whole=self.whole, first_id=first_id)

    def _of_whole(self, number: int) -> list[Fragment]:
        found = list(self.read(number)[self.parts[number]["skip"] :])
        for after in range(number + 1, len(self.parts)):
            part = self.parts[after]
            if part["skip"]:
                found += self.read(after)[: part["skip"]]
            if part["rows"]:
                break
        return found

    def _of_steps(self, number: int) -> list[Fragment]:
        needed = self.parts[number]["rows"] * self.window
        found = _without(self.read(number), self.parts[number]["skip"])
        needed -= sum(fragment.steps for fragment in found)
        for after in range(number + 1, len(self.parts)):
            if needed <= 0:
                break
            some = _first(self.read(after), needed)
            needed -= sum(fragment.steps for fragment in some)
            found += some
        return found


def _without(fragments: Sequence[Fragment], steps: int) -> list[Fragment]:
    """Fragments without their first steps."""
    found = []
    for fragment in fragments:
        gone = min(steps, fragment.steps)
        steps -= gone
        if not gone:
            found.append(fragment)
        elif gone < fragment.steps:
            tokens = fragment.document.tokens[gone:]
            found.append(fragment._replace(document=replace(fragment.document, tokens=tokens)))
    return found


def _first(fragments: Sequence[Fragment], steps: int) -> list[Fragment]:
    """Only the first steps of fragments."""
    found = []
    for fragment in fragments:
        if steps <= 0:
            break
        tokens = fragment.document.tokens[: steps + 1]
        found.append(fragment._replace(document=replace(fragment.document, tokens=tokens)))
        steps -= len(tokens) - 1
    return found


def _joined(fragments: Sequence[Fragment]) -> list[Document]:
    """The documents of fragments, those of one document together."""
    found: list[Document] = []
    pieces: list[NDArray[np.int32]] = []
    for fragment in fragments:
        pieces.append(fragment.document.tokens if not pieces else fragment.document.tokens[1:])
        if not fragment.has_more:
            tokens = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
            found.append(replace(fragment.document, tokens=tokens))
            pieces = []
    if pieces:  # the last row ends within a document
        found.append(Document(np.concatenate(pieces), group=fragments[-1].document.group))
    return found
