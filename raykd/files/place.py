"""Where a store's files stand, by name: in a folder, or below a prefix of an S3 bucket.

The protocol asks three things of a place: a file is there whole or not at all, of many who create
one name just one wins, and what is written is read at once. It needs no rename and no lock, and
nothing is listed to be read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raykd.files.atomic import from_json

Address = Path | str  # a folder, or s3://bucket/prefix
URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[\w.=-]+)*/?", re.ASCII)


@dataclass(frozen=True)
class Found:
    """What a listing tells of a file."""

    bytes: int
    written_s: float  # since the epoch


class Place(Protocol):
    """Files by name, such as data/part-00003-<sha>.parquet; its text is what a user types."""

    @property
    def address(self) -> Address: ...

    @property
    def name(self) -> str:
        """The last part of the address."""
        ...

    def below(self, name: str) -> "Place":
        """A place within this one."""
        ...

    def put_once(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists, in one step; True if this call created it."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Create or replace a file in one step."""
        ...

    def get(self, name: str, *, last: int | None = None) -> bytes | None:
        """The bytes of a file, or just the last so many; None if it does not exist."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; nothing if there is none."""
        ...

    def listed(self, below: str = "") -> dict[str, Found]:
        """Every file in a folder and its folders, by its whole name, in order."""
        ...

    def folders(self, below: str = "") -> list[str]:
        """The names of the folders in a folder, in order."""
        ...

    def holds(self, records: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the files of these commit records are there, as far as can be told without
        fetching them.
        """
        ...


def at(address: "Address | Place") -> Place:
    """The place that an address names; a place is itself.

    ValueError for a URL that can not be one.
    """
    if not isinstance(address, Path | str):
        return address
    if is_url(address):
        from raykd.files.bucket import Bucket

        bucket, _, prefix = checked(str(address)).removeprefix("s3://").partition("/")
        return Bucket(bucket, prefix)
    from raykd.files.folder import Folder

    return Folder(Path(address))


def is_url(address: Address) -> bool:
    """Whether an address is of another machine, not a folder's."""
    return isinstance(address, str) and "://" in address


def checked(address: str) -> str:
    """The address without a last slash. ValueError says what a URL must be like."""
    if is_url(address) and not URL.fullmatch(address):
        form = "s3://bucket/prefix of letters, digits and . _ = -"
        raise ValueError(f"must be a folder or {form}, found {address!r}")
    return address.rstrip("/") or address


def within(home: Address, name: str) -> Address:
    """The address of a folder in a place."""
    return at(home).below(name).address


def read_json(place: Place, name: str) -> Any:
    """The JSON value in a file of a place, or None where there is none.

    StoreError if it is not JSON.
    """
    return from_json(place.get(name), f"{place}/{name}")
