"""Rows as they are read, one after another without padding, and how they become `Rows`.

Every source of series gives blocks. A block of a file in parts becomes the rows of one part. Blocks
of rows that fit into memory become a data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import Rows, Unfit
from raykd.errors import DataError
from raykd.targets import UNLABELLED

MISSING = -1  # the index of a value that is missing, and the length of one
SHOWN = 3  # unfit rows that an error lists


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths as one array: the first `length[0]` values are row 0's."""

    values: NDArray[np.float32] | NDArray[np.int32]  # (S, K) or (S,)
    length: NDArray[np.int64]  # (N,)

    def where(self, keeps: NDArray[np.bool_]) -> "Ragged":
        """The lists of some rows, a mask (N,)."""
        if keeps.all():
            return self
        of_rows = np.repeat(keeps, np.maximum(self.length, 0))
        return Ragged(self.values[of_rows], self.length[keeps])


@dataclass(frozen=True)
class Encoded:
    """A column by its distinct values: row i has `values[index[i]]`, or none if that is MISSING."""

    values: list[Any]
    index: NDArray[np.int64]  # (N,)

    def mapped(self, number: dict[Any, int], missing: int) -> NDArray[np.int64]:
        """(N,): the number of each row's value, and `missing` where it has none."""
        table = np.array([*(number[value] for value in self.values), missing], np.int64)
        return table[self.index]

    @property
    def firsts(self) -> list[int]:
        """The first row of each distinct value."""
        first = np.full(len(self.values) + 1, MISSING)
        first[self.index[::-1]] = np.arange(len(self.index))[::-1]
        return first[:-1].tolist()


def encoded(values: Sequence[Any]) -> Encoded:
    """A column of plain values, None where one is missing."""
    number: dict[Any, int] = {None: MISSING}
    index = [number.setdefault(value, len(number) - 1) for value in values]
    return Encoded(list(number)[1:], np.array(index, np.int64))


@dataclass(frozen=True)
class Block:
    """N rows of series as a source gives them; labels are the names of classes."""

    first: int  # the number of its first row in the source
    inputs: Ragged
    label: Encoded
    split: Encoded
    group: Encoded | None = None  # by what tells a group from others
    valence: Ragged | None = None  # a length is MISSING where a row has none
    unfit: tuple[Unfit, ...] = ()

    def __len__(self) -> int:
        return len(self.label.index)

    @property
    def fits(self) -> NDArray[np.bool_]:
        """(N,): the rows that are not unfit."""
        fits = np.ones(len(self), bool)
        fits[[unfit.row - self.first for unfit in self.unfit]] = False
        return fits

    @property
    def bytes(self) -> int:
        """Of its values, about."""
        return self.inputs.values.nbytes + 24 * len(self)

    def where(self, keeps: NDArray[np.bool_]) -> "Block":
        """Some of its rows, a mask (N,), as to inputs and valence."""
        valence = self.valence and self.valence.where(keeps)
        return replace(self, inputs=self.inputs.where(keeps), valence=valence)

    def only(self, keeps: NDArray[np.bool_]) -> "Block":
        """Some of its rows, a mask (N,), which are numbered anew from 0 on, none of them unfit."""
        group = self.group and replace(self.group, index=self.group.index[keeps])
        return replace(
            self.where(keeps),
            first=0,
            label=replace(self.label, index=self.label.index[keeps]),
            split=replace(self.split, index=self.split.index[keeps]),
            group=group,
            unfit=(),
        )


class Padding:
    """The rows of one split, filled block by block and padded with zeros on the right."""

    def __init__(
        self, count: int, steps: int, channels: int, *, has_valence: bool, dtype: Any = np.float32
    ):
        self.filled = 0
        self.rows = Rows(
            row_id=np.zeros(count, np.int64),
            inputs=np.zeros((count, steps, channels), dtype),
            mask=np.zeros((count, steps), bool),
            label=np.full(count, UNLABELLED, np.int64),
            group=np.zeros(count, np.int64),
            valence=np.full((count, steps), np.nan, np.float32) if has_valence else None,
        )

    def fill(self, block: Block, *, row_id: Any, label: Any, group: Any) -> None:
        """Put the rows of a block, one value of each array a row, behind those that are there."""
        length = block.inputs.length
        at = slice(self.filled, self.filled + len(length))
        self.filled = at.stop
        mask = np.arange(self.rows.mask.shape[1]) < length[:, None]
        self.rows.mask[at] = mask
        if mask.all():  # as most rows of one length are, and this is far quicker
            self.rows.inputs[at] = block.inputs.values.reshape(self.rows.inputs[at].shape)
        else:
            self.rows.inputs[at][mask] = block.inputs.values
        self.rows.row_id[at] = row_id
        self.rows.label[at] = label
        self.rows.group[at] = group
        if self.rows.valence is not None and block.valence is not None:
            told = mask & (block.valence.length != MISSING)[:, None]
            self.rows.valence[at][told] = block.valence.values


def group_number(key: tuple[str, str]) -> int:
    """A 63-bit number for a group, so that no table of all groups is needed."""
    digest = blake2b("\0".join(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def kept_places(limit: int | None, start: int, rows: int, total: int) -> NDArray[np.int64]:
    """The places of those rows of a part that `data.limit` leaves.

    The part has so many rows, behind the first `start` of the `total` ones of its split.
    """
    if limit is None or total <= limit:
        return np.arange(rows)
    first = -(-start * limit // total)
    end = -(-(start + rows) * limit // total)
    return np.arange(first, end) * total // limit - start


def check_steps(length: NDArray[np.int64], most: int | None, first: int, name: str) -> None:
    """DataError names a row of more than `most` steps; the first row has the number `first`."""
    if most is not None and length.max(initial=0) > most:
        row = int((length > most).argmax())
        raise DataError(
            f"{name}: row {first + row} has {length[row]:,} steps, and a row at most {most:,}: "
            "cut it, or raise data.steps"
        )


def check_valence(block: Block, name: str) -> None:
    """DataError names a row whose valence has not one value a step."""
    if block.valence is None:
        return
    length = block.valence.length
    wrong = (length != MISSING) & (length != block.inputs.length)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{name}: row {block.first + row} has {length[row]} valence values for "
            f"{block.inputs.length[row]} steps"
        )


def check_unfit(unfit: Sequence[Unfit], count: int, most: float, name: str) -> None:
    """DataError if more than the share `most` of `count` rows is unfit; it names the first."""
    if len(unfit) <= most * count:
        return
    shown = "; ".join(f"row {one.row} {one.why}" for one in unfit[:SHOWN])
    more = f" and {len(unfit) - SHOWN} more" if len(unfit) > SHOWN else ""
    raise DataError(
        f"{name}: {shown}{more}: {len(unfit)} of {count} rows teach nothing, and data.max_unfit = "
        f"{most} lets {int(most * count)} be left out; mend or drop them, or raise it"
    )
