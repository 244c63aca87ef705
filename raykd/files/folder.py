"""A folder as a store's place: on this machine, or mounted by all nodes.

A hard link creates a name once. Symbolic links that lead out of the folder are not followed.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from raykd.errors import StoreError
from raykd.files import atomic, links
from raykd.files.place import Listed, Record
from raykd.files.reading import opened


@dataclass(frozen=True)
class Folder:
    """Files below a path."""

    address: Path
    root: Path | None = field(default=None, compare=False)  # the folder that this one is below

    def __str__(self) -> str:
        return str(self.address)

    @property
    def name(self) -> str:
        return self.address.name

    def below(self, name: str) -> "Folder":
        return Folder(self.address / name, self.root or self.address)

    def put_once(self, name: str, data: bytes) -> bool:
        return atomic.put_once(self._path(name), data)

    def put(self, name: str, data: bytes) -> None:
        atomic.write_bytes(self._path(name), data)

    def get(self, name: str, *, last: int | None = None) -> bytes | None:
        try:
            with opened(self._path(name)) as file:
                if last is not None:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(-min(last, size), os.SEEK_END)
                return file.read()
        except FileNotFoundError:
            return None
        except ValueError:
            what = "is a folder or a pipe where a file belongs; delete it"
            raise StoreError(f"{self}/{name} {what}") from None

    def delete(self, name: str) -> None:
        path = self.address / name
        links.check_inside(path.parent, self.root or self.address)
        path.unlink(missing_ok=True)  # of a link the link itself

    def listed(self, below: str = "") -> dict[str, Listed]:
        files = {}
        for path in sorted(self._path(below).rglob("*")):
            if path.is_symlink():
                links.check_inside(path, self.root or self.address)
            try:
                status = path.stat()
            except FileNotFoundError:  # a writer put it in place or removed it meanwhile
                continue
            if path.is_file():
                name = path.relative_to(self.address).as_posix()
                files[name] = Listed(status.st_size, status.st_mtime)
        return files

    def folders(self, below: str = "") -> list[str]:
        return sorted(path.name for path in self._path(below).glob("*") if path.is_dir())

    @property
    def is_near(self) -> bool:
        return True

    def lacking(self, records: Iterable[Record]) -> Iterator[Record]:
        """Those whose file has another digest. A disk is near, so files are read."""
        return (record for record in records if self._sha256(record["file"]) != record["sha256"])

    def _sha256(self, name: str) -> str | None:
        try:
            with opened(self._path(name)) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, ValueError):
            return None

    def _path(self, name: str) -> Path:
        """The path of a file or folder. StoreError if it leads out of this place and its root."""
        path = self.address / name
        links.check_inside(path, self.root or self.address)
        return path
