"""Labels as class names: what is a label, what is none, and the order of classes."""

import math
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from raykd.errors import DataError

EXACT = 2**53  # whole floats up to here are the numbers that they seem
WRITE = "write text, a whole number, or null where a row has no label"


def class_names(
    labels: Sequence[Any], name: str, rows: Iterable[int] | None = None
) -> list[str | None]:
    """The class of each label as text; None where it is missing: null or NaN.

    Whole floats are integers, and bytes are text in UTF-8. DataError names a row whose label is
    neither text, a whole number nor a truth value, or of another kind than those before it. `rows`
    are the numbers of the rows, from 0 on without it.
    """
    names: list[str | None] = []
    first: tuple[type, int] | None = None  # the kind of the labels, and the row that has it
    for row, label in zip(count() if rows is None else rows, labels, strict=False):
        try:
            value = plain(label)
            if value is None:
                names.append(None)
                continue
            names.append(_named(value))
        except ValueError as error:
            raise DataError(f"{name}: the label of row {row} {error}; {WRITE}") from None
        first = first or (type(value), row)
        if type(value) is not first[0]:
            raise DataError(
                f"{name}: the label of row {row} is {value!r} ({type(value).__name__}), and that "
                f"of row {first[1]} a {first[0].__name__}; give all labels one type"
            )
    return names


def in_order(names: Iterable[str | None]) -> tuple[str, ...]:
    """The distinct names without None: integers in the order of numbers, text as text is sorted.

    Truth values are text here. A name that only looks like an integer beside others is text.
    """
    distinct = {name for name in names if name is not None}
    try:
        return tuple(sorted(distinct, key=int if all(map(is_integer, distinct)) else str))
    except ValueError:  # more digits than Python reads
        return tuple(sorted(distinct, key=lambda text: (len(text), text)))


def is_integer(text: str) -> bool:
    """Whether a text is what Python writes for an integer."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and (digits[0] != "0" or text == "0")


def plain(value: Any) -> Any:
    """A value as Python's own: None for null and NaN, an int for a whole float, text for bytes.

    ValueError says what else it is.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"is {value[:40]!r}, bytes that are no UTF-8") from None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer() or abs(value) > EXACT:
            raise ValueError(f"is {value!r}, no whole number")
        return int(value)
    return value


def _named(value: Any) -> str:
    """The name of a class. ValueError says why a value cannot be one."""
    if not isinstance(value, str | int):
        raise ValueError(f"is {str(value)[:40]!r} of type {type(value).__name__}")
    name = str(value)
    if not name.strip():
        raise ValueError(f"is {name!r}, which names no class")
    if not is_unicode(name):
        raise ValueError(f"is {name[:40]!r}, which holds half of a surrogate pair")
    return name


def is_unicode(text: str) -> bool:
    """Whether a text can be written at all; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
