"""Files that others may have written, read within bounds."""

import os
import stat
from pathlib import Path

MIB = 1 << 20


def read_bounded(path: Path, most: int = MIB) -> bytes:
    """The bytes of a regular file of at most `most` bytes; ValueError says what it is instead.

    A pipe or a device is refused without waiting for it. OSError if it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return data
