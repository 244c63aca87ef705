"""Files that others may have written, read within bounds."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MIB = 1 << 20
MOST_JSON = 64 * MIB
DEEPEST = 64  # lists and tables in each other


def opened(path: Path) -> BufferedReader:
    """A regular file, opened to be read; ValueError says what it is instead.

    A pipe or a device is refused without waiting for it. OSError if it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is no regular file")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, most: int = MIB) -> bytes:
    """The bytes of a regular file of at most `most` bytes; ValueError says what it is instead.

    OSError if it cannot be opened.
    """
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return data


def json_of(data: bytes | str, **options: Any) -> Any:
    """The value of a JSON text that is not too deep; ValueError says what is wrong.

    `options` are those of json.loads.
    """
    try:
        value = json.loads(data, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """ValueError if lists and tables lie too deep in each other for what reads them later."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
