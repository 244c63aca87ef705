"""Digests of files and of plain values."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

PIECE = 1 << 25  # bytes of a file that are hashed by one thread
READ = 1 << 20  # bytes that are read at a time


def digest_of(values: Any) -> str:
    """Hex sha256 of canonical JSON."""
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file, or of a folder's Parquet files by name and content."""
    path = Path(path)
    if path.is_dir():
        return files_sha256(path, parquet_below(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_blake2b(path: Path, piece: int = PIECE) -> str:
    """Hex digest of a file, computed on all cores: blake2b of the blake2b of its pieces.

    Gigabytes of data are hashed before a first row is scored, so it must not take one core's time.
    """
    firsts = range(0, max(path.stat().st_size, 1), piece)
    with ThreadPoolExecutor(min(len(firsts), os.cpu_count() or 1)) as threads:
        pieces = list(threads.map(partial(_piece_blake2b, path, piece), firsts))
    return hashlib.blake2b(b"".join(pieces), digest_size=32).hexdigest()


def _piece_blake2b(path: Path, piece: int, first: int) -> bytes:
    found = hashlib.blake2b(digest_size=32)
    left = piece
    with path.open("rb") as file:
        file.seek(first)
        while left and (data := file.read(min(READ, left))):
            found.update(data)
            left -= len(data)
    return found.digest()


def files_sha256(
    folder: Path, files: Sequence[Path], sha256: Callable[[Path], str] | None = None
) -> str:
    """Hex sha256 of files, by their names in the folder and their content.

    `sha256` gives that of one file, where it may be known.
    """
    sha256 = sha256 or file_sha256
    parts = [f"{p.relative_to(folder)}:{sha256(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def parquet_below(folder: Path) -> list[Path]:
    """The Parquet files of a folder in the order of their paths.

    Hidden names, of files or of folders below this one, are no data: notebooks, Spark and file
    systems keep copies under them.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".parquet"
        and not is_hidden(path.relative_to(folder).as_posix())
        and not path.is_dir()
    )


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in name.split("/"))
