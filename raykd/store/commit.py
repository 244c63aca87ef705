"""How a store is written: fixed shards, content-named files, put-once commits, the manifest last.

    <store_id>/_RECIPE.json                     what the id is the digest of
               data/part-00003-<sha>.parquet
               _quarantine/00003.json           rows that could not be scored, with the reasons
               _sums/00003.json                 of rows in parts: what it adds to the statistics
               _commits/00003.json              a shard's record; the first to create it wins
               _MANIFEST.json                   written last: its presence means complete

A file is named by its content, so two attempts at a shard either write the same bytes under the
same name or write different files. Nothing is overwritten, and nothing is listed to be read:
readers open only what the manifest names.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError
from raykd.files import faults
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.digests import digest_of
from raykd.files.open import open_place
from raykd.files.place import Place, read_json_in
from raykd.files.waiting import in_turn
from raykd.store import bounds
from raykd.store.shard_records import (
    ShardRecords,
    digest_of_manifest,
    file_of,
    is_usual,
    manifest_of,
    text_of,
)

SCHEMA = 1
MANIFEST = "_MANIFEST.json"
READERS = 64  # small files of a bucket that are read at a time
TOGETHER = 64  # of them that one thread reads in turn


@dataclass(frozen=True, slots=True)
class Shard:
    """A fixed range of row positions [first, last) within one split."""

    number: int
    split: str
    first: int
    last: int


def plan_shards(rows: Mapping[str, int | Sequence[int]], rows_per_shard: int) -> list[Shard]:
    """The shards of a data set, numbered across its splits; none spans two splits.

    `rows` are those of each split, or of each of its parts; then none spans two parts.
    """
    shards: list[Shard] = []
    for split, told in rows.items():
        counts = [told] if isinstance(told, int) else told
        start = 0
        for count in counts:
            for first in range(start, start + count, rows_per_shard):
                last = min(first + rows_per_shard, start + count)
                shards.append(Shard(number=len(shards), split=split, first=first, last=last))
            start += count
    return shards


def store_id(identity: dict[str, Any]) -> str:
    """Sixteen hex digits that name a store: the digest of everything its content depends on."""
    return digest_of(identity)[:16]


class StoreWriter:
    """One store that is being written, by any number of processes at once."""

    def __init__(self, where: Address | Place, identity: dict[str, Any]):
        self.place = open_place(where)
        self.identity = identity
        self._known = ShardRecords()  # of a place that is far, as `missing` has read them
        self.place.put_once("_RECIPE.json", to_json(identity))
        if read_json_in(self.place, "_RECIPE.json") != identity:
            raise StoreError(
                f"{self.place} holds the store of another recipe; move that folder away, or give "
                "another --out"
            )

    @property
    def folder(self) -> Address:
        return self.place.address

    def commit(
        self,
        shard: Shard,
        table: pa.Table,
        bad: dict[int, str] | None = None,
        sums: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write a shard's file, then its record; returns the stored record.

        That is an earlier attempt's record if there is one. `bad` are the rows of the shard that
        `table` lacks, by row id, each with the reason. `sums` are what it adds to the statistics.
        """
        data = to_parquet(table)
        record = record_of(shard, data)
        assert record["rows"] == shard.last - shard.first - len(bad or {})
        bounds.check(data, table.num_rows, record["file"])
        faults.point("score", shard=shard.number, at="before_write")
        self.place.put_once(record["file"], data)
        if bad:
            rows = [{"row_id": row_id, "reason": reason} for row_id, reason in sorted(bad.items())]
            quarantine = {"shard": shard.number, "split": shard.split, "rows": rows}
            self.place.put(_quarantine(shard), to_json(quarantine))
        if sums is not None:
            self.put_sums(record, sums)
        faults.point("score", shard=shard.number, at="before_commit")
        self.place.put_once(_record(shard), to_json(record))
        faults.point("score", shard=shard.number, at="after_commit")
        return read_json_in(self.place, _record(shard))

    def put_sums(self, record: dict[str, Any], sums: dict[str, Any]) -> None:
        """Keep what the shard of a record adds to the statistics."""
        told = {"sha256": record["sha256"], "sums": sums}
        self.place.put(_sums(record["number"]), to_json(told))

    def sums(self, record: dict[str, Any]) -> Any:
        """What the shard of a record adds to the statistics; None where that is not kept, or is of
        other bytes.
        """
        try:
            told = read_json_in(self.place, _sums(record["number"]))
        except StoreError:
            return None
        if not isinstance(told, dict) or told.get("sha256") != record["sha256"]:
            return None
        return told.get("sums")

    def missing(self, shards: list[Shard]) -> list[Shard]:
        """The shards still to score: those whose record or file is missing or damaged.

        A damaged shard's record and file are removed; scoring it again writes the same bytes. It
        costs a listing, and the reading of what is recorded.
        """
        recorded = self.place.listed("_commits")
        unsound = set() if self.place.is_near else self._unsound_far(shards, recorded)
        absent = []
        for shard in shards:
            if _record(shard) not in recorded:
                absent.append(shard)
            elif shard.number in unsound or (self.place.is_near and not self.is_sound(shard)):
                self.retract(shard)
                absent.append(shard)
        return absent

    def _unsound_far(self, shards: Sequence[Shard], recorded: Mapping[str, Any]) -> set[int]:
        """The numbers of recorded shards whose record is damaged, or whose file is missing or cut.

        Of a place that is far no file is fetched for it: a digest is checked by who reads it.
        """
        there = [shard for shard in shards if _record(shard) in recorded]
        unsound = set()
        known = ShardRecords()
        for shard, record in zip(there, self._read(there), strict=True):
            if is_record_of(shard, record) and self._says_what_it_lacks(shard, record):
                known.add_usual(record)
            else:
                unsound.add(shard.number)
        unsound |= {record["number"] for record in self.place.lacking(known)}
        self._known = known if not unsound else ShardRecords()
        return unsound

    def _says_what_it_lacks(self, shard: Shard, record: dict[str, Any]) -> bool:
        """Whether the rows that a shard's file lacks are told, one by one."""
        lacks = shard.last - shard.first - record["rows"]
        return not lacks or len(self._left_out(shard)) == lacks

    def _read(self, shards: Sequence[Shard]) -> Iterator[Any]:
        """The records of shards in their order; None where there is none, or no JSON."""

        def read(some: Sequence[Shard]) -> list[Any]:
            return [self._record_of(shard) for shard in some]

        together = [shards[at : at + TOGETHER] for at in range(0, len(shards), TOGETHER)]
        for found in in_turn(read, together, 1 if self.place.is_near else READERS):
            yield from found

    def _record_of(self, shard: Shard) -> Any:
        try:
            return read_json_in(self.place, _record(shard))
        except StoreError:
            return None

    def retract(self, shard: Shard) -> None:
        """Remove a shard: its record first, so that no record is without its file."""
        self._known = ShardRecords()
        self.place.delete(_record(shard))
        self.place.delete(_quarantine(shard))
        self.place.delete(_sums(shard.number))
        for name in self.place.listed("data"):
            if name.startswith(f"data/part-{shard.number:05d}-"):
                self.place.delete(name)

    def quarantined(self, shards: list[Shard]) -> dict[int, str]:
        """The rows of these shards that could not be scored: {row id: reason}."""
        written = self.place.listed("_quarantine")
        reasons: dict[int, str] = {}
        for shard in shards:
            if _quarantine(shard) in written and self._lacks(shard):
                reasons |= self._left_out(shard)
        return reasons

    def _left_out(self, shard: Shard) -> dict[int, str]:
        rows = rows_left_out(self.place, _quarantine(shard))
        return {row["row_id"]: row["reason"] for row in rows}

    def records(self, shards: list[Shard]) -> ShardRecords:
        """The commit records of all shards. StoreError names those that have none."""
        known = dict(zip(self._known.numbers(), range(len(self._known)), strict=True))
        read = self._read([shard for shard in shards if shard.number not in known])
        records = ShardRecords()
        absent = []
        for shard in shards:
            place = known.get(shard.number)
            if place is not None:
                records.add_from(self._known, place)
                continue
            record = next(read)
            if record is None:
                absent.append(shard.number)
            records.append(record)
        if absent:
            raise StoreError(
                f"{self.place}: shards {absent} are not scored; run `raykd score` again"
            )
        return records

    def finish(
        self, shards: list[Shard], statistics: dict[str, Any], records: ShardRecords | None = None
    ) -> dict[str, Any]:
        """The manifest, written once every shard is committed.

        `records` are those of the shards, where they have been read. StoreError names the shards
        that are not committed.
        """
        if records is None:
            records = self.records(shards)
        body = {
            "schema": SCHEMA,
            "store_id": self.place.name,
            "identity": self.identity,
            "shards": records,
            "bytes": records.total_bytes(),
            "statistics": statistics,
        }
        manifest = body | {"sha256": digest_of_manifest(body)}
        faults.point("score", at="before_manifest")
        text = text_of(manifest)
        self.place.put_once(MANIFEST, text)
        stored = self.place.get(MANIFEST)
        if stored != text and manifest_of(stored, f"{self.place}/{MANIFEST}") != manifest:
            raise StoreError(
                f"{self.place}: scored again, the store differs from its manifest; "
                "delete the folder"
            )
        return manifest

    def is_sound(self, shard: Shard) -> bool:
        """Whether a shard has a record that its file's bytes give again."""
        try:
            record = read_json_in(self.place, _record(shard))
            data = self.place.get(record["file"]) if record else None
            if data is None or record != record_of(shard, data):
                return False
            lacks = self._lacks(shard)
            return not lacks or len(self._left_out(shard)) == lacks
        except (StoreError, OSError, pa.ArrowException, KeyError, TypeError):
            return False

    def _lacks(self, shard: Shard) -> int:
        """How many of its rows a shard's file lacks."""
        try:
            record = read_json_in(self.place, _record(shard))
        except StoreError:
            record = None
        rows = record.get("rows") if isinstance(record, dict) else 0
        return shard.last - shard.first - (rows if isinstance(rows, int) else 0)


def is_record_of(shard: Shard, record: Any) -> bool:
    """Whether a value can be the record of a shard."""
    return (
        is_usual(record)
        and record["number"] == shard.number
        and record["split"] == shard.split
        and record["first"] == shard.first
        and record["last"] == shard.last
        and record["rows"] <= shard.last - shard.first
    )


def rows_left_out(place: Place, name: str) -> list[dict[str, Any]]:
    """The rows in a file of rows that could not be scored; none where it holds no such list."""
    try:
        quarantine = read_json_in(place, name)
    except StoreError:
        return []
    rows = quarantine.get("rows") if isinstance(quarantine, dict) else None
    if not isinstance(rows, list):
        return []
    known = [row for row in rows if isinstance(row, dict) and {"row_id", "reason"} <= row.keys()]
    return [row for row in known if isinstance(row["row_id"], int)]


def _quarantine(shard: Shard) -> str:
    return f"_quarantine/{shard.number:05d}.json"


def _sums(number: int) -> str:
    return f"_sums/{number:05d}.json"


def _record(shard: Shard) -> str:
    return f"_commits/{shard.number:05d}.json"


def to_parquet(table: pa.Table) -> bytes:
    """The bytes of a shard's file.

    It has no dictionary, because encoded rows do not repeat, and no statistics, which say nothing
    of bytes.
    """
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def record_of(shard: Shard, data: bytes) -> dict[str, Any]:
    """The commit record of a shard whose file holds `data`."""
    sha = hashlib.sha256(data).hexdigest()
    name = file_of(shard.number, sha)
    rows = pq.read_metadata(io.BytesIO(data)).num_rows
    return asdict(shard) | {"file": name, "bytes": len(data), "rows": rows, "sha256": sha}
