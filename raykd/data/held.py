"""Blocks of series as a data set in memory, padded to the longest row of all."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from raykd.data import labels
from raykd.data.blocks import MISSING, Block, Padding, check_steps, check_unfit, check_valence
from raykd.data.room import check_room
from raykd.data.rows import SPLITS, Dataset
from raykd.data.text import split_names
from raykd.errors import DataError
from raykd.recipe.tables import DataRef
from raykd.targets import UNLABELLED


def dataset(blocks: list[Block], name: str, ref: DataRef) -> Dataset:
    """The data set of all rows that are not unfit; `blocks` is emptied meanwhile.

    Labels are numbered in the order of the classes, and groups in that of their names. A row
    without a group is one of its own.
    """
    blocks[:] = [block for block in blocks if len(block)]
    count = sum(map(len, blocks))
    if not count:
        raise DataError(f"{name}: 0 rows")
    unfit = [row for block in blocks for row in block.unfit]
    check_unfit(unfit, count, ref.max_unfit, name)
    found = (label for block in blocks for label in block.label.values)
    classes = classes_of(found, name, ref)
    channels = channels_of(blocks, name)
    for block in blocks:
        check_valence(block, name)
    length = np.concatenate([block.inputs.length for block in blocks])
    check_steps(length, ref.steps, 0, name)
    check_room(length, channels, name)
    split = np.concatenate([split_numbers(block, name, ref) for block in blocks])
    fits = np.concatenate([block.fits for block in blocks])
    padded = {
        part: Padding(
            int((fits & (split == number)).sum()),
            ref.steps or int(length.max()),
            channels,
            has_valence=blocks[0].valence is not None,
            dtype=blocks[0].inputs.values.dtype,
        )
        for number, part in enumerate(SPLITS)
    }
    number_of = {label: number for number, label in enumerate(classes)}
    group_of = _group_numbers(blocks)
    start = 0
    while blocks:
        block = blocks.pop(0)
        row = np.arange(start, start + len(block))
        label = block.label.mapped(number_of, UNLABELLED)
        group = row
        if block.group is not None:
            group = block.group.mapped(group_of, MISSING)
            group = np.where(group == MISSING, len(group_of) + row, group)
        for number, part in enumerate(SPLITS):
            keeps = block.fits & (split[row] == number)
            padded[part].fill(
                block.where(keeps), row_id=row[keeps], label=label[keeps], group=group[keeps]
            )
        start += len(block)
    splits = {part: padded[part].rows for part in SPLITS}
    return Dataset(name, classes, splits, unfit=tuple(unfit))


def classes_of(found: Iterable[str], name: str, ref: DataRef) -> tuple[str, ...]:
    """The classes in their order, of the labels that are found.

    DataError for a label that `data.classes` does not have.
    """
    found = set(found)
    classes = tuple(ref.classes or labels.in_order(found))
    if not classes:
        raise DataError(
            f"{name}: no row has a label; name the teacher's classes in their order under "
            "data.classes"
        )
    if unknown := sorted(found - set(classes)):
        raise DataError(f"{name}: labels {unknown[:5]} are outside data.classes {list(classes)}")
    return classes


def channels_of(blocks: Sequence[Block], name: str) -> int:
    """The values of a step. DataError names a row that has another count than those before it."""
    some = [block for block in blocks if len(block.inputs.values)]
    channels = some[0].inputs.values.shape[1] if some else 0
    for block in some:
        if block.inputs.values.shape[1] != channels:
            row = int(np.flatnonzero(block.inputs.length)[0])
            shape = (int(block.inputs.length[row]), block.inputs.values.shape[1])
            before = (int(some[0].inputs.length.max()), channels)
            raise DataError(
                f"{name}: inputs must be (steps, channels) with one channel count, but row "
                f"{block.first + row} has shape {shape} and row {some[0].first} {before}"
            )
    if not channels:
        raise DataError(f"{name}: inputs are steps without a channel; give each some values")
    return channels


def split_numbers(block: Block, name: str, ref: DataRef) -> NDArray[np.int64]:
    """(N,): the number of each row's split."""
    values = block.split.values
    if (block.split.index == MISSING).any():
        values = [*values, None]
    names = split_names(values, name, ref)
    return np.array([SPLITS.index(part) for part in names], np.int64)[block.split.index]


def _group_numbers(blocks: Sequence[Block]) -> dict[tuple[str, str], int]:
    """A number for each group, in the sorted order of the groups as text."""
    known = {key for block in blocks if block.group for key in block.group.values}
    return {key: number for number, key in enumerate(sorted(known))}
