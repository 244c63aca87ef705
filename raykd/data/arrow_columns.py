"""Columns of Arrow as arrays, without a Python object a value; a fault is named by its row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raykd.data import labels
from raykd.data.blocks import MISSING, Encoded, Ragged
from raykd.data.rows import Unfit
from raykd.data.text import group_keys
from raykd.errors import DataError

INPUTS = "inputs must be lists of steps of channel values"


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves, which a dictionary only numbers."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def check_type(kind: pa.DataType, column: str, where: str) -> None:
    """DataError if a column is of a type that is not read."""
    if isinstance(kind, pa.BaseExtensionType) and not _is_tensor(kind):
        raise DataError(
            f"{where}: column {column!r} is {kind}, which is not read; write plain lists: "
            "for each row a list of steps, each a list of channel values"
        )


def series(column: pa.Array, name: str, first: int) -> tuple[Ragged, tuple[Unfit, ...]]:
    """(the steps of every row as lists (S, K), the rows that have none).

    The first row has the number `first`, and `name` begins messages.
    """
    rows = _plain(column)
    if not _is_list(rows.type):
        raise DataError(f"{name}: {INPUTS}, and are {column.type}")
    length = _lengths(rows, 0)
    steps = _plain(rows.flatten())
    if not _is_list(steps.type):
        return Ragged(_no_steps(steps, length, name, first), length), _without_step(rows, first)
    owner = np.repeat(np.arange(first, first + len(length)), length)  # of each step its row
    if steps.null_count:
        row = owner[steps.is_null().to_numpy(zero_copy_only=False).argmax()]
        raise DataError(f"{name}: row {row}: {INPUTS}: a step is null")
    width = _lengths(steps, 0)
    channels = int(width[0]) if len(width) else 0
    if (width != channels).any():
        _raise_uneven(width, owner, name)
    values = _plain(steps.flatten())
    if _is_list(values.type):
        inner = _lengths(values, 0)[:1].tolist()
        shape = (int(length[length > 0][0]), channels, *inner)
        raise DataError(
            f"{name}: inputs must be (steps, channels), but row {owner[0]} has shape {shape}"
        )
    numbers = _numbers(values, name, INPUTS)
    if values.null_count:
        step = values.is_null().to_numpy(zero_copy_only=False).argmax() // max(channels, 1)
        raise DataError(f"{name}: row {owner[step]}: {INPUTS}: a value is null")
    if not channels and length.any():
        raise DataError(f"{name}: {INPUTS}: steps without a channel; give each some values")
    return Ragged(numbers.reshape(-1, max(channels, 1)), length), _without_step(rows, first)


def step_values(column: pa.Array, name: str, first: int) -> Ragged:
    """A list of numbers (S,) for each row, NaN where one is null."""
    rows = _plain(column)
    if pa.types.is_null(rows.type):
        return Ragged(np.zeros(0, np.float32), np.full(len(rows), MISSING))
    if not _is_list(rows.type):
        raise DataError(
            f"{name}: row {first}, valence must be a list of numbers: it is {column.type}"
        )
    values = _numbers(_plain(rows.flatten()), name, "valence must be a list of numbers")
    return Ragged(values, _lengths(rows, MISSING))


def distinct(column: pa.Array) -> Encoded:
    """A column by its distinct values, which are Python's."""
    if isinstance(column.type, pa.DictionaryType):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return Encoded([], np.full(len(column), MISSING))
    try:
        numbered = column.dictionary_encode()
    except pa.ArrowNotImplementedError:  # half floats, and lists, which are no label
        return Encoded(column.to_pylist(), np.arange(len(column)))
    index = numbered.indices.fill_null(MISSING).to_numpy(zero_copy_only=False)
    return Encoded(numbered.dictionary.to_pylist(), index.astype(np.int64))


def class_names(column: pa.Array, name: str, first: int) -> Encoded:
    """Labels as the names of classes. DataError names the first row that has none of one."""
    found = distinct(column)
    rows = [first + row for row in found.firsts]
    names = labels.class_names(found.values, name, rows)
    return _merged(found, names)


def groups(column: pa.Array) -> Encoded:
    """Groups by what tells them apart."""
    found = distinct(column)
    return _merged(found, group_keys(found.values))


def _merged(found: Encoded, values: list) -> Encoded:
    """A column whose distinct values have others in their place, some of them equal or missing."""
    kept = [value for value in dict.fromkeys(values) if value is not None]
    number = {value: i for i, value in enumerate(kept)} | {None: MISSING}
    table = np.array([*(number[value] for value in values), MISSING], np.int64)
    return Encoded(kept, table[found.index])


def _is_tensor(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType) and kind.permutation is None


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _plain(array: pa.Array) -> pa.Array:
    """The values that a dictionary numbers, or a tensor holds as lists in lists."""
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode()
    if not isinstance(array.type, pa.FixedShapeTensorType):
        return array
    storage = array.storage
    size = storage.type.list_size
    lists = storage.values.slice(storage.offset * size, len(storage) * size)
    inner = array.type.shape[1:]
    for width in reversed(inner):
        lists = pa.FixedSizeListArray.from_arrays(lists, width)
    return pa.FixedSizeListArray.from_arrays(lists, array.type.shape[0], mask=storage.is_null())


def _lengths(lists: pa.Array, null: int) -> NDArray[np.int64]:
    """(N,): how many values each list holds."""
    lengths = pc.call_function("list_value_length", [lists]).fill_null(null)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _numbers(values: pa.Array, name: str, what: str) -> NDArray[np.float32]:
    """Numbers as float32. DataError for anything else; a null is NaN."""
    kind = values.type
    if pa.types.is_decimal(kind):
        values = values.cast(pa.float64())
    elif not (
        pa.types.is_floating(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"{name}: {what}, and the values are {kind}")
    elif pa.types.is_null(kind):
        return np.full(len(values), np.nan, np.float32)
    elif pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)


def _without_step(rows: pa.Array, first: int) -> tuple[Unfit, ...]:
    """The rows that hold no list, or an empty one."""
    length = _lengths(rows, MISSING)
    shapes = {MISSING: "()", 0: "(0,)"}
    return tuple(
        Unfit(first + int(row), f"has shape {shapes[int(length[row])]}, without any step")
        for row in np.flatnonzero(length <= 0)
    )


def _no_steps(
    values: pa.Array, length: NDArray[np.int64], name: str, first: int
) -> NDArray[np.float32]:
    """No steps at all, where no row has one; DataError where rows hold numbers in their place."""
    if length.any():
        row = int(np.flatnonzero(length)[0])
        raise DataError(
            f"{name}: row {first + row}: inputs are one flat list of {length[row]} "
            f"{'numbers' if not pa.types.is_string(values.type) else 'texts'}; write a list of "
            "steps, each a list of channel values: [[0.1], [0.2]] is two steps of one channel"
        )
    return np.zeros((0, 0), np.float32)


def _raise_uneven(width: NDArray[np.int64], owner: NDArray[np.int64], name: str) -> None:
    """DataError for the first row whose steps differ in width, among themselves or from others."""
    step = int((width != width[0]).argmax())
    of_row = width[owner == owner[step]]
    if (of_row != of_row[0]).any():
        shown = ", ".join(map(str, of_row[:5]))
        raise DataError(
            f"{name}: row {owner[step]}: {INPUTS}: its steps hold {shown} values; give all as many"
        )
    before = width[owner == owner[0]]
    raise DataError(
        f"{name}: inputs must be (steps, channels) with one channel count, but row {owner[step]} "
        f"has shape {(len(of_row), int(of_row[0]))} and row {owner[0]} "
        f"{(len(before), int(before[0]))}"
    )
