"""Files that others made, below a folder or a prefix of a bucket: listed, and read in ranges.

They are not raykd's, so they may vanish or change at any time. A listing says which version of each
file it saw, and a read of another version is refused.
"""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from raykd.errors import DataError
from raykd.files.address import is_url
from raykd.files.bucket import Bucket
from raykd.files.cache import blake2b_kept
from raykd.files.digests import is_hidden
from raykd.files.open import open_place

AGAIN = "give the same command again once the files stay as they are"


class DataFile(NamedTuple):
    """A file as a listing saw it; `name` is its path below the source."""

    name: str
    bytes: int
    version: str  # of its content; a read finds the same or fails. Empty where it is no file


class DataFiles(Protocol):
    """Where a source's files are; its text is what a user typed."""

    is_remote: bool

    @property
    def name(self) -> str:
        """The last part of the address."""
        ...

    def listed(self) -> list[DataFile]:
        """Every file that may be data, in the order of its path."""
        ...

    def read(self, file: DataFile, first: int, count: int) -> bytes:
        """`count` bytes from the byte `first` on. DataError if the file is another than listed."""
        ...

    def mark(self, file: DataFile) -> str:
        """What stands for a file's content in a digest."""
        ...


def open_files(address: str) -> DataFiles:
    """The files below a folder, or below s3://bucket/prefix."""
    if is_url(address):
        place = open_place(address)
        assert isinstance(place, Bucket)
        return BucketFiles(place)
    return FolderFiles(Path(address))


def vanished(files: DataFiles, file: DataFile) -> DataError:
    return DataError(f"{files}/{file.name} vanished after it was listed; {AGAIN}")


def changed(files: DataFiles, file: DataFile) -> DataError:
    return DataError(f"{files}/{file.name} was changed after it was listed; {AGAIN}")


@dataclass(frozen=True)
class FolderFiles:
    """Files of this machine, or of a folder that all nodes mount.

    A version is the size and the time of the last change, so that copies of a folder on several
    nodes must keep their times.
    """

    folder: Path
    is_remote = False

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return self.folder.name

    def listed(self) -> list[DataFile]:
        found = []
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if is_hidden(name) or path.is_dir():
                continue
            try:
                found.append(self._file(name))
            except FileNotFoundError:  # removed meanwhile, or a link to nothing
                found.append(DataFile(name, 0, ""))
        return sorted(found, key=_by_path)

    def read(self, file: DataFile, first: int, count: int) -> bytes:
        if not file.version:
            raise DataError(f"{self}/{file.name}: not a file; delete it, or put the file there")
        try:
            with (self.folder / file.name).open("rb") as opened:
                opened.seek(first)
                data = opened.read(count)
            if self._file(file.name) != file or len(data) != count:
                raise changed(self, file)
        except FileNotFoundError:
            raise vanished(self, file) from None
        except OSError as error:
            raise DataError(f"{self}/{file.name}: cannot be read: {error.strerror}") from None
        return data

    def mark(self, file: DataFile) -> str:
        """A digest of its bytes, computed once on this node."""
        try:
            return blake2b_kept(self.folder / file.name)
        except FileNotFoundError:
            raise vanished(self, file) from None

    def _file(self, name: str) -> DataFile:
        status = (self.folder / name).stat()
        is_file = stat.S_ISREG(status.st_mode)  # no pipe or device, whose reading may never end
        version = f"{status.st_size}-{status.st_mtime_ns}" if is_file else ""
        return DataFile(name, status.st_size, version)


@dataclass(frozen=True)
class BucketFiles:
    """Objects below a prefix. A version, and the mark, is the server's ETag."""

    bucket: Bucket
    is_remote = True

    def __str__(self) -> str:
        return str(self.bucket)

    @property
    def name(self) -> str:
        return self.bucket.name

    def listed(self) -> list[DataFile]:
        objects = self.bucket.listed()
        found = [
            DataFile(name, listed.bytes, listed.tag)
            for name, listed in objects.items()
            if not is_hidden(name) and not name.endswith("/")
        ]
        return sorted(found, key=_by_path)

    def read(self, file: DataFile, first: int, count: int) -> bytes:
        found = self.bucket.range_of(file.name, first, count)
        if found is None:
            raise vanished(self, file)
        data, tag = found
        if tag != file.version or len(data) != count:
            raise changed(self, file)
        return data

    def mark(self, file: DataFile) -> str:
        return file.version


def _by_path(file: DataFile) -> list[str]:
    """So that a folder comes before a file whose name only begins like it."""
    return file.name.split("/")
