"""Files that are whole or absent: written aside, synced, then renamed or linked into place."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from raykd.errors import InfraError, StoreError
from raykd.files import faults
from raykd.files.reading import MOST_JSON, json_of, read_bounded

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota or a file


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = _stage(path, data)
    os.replace(staged, path)
    _sync_folder(path.parent)


def put_once(path: Path, data: bytes) -> bool:
    """Create `path` with `data` unless it exists.

    True if this call created it. Of many racing calls exactly one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = _stage(path, data)
    fault_at: dict[str, Any] = {"folder": path.parent.name, "name": path.name}
    faults.point("file", **fault_at, at="staged")
    try:
        os.link(staged, path)
        faults.point("file", **fault_at, at="linked")
        created = True
    except FileExistsError:
        created = False
    finally:
        staged.unlink()
    _sync_folder(path.parent)
    return created


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `path`.

    If the block raises, `path` stays as it was.
    """
    staged = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    staged.mkdir(parents=True)
    try:
        yield staged
        shutil.rmtree(path, ignore_errors=True)
        os.rename(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def whole_file(path: Path, named: Callable[[], str] | None = None) -> Iterator[BinaryIO]:
    """A new file to write, which then takes the place of `path`, or has the name beside it that
    `named` gives once all is written.

    If the block raises, or writes nothing, `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with staged.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            is_written = file.tell() > 0
        if is_written:
            os.replace(staged, path.with_name(named()) if named else path)
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise InfraError(
                f"{path.parent}: {error.strerror}, {path.name} could not be written; free that "
                "disk and give the same command, which continues from here"
            ) from None
        raise
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON with sorted keys."""
    write_bytes(path, to_json(value))


def to_json(value: Any) -> bytes:
    """Indented JSON with sorted keys; NaN is refused, because JSON has none."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None where there is no such file.

    StoreError if it is no regular file, too large, or not JSON.
    """
    try:
        data = read_bounded(path, MOST_JSON)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; delete what is there") from None
    except ValueError as error:
        raise StoreError(f"{path} cannot be read: {error}; delete what is there") from None
    return from_json(data, str(path))


def from_json(data: bytes | None, name: str) -> Any:
    """The JSON value in a file's bytes, or None where there is no file.

    StoreError if they are not JSON.
    """
    try:
        return None if data is None else json_of(data, parse_constant=_no_number)
    except ValueError as error:
        raise StoreError(
            f"{name} is damaged: not JSON ({error}); delete it and run again"
        ) from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _stage(path: Path, data: bytes) -> Path:
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        staged.unlink(missing_ok=True)
        if error.errno in FULL:
            full = f"{path.parent}: {error.strerror}, {len(data):,} bytes could not be written"
            raise InfraError(
                f"{full}; free that disk and give the same command, which continues from here"
            ) from None
        raise
    return staged


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
