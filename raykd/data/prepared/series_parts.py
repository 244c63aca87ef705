"""Parts of series: rows as they were read, without padding, and how they are padded again."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.data.blocks import MISSING, Block, Encoded, Ragged, check_valence, group_number
from raykd.data.held import channels_of, split_numbers
from raykd.data.prepared.folder import PartTable
from raykd.data.rows import SPLITS
from raykd.errors import DataError
from raykd.recipe.tables import DataRef

PART_BYTES = 16 << 20  # of a part, about
PART_ROWS = 1 << 20  # of a part, at most, and of a block


class SeriesParts:
    """Rows of one unit that are gathered, by split, until they make a part."""

    def __init__(self, ref: DataRef):
        self.ref = ref
        self.open: dict[str, list[Block]] = {}
        self.sizes: dict[str, int] = {}
        self.rows: dict[str, int] = {}

    def add(self, block: Block, name: str) -> Iterator[PartTable]:
        """Add some rows; gives the parts that are full with them. DataError names a row that
        cannot be used.
        """
        check_block(block, name)
        split = split_numbers(block, name, self.ref)
        for number in np.unique(split[block.fits]):
            of_split = SPLITS[number]
            some = block.only(block.fits & (split == number))
            self.open.setdefault(of_split, []).append(some)
            self.sizes[of_split] = self.sizes.get(of_split, 0) + some.bytes
            self.rows[of_split] = self.rows.get(of_split, 0) + len(some)
            if self.sizes[of_split] >= PART_BYTES or self.rows[of_split] >= PART_ROWS:
                yield self._part(of_split)

    def rest(self) -> Iterator[PartTable]:
        """The parts that are not full."""
        for split in [split for split, some in self.open.items() if some]:
            yield self._part(split)

    def _part(self, split: str) -> PartTable:
        blocks = self.open[split]
        self.open[split] = []
        self.sizes[split] = 0
        self.rows[split] = 0
        channels = channels_of(blocks, f"data.source {self.ref.source}")
        labels = _joined([block.label for block in blocks])
        length = np.concatenate([block.inputs.length for block in blocks])
        counts = np.bincount(labels.index[labels.index != MISSING], minlength=len(labels.values))
        columns = {
            "inputs": _lists([block.inputs for block in blocks], channels),
            "label": pa.array(labels.index),
            "group": pa.array(np.concatenate([_groups(block) for block in blocks])),
        }
        valence = [block.valence for block in blocks if block.valence is not None]
        if valence:
            columns["valence"] = _lists(valence, 1)
        facts: dict[str, Any] = {
            "rows": len(length),
            "longest": int(length.max()),
            "channels": channels,
            "classes": labels.values,
            "counts": counts.tolist(),  # of each class
        }
        return PartTable(split, pa.table(columns), facts)


def check_block(block: Block, name: str) -> None:
    """DataError names a row that cannot be used, before anything of it is written."""
    check_valence(block, name)
    length = block.inputs.length
    finite = np.isfinite(block.inputs.values).all(axis=-1)
    if not finite.all():
        row = _owner(length, int(finite.argmin()))
        raise DataError(f"{name}: NaN or infinite inputs in row {block.first + row}; mend it")
    if block.valence is not None:
        outside = np.abs(block.valence.values) > 1
        if outside.any():
            row = _owner(np.maximum(block.valence.length, 0), int(outside.argmax()))
            raise DataError(
                f"{name}: valence outside [-1, 1] in row {block.first + row}; rescale it"
            )


def block_of_part(table: pa.Table, facts: dict[str, Any]) -> Block:
    """The rows of a part as a block; a group is told by its number."""
    group = table.column("group").to_numpy()
    known = np.unique(group[group != MISSING])
    valence = None
    if "valence" in table.column_names:
        valence = _ragged(table, "valence", 1)
        missing = np.where(valence.length == 0, MISSING, valence.length)  # a row has steps
        valence = Ragged(valence.values[:, 0], missing)
    label = Encoded(facts["classes"], table.column("label").to_numpy())
    index = np.where(group == MISSING, MISSING, np.searchsorted(known, group))
    return Block(
        first=0,
        inputs=_ragged(table, "inputs", facts["channels"]),
        label=label,
        split=Encoded([], np.zeros(0, np.int64)),
        group=Encoded(known.tolist(), index),
        valence=valence,
    )


def _owner(length: NDArray[np.int64], step: int) -> int:
    """The row that a step is of."""
    return int(np.searchsorted(np.cumsum(length), step, side="right"))


def _joined(columns: list[Encoded]) -> Encoded:
    """Columns one after another."""
    values = list(dict.fromkeys(value for column in columns for value in column.values))
    number = {value: i for i, value in enumerate(values)}
    index = np.concatenate([column.mapped(number, MISSING) for column in columns])
    used = np.unique(index[index != MISSING])
    place = np.full(len(values) + 1, MISSING)
    place[used] = np.arange(len(used))
    return Encoded([values[i] for i in used], place[index])


def _groups(block: Block) -> NDArray[np.int64]:
    """(N,): the number of each row's group; MISSING where it has none."""
    if block.group is None:
        return np.full(len(block), MISSING)
    return block.group.mapped({key: group_number(key) for key in block.group.values}, MISSING)


def _lists(some: list[Ragged], width: int) -> pa.Array:
    """Lists of values, one after another; a missing one is empty."""
    length = np.concatenate([np.maximum(each.length, 0) for each in some]) * width
    ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    values = np.concatenate([each.values.reshape(-1) for each in some])
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def _ragged(table: pa.Table, name: str, width: int) -> Ragged:
    lists = table.column(name).combine_chunks()
    length = lists.value_lengths().to_numpy().astype(np.int64)
    values = lists.flatten().to_numpy()
    return Ragged(values.reshape(-1, width), length // width)
