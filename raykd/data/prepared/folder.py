"""How prepared rows are written: content-named files, put-once records, the manifest last.

    <id>/_SOURCE.json                         what the id is the digest of
         data/part-00003-00-<sha>.parquet     a part of unit 3
         _commits/00003.json                  the unit's record; the first to create it wins
         _MANIFEST.json                       written last: its presence means complete

A unit is what is read and committed as one. Two attempts at it write the same bytes under the same
names. Nothing is overwritten, and readers open only what the manifest names.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError
from raykd.files import faults, parquet
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.digests import digest_of
from raykd.files.open import address_below, open_place
from raykd.files.place import Place, holds, read_json_in

SCHEMA = 1
FILE = re.compile(r"data/part-\d{5,}-\d{2,}-[0-9a-f]{16}\.parquet")
MANIFEST = "_MANIFEST.json"
AGAIN = "delete it, then give the same command, which prepares just this part again"


class PartTable(NamedTuple):
    """A part that is to be written, and what its record says of it."""

    split: str
    table: pa.Table
    facts: dict[str, Any]


@dataclass(frozen=True)
class PreparedFolder:
    """The folder of one source's prepared rows, which any number of processes may write at once."""

    address: Address
    identity: dict[str, Any]

    @classmethod
    def of(cls, home: Address, identity: dict[str, Any]) -> "PreparedFolder":
        """The folder below `home` that is named by what its rows depend on."""
        return cls(address_below(home, digest_of(identity)[:16]), identity)

    @cached_property
    def place(self) -> Place:
        return open_place(self.address)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "identity": self.identity}

    # writing

    def begin(self) -> None:
        """Say of which source the rows are. StoreError where they are of another."""
        self.place.put_once("_SOURCE.json", to_json(self.identity))
        if read_json_in(self.place, "_SOURCE.json") != self.identity:
            raise StoreError(
                f"{self.place} holds the rows of another source; move that folder away"
            )

    def write(self, unit: int, number: int, part: PartTable) -> dict[str, Any]:
        """Write the file of a part, the unit's `number`-th; gives what the record says of it."""
        data = _bytes_of(part.table)
        sha = hashlib.sha256(data).hexdigest()
        name = f"data/part-{unit:05d}-{number:02d}-{sha[:16]}.parquet"
        faults.point("prepare", unit=unit, part=number, at="before_write")
        self.place.put_once(name, data)
        faults.point("prepare", unit=unit, part=number, at="written")
        written = {"file": name, "bytes": len(data), "sha256": sha, "split": part.split}
        return part.facts | written | {"content": _content_of(part.table)}

    def commit(
        self, unit: int, facts: dict[str, Any], parts: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Write the record of a unit whose files are written, which is given back.

        An earlier attempt's record stays.
        """
        record = facts | {"unit": unit, "parts": list(parts)}
        self.place.put_once(_record(unit), to_json(record))
        faults.point("prepare", unit=unit, at="after_commit")
        return record

    def record(self, unit: int) -> dict[str, Any] | None:
        """What was committed of a unit; None where nothing was."""
        return read_json_in(self.place, _record(unit))

    def missing(self, units: Iterable[int]) -> list[int]:
        """The units that are not committed, or whose files are not as their record says.

        What is left of the latter is removed. It costs a listing, and the reading of what is there.
        """
        recorded = self.place.listed("_commits")
        absent = []
        for unit in units:
            if _record(unit) in recorded and self._is_sound(unit):
                continue
            if _record(unit) in recorded:
                self._retract(unit)
            absent.append(unit)
        return absent

    def finish(self, body: dict[str, Any]) -> None:
        """Write the manifest. StoreError where one with other content stands there."""
        manifest = {"schema": SCHEMA, "identity": self.identity} | body
        manifest["sha256"] = digest_of(manifest)
        faults.point("prepare", at="before_manifest")
        self.place.put_once(MANIFEST, to_json(manifest))
        if read_json_in(self.place, MANIFEST) != manifest:
            raise StoreError(
                f"{self.place}: prepared again, the rows differ from their manifest; delete the "
                "folder"
            )

    def _is_sound(self, unit: int) -> bool:
        try:
            record = self.record(unit)
            return record is not None and holds(self.place, record["parts"])
        except (StoreError, KeyError, TypeError):
            return False

    def _retract(self, unit: int) -> None:
        """Remove a unit: its record first, so that no record is without its files."""
        self.place.delete(_record(unit))
        for name in self.place.listed("data"):
            if name.startswith(f"data/part-{unit:05d}-"):
                self.place.delete(name)

    # reading

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if all is prepared, and no file was removed or cut since.

        StoreError where it is damaged.
        """
        manifest = read_json_in(self.place, MANIFEST)
        if manifest is None:
            return None
        is_whole = isinstance(manifest, dict)
        if is_whole:
            body = {key: value for key, value in manifest.items() if key != "sha256"}
            is_whole = manifest.get("sha256") == digest_of(body)
        if not is_whole or manifest["identity"] != self.identity:
            raise StoreError(f"{self.place}/{MANIFEST} is damaged; {AGAIN}")
        sizes = {name: file.bytes for name, file in self.place.listed("data").items()}
        if any(sizes.get(part["file"]) != part["bytes"] for part in manifest["parts"]):
            return None
        return manifest

    def read(self, part: dict[str, Any]) -> pa.Table:
        """The rows of a part as they were written. StoreError names a file that has changed."""
        path = f"{self.place}/{part['file']}"
        if not FILE.fullmatch(part["file"]):
            raise StoreError(f"{self.place}: a record names {part['file']!r}, which is no part")
        data = self.place.get(part["file"])
        if data is None:
            raise StoreError(f"{path} is missing; give the same command, which prepares it again")
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise StoreError(f"{path} is damaged: its sha256 is not the manifest's; {AGAIN}")
        return parquet.read(data)


def _record(unit: int) -> str:
    return f"_commits/{unit:05d}.json"


def _bytes_of(table: pa.Table) -> bytes:
    """A part's file; every part has its own, so a row group is a file."""
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=max(table.num_rows, 1),
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _content_of(table: pa.Table) -> str:
    """Hex sha256 of a part's values, however they are compressed; no column has nulls."""
    state = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        state.update(f"{name} {column.type}".encode())
        if pa.types.is_list(column.type):
            state.update(column.value_lengths().to_numpy())
            column = column.flatten()
        state.update(column.to_numpy())
    return state.hexdigest()
