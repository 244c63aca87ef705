"""Whether rows fit into memory once they are padded to the longest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.errors import DataError
from raykd.files.memory import memory_bytes, taken_bytes

SMALL_BYTES = 1 << 30  # so much may be padding, whatever the rows hold
FULL = 0.8  # of the memory
WASTE = 16  # times the rows' own values that padded rows may take


def check_taken(what: str) -> None:
    """DataError, which begins with `what`, when this process has taken most of its memory."""
    taken = taken_bytes()
    if taken > FULL * memory_bytes():
        raise DataError(
            f"{what} and this process has {taken / 2**30:,.1f} GiB of memory, of "
            f"{memory_bytes() / 2**30:,.1f}; let the function end, or return fewer rows"
        )


def check_room(length: NDArray[Any], channels: int, name: str) -> None:
    """DataError naming the longest row, if padding all rows to it takes too much memory.

    `length` (N,) are the steps of each row.
    """
    longest = int(length.max())
    width = 4 * channels + 1  # float32 values, and the mask
    padded = len(length) * longest * width
    of_rows = int(length.sum()) * width
    most = max(SMALL_BYTES, WASTE * of_rows)
    if padded <= min(most, memory_bytes()):
        return
    raise DataError(
        f"{name}: row {int(length.argmax())} has {longest:,} steps, and half of the rows have at "
        f"most {int(np.median(length)):,}: padded to the longest, all rows would take "
        f"{padded / 2**30:,.1f} GiB; cut it, or leave it out"
    )


def check_memory(values: int, name: str) -> None:
    """DataError if rows of so many float32 values cannot be held in memory; they are there twice
    while they are padded.
    """
    needed = 2 * 4 * values
    there = memory_bytes()
    if needed > there:
        raise DataError(
            f"{name}: to read all rows takes {needed / 2**30:,.1f} GiB of memory, and this machine "
            f'has {there / 2**30:,.1f} GiB; set optim.order = "blocks", which reads them in parts'
        )
