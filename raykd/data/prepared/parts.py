"""The source of prepared rows: its table costs the manifest, and a part one or two files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.data import label_draw, label_scan
from raykd.data.blocks import (
    MISSING,
    Encoded,
    Padding,
    check_steps,
    check_unfit,
    kept_places,
)
from raykd.data.prepared.folder import PreparedFolder
from raykd.data.prepared.series_parts import block_of_part
from raykd.data.prepared.text_parts import Fragment, TrainingRows, fragments_of
from raykd.data.prepared.work import Work
from raykd.data.rows import SPLITS, Rows, Unfit, check_counts, check_rows
from raykd.data.table import PLACE_BITS, Part, Table
from raykd.data.text import cut_name, laid_out
from raykd.errors import DataError
from raykd.files.digests import digest_of
from raykd.recipe.digest import data_identity
from raykd.recipe.tables import DataRef
from raykd.targets import UNLABELLED

KEPT = 4  # files of text whose documents a process keeps, for rows that go on in the next one
Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """A part as it is stored, and which of its split's rows it has."""

    facts: dict[str, Any]  # of the manifest
    split: str
    rows: int  # all of them,
    start: int  # those of the split before them,
    total: int  # and all of the split's


class Known(NamedTuple):
    """What is found out once, and then needed to read a part."""

    table: Table
    pieces: tuple[Piece, ...]  # by the number of the part
    cutoffs: NDArray[np.uint64] | None  # of each class, where labels are hidden


@dataclass(frozen=True)
class PreparedParts:
    """The source of rows that are, or will be, prepared below `work.home`.

    Sent to another process it takes along what it knows; the manifest is not read again there.
    """

    work: Work

    @property
    def ref(self) -> DataRef:
        return self.work.ref

    @property
    def is_ready(self) -> bool:
        """Whether all rows are prepared, and no file was removed or cut since."""
        return "_known" in vars(self) or self.work.folder.manifest() is not None

    def table(self) -> Table:
        return self._known.table

    @property
    def bytes(self) -> int:
        """Of the files of its parts."""
        return sum(piece.facts["bytes"] for piece in self._known.pieces)

    def read(self, part: Part) -> Rows:
        piece = self._known.pieces[part.number]
        if self.ref.tokenizer:
            rows = self._rows_of_text(self._known.pieces, part.number)
        else:
            rows = self._series(part)
        place = self._kept(piece)
        if len(place) < len(rows):
            rows = replace(rows.take(place), row_id=part.first_id + np.arange(len(place)))
        rows = self._hidden(rows, part)
        check_rows(f"{self.work.name}, {part.file}", rows, len(self._known.table.classes))
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"work": self.work, "_known": self._known}

    # what is found out

    @cached_property
    def _known(self) -> Known:
        work = self.work
        manifest = work.folder.manifest()
        if manifest is None:
            raise DataError(
                f"data.source {self.ref.source}: its rows are not prepared yet, or a file of "
                f"{work.folder.address} is gone; type: raykd score RECIPE"
            )
        unfit = tuple(Unfit(*row) for row in manifest["unfit"])
        check_unfit(unfit, manifest["rows"], self.ref.max_unfit, work.name)
        pieces = _pieces(manifest["parts"])
        name = cut_name(work.name, manifest["cut"])
        for split in SPLITS:
            count = sum(piece.rows for piece in pieces if piece.split == split)
            check_counts(name, split, count, count)
        notes = _notes(unfit, manifest["rows"])
        found = self._of_text(pieces) if self.ref.tokenizer else self._of_series(pieces, name)
        parts = []
        for number, piece in enumerate(pieces):
            rows = len(self._kept(piece))
            if rows:  # a limit may leave none of a part
                labelled = found.labelled[number]
                parts.append(Part(number, piece.split, rows, labelled, piece.facts["file"], 0))
        content = [[piece.split, piece.facts["content"]] for piece in pieces]
        table = Table(
            name=name,
            kind="tokens" if self.ref.tokenizer else "series",
            classes=found.classes,
            shape=self._shape(pieces, found.classes),
            digest=digest_of({"parts": content, "data": data_identity(self.ref)}),
            parts=tuple(parts),
            notes=(*notes, *found.notes),
            labels=sum(found.counts),
            class_counts=() if self.ref.tokenizer else found.counts,
            unfit=unfit,
        )
        for split in SPLITS:
            check_counts(name, split, table.rows(split), table.labelled(split))
        return Known(table, tuple(pieces), found.cutoffs)

    def _shape(self, pieces: Sequence[Piece], classes: Sequence[str]) -> dict[str, int]:
        if self.work.shape_of_text:
            return self.work.shape_of_text
        longest = max(piece.facts["longest"] for piece in pieces)
        check_steps(np.array([longest]), self.ref.steps, 0, self.work.name)
        channels = pieces[0].facts["channels"]
        steps = self.ref.steps or longest
        return {"channels": channels, "classes": len(classes), "steps": steps}

    def _of_series(self, pieces: Sequence[Piece], name: str) -> label_scan.Labels:
        """What the labels of all parts say; rows are read where some labels are left out."""
        reads_rows = self.ref.label_fraction < 1 or self.ref.limit is not None

        def columns() -> Iterator[tuple[str, Encoded]]:
            for piece in pieces:
                facts = piece.facts
                if reads_rows:
                    label = block_of_part(self.work.folder.read(facts), facts).label
                    yield piece.split, replace(label, index=label.index[self._kept(piece)])
                    continue
                counted = np.repeat(np.arange(len(facts["classes"])), facts["counts"])
                index = np.full(piece.rows, MISSING)
                index[: len(counted)] = counted
                yield piece.split, Encoded(facts["classes"], index)

        return label_scan.scan(columns(), name, self.ref)

    def _of_text(self, pieces: Sequence[Piece]) -> label_scan.Labels:
        """How many rows keep their labels, and how many tokens are learned of them."""
        kept = [len(self._kept(piece)) for piece in pieces]
        train = [number for number, piece in enumerate(pieces) if piece.split == "train"]
        cutoffs = None
        labelled = list(kept)

        def ids() -> Iterator[tuple[Ints, Ints]]:
            for number in train:
                yield (number << PLACE_BITS) + np.arange(kept[number]), np.zeros(kept[number], int)

        if self.ref.label_fraction < 1:
            count = np.array([sum(kept[number] for number in train)])
            cutoffs = label_draw.cutoffs(ids, count, self.ref.label_fraction, self.ref.label_seed)
            for number, (row_id, zeros) in zip(train, ids(), strict=True):
                stays = label_draw.stays(row_id, zeros, cutoffs, self.ref.label_seed)
                labelled[number] = int(stays.sum())
        hidden = cutoffs is not None or sum(kept[n] for n in train) < pieces[train[0]].total
        known = "labels" if self.work.is_whole else "steps"
        learned = sum(pieces[number].facts[known] for number in train)
        if hidden:
            learned = sum(self._learned(pieces, number, cutoffs) for number in train)
        return label_scan.Labels(self.work.tokens, labelled, (), (learned,), cutoffs)

    def _learned(
        self, pieces: Sequence[Piece], number: int, cutoffs: NDArray[np.uint64] | None
    ) -> int:
        """The labels that the kept rows of a training part have."""
        place = self._kept(pieces[number])
        is_seen = np.ones(len(place), bool)
        if cutoffs is not None:
            row_id = (number << PLACE_BITS) + np.arange(len(place))
            zeros = np.zeros(len(place), int)
            is_seen = label_draw.stays(row_id, zeros, cutoffs, self.ref.label_seed)
        rows = self._rows_of_text(pieces, number)
        return int((rows.label[place[is_seen]] != UNLABELLED).sum())

    # rows

    def _kept(self, piece: Piece) -> Ints:
        """The places in a part of the rows that `data.limit` leaves."""
        return kept_places(self.ref.limit, piece.start, piece.rows, piece.total)

    def _hidden(self, rows: Rows, part: Part) -> Rows:
        """Rows without the labels that `data.label_fraction` hides."""
        cutoffs = self._known.cutoffs
        if cutoffs is None or part.split != "train":
            return rows
        number = np.zeros(len(rows), np.int64) if rows.is_text else np.maximum(rows.label, 0)
        stays = label_draw.stays(rows.row_id, number, cutoffs, self.ref.label_seed)
        stays = stays.reshape(-1, *(1,) * (rows.label.ndim - 1))
        return replace(rows, label=np.where(stays, rows.label, UNLABELLED))

    def _series(self, part: Part) -> Rows:
        """All rows of a part, padded."""
        table = self._known.table
        piece = self._known.pieces[part.number]
        block = block_of_part(self.work.folder.read(piece.facts), piece.facts)
        has_valence = block.valence is not None
        padding = Padding(
            piece.rows, table.shape["steps"], table.shape["channels"], has_valence=has_valence
        )
        number_of = {label: number for number, label in enumerate(table.classes)}
        row_id = part.first_id + np.arange(piece.rows)
        assert block.group is not None
        group = block.group.mapped({key: key for key in block.group.values}, MISSING)
        padding.fill(
            block,
            row_id=row_id,
            label=block.label.mapped(number_of, UNLABELLED),
            group=np.where(group == MISSING, row_id, group),
        )
        return padding.rows

    def _rows_of_text(self, pieces: Sequence[Piece], number: int) -> Rows:
        """All rows that begin in a part of text."""
        whole = self.work.is_whole
        window = self.ref.window
        first_id = number << PLACE_BITS

        def fragments(number: int) -> Sequence[Fragment]:
            kept = _Kept(self.work.folder, pieces[number].facts)
            return _read_fragments(kept, number << PLACE_BITS)

        if pieces[number].split != "train":
            documents = [one.document for one in fragments(number)]
            return laid_out(documents, window, shared=False, whole=whole, first_id=first_id)
        # the training split comes first, so the number of a part is its place there
        train = [piece.facts for piece in pieces if piece.split == "train"]
        return TrainingRows(train, fragments, window, whole).of(number, first_id)


@dataclass(frozen=True)
class _Kept:
    """A file of text, which is known by its digest."""

    folder: PreparedFolder
    facts: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.facts["sha256"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Kept):
            return False
        mine = (self.folder.address, self.facts["sha256"])
        return mine == (other.folder.address, other.facts["sha256"])


@lru_cache(KEPT)
def _read_fragments(file: _Kept, first_id: int) -> Sequence[Fragment]:
    return fragments_of(file.folder.read(file.facts), first_id)


def _pieces(parts: Sequence[dict[str, Any]]) -> list[Piece]:
    """The parts, in the order of the splits."""
    totals = dict.fromkeys(SPLITS, 0)
    starts = []
    for part in parts:
        starts.append(totals[part["split"]])
        totals[part["split"]] += part["rows"]
    return [
        Piece(part, part["split"], part["rows"], start, totals[part["split"]])
        for part, start in zip(parts, starts, strict=True)
    ]


def _notes(unfit: Sequence[Unfit], total: int) -> list[str]:
    """What a reader must know of the rows that were left out."""
    if not unfit:
        return []
    first = unfit[0]
    return [f"{len(unfit)} of {total} rows left out as unfit, such as row {first.row}: {first.why}"]
