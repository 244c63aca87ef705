"""Where a store keeps its files, by name: in a folder, or below a prefix of an S3 bucket.

The protocol asks three things of a place: a file is there whole or not at all, of many who create
one name just one wins, and what is written is read at once. It needs no rename and no lock, and
nothing is listed to be read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from raykd.files.address import Address
from raykd.files.atomic import from_json

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing reports of a file."""

    bytes: int
    written_s: float  # since the epoch
    tag: str = ""  # of a bucket: the ETag, which changes with the content


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

    def listed(self, below: str = "") -> dict[str, Listed]:
        """Every file in a folder and its folders, by its whole name, in order."""
        ...

    def folders(self, below: str = "") -> list[str]:
        """The names of the folders in a folder, in order."""
        ...

    @property
    def is_near(self) -> bool:
        """Whether a file is read at once, so that its digest may be asked for at any time."""
        ...

    def lacking(self, records: Iterable[Record]) -> Iterator[Record]:
        """Those of these commit records whose files are not there as they say, as far as can be
        told without fetching them.
        """
        ...


def holds(place: Place, records: Iterable[Record]) -> bool:
    """Whether the files of these commit records are there, as far as can be told without fetching
    them.
    """
    return next(iter(place.lacking(records)), None) is None


def read_json_in(place: Place, name: str) -> Any:
    """The JSON value in a file of a place, or None where there is none.

    StoreError if it is not JSON.
    """
    return from_json(place.get(name), f"{place}/{name}")
