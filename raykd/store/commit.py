"""How a store comes into being: fixed shards, content-named files, put-once commits, the manifest
last.

    <store_id>/_RECIPE.json            what the id is the digest of, in clear
               data/part-00003-<sha>.parquet
               _quarantine/00003.json      only where rows could not be scored: which, and why
               _commits/00003.json     one record a shard; the first to create it wins
               _MANIFEST.json          written last: its presence means complete

A file is named by its content, so two attempts at one shard either write the same bytes under the
same name or can not meet. Nothing is renamed over, nothing is listed to be read: readers open only
what the manifest names.
"""

import hashlib
import io
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
from raykd.store import bounds

SCHEMA = 1


@dataclass(frozen=True)
class Shard:
    """A fixed range of row positions [first, last) within one split."""

    number: int
    split: str
    first: int
    last: int


def plan_shards(rows: dict[str, int], rows_per_shard: int) -> list[Shard]:
    """The shards of a data set, numbered across its splits; none spans two splits."""
    ranges = [
        (split, first, min(first + rows_per_shard, count))
        for split, count in rows.items()
        for first in range(0, count, rows_per_shard)
    ]
    return [Shard(i, *r) for i, r in enumerate(ranges)]


def store_id(identity: dict[str, Any]) -> str:
    """Sixteen hex digits that name a store: the digest of everything its content depends on."""
    return digest_of(identity)[:16]


class StoreWriter:
    """One store being written, by any number of processes at once."""

    def __init__(self, where: Address | Place, identity: dict[str, Any]):
        self.place = open_place(where)
        self.identity = identity
        self.place.put_once("_RECIPE.json", to_json(identity))
        if read_json_in(self.place, "_RECIPE.json") != identity:
            raise StoreError(f"{self.place} holds the store of another recipe; give another --out")

    @property
    def folder(self) -> Address:
        return self.place.address

    def commit(
        self, shard: Shard, table: pa.Table, bad: dict[int, str] | None = None
    ) -> dict[str, Any]:
        """Write one shard whole, then its record; the record that stands, ours or an earlier
        attempt's.

        `bad` are the rows of the shard that `table` lacks, each with the reason.
        """
        data = to_parquet(table)
        record = record_of(shard, data)
        assert record["rows"] == shard.last - shard.first - len(bad or {})
        bounds.check(data, table.num_rows, record["file"])
        faults.point("score", shard=shard.number, at="before_write")
        self.place.put_once(record["file"], data)
        if bad:
            rows = [{"row_id": row_id, "reason": reason} for row_id, reason in sorted(bad.items())]
            told = {"shard": shard.number, "split": shard.split, "rows": rows}
            self.place.put(_quarantine(shard), to_json(told))
        faults.point("score", shard=shard.number, at="before_commit")
        self.place.put_once(_record(shard), to_json(record))
        faults.point("score", shard=shard.number, at="after_commit")
        return read_json_in(self.place, _record(shard))

    def missing(self, shards: list[Shard]) -> list[Shard]:
        """The shards still to score: those without a record, or whose record or file is gone or
        damaged.

        A damaged shard's record and file are removed; scoring it again writes the same bytes.
        """
        absent = [s for s in shards if not self.stands(s)]
        for shard in absent:
            if self.place.get(_record(shard)) is not None:
                self.retract(shard)
        return absent

    def retract(self, shard: Shard) -> None:
        """Remove a shard: its record first, so that no record is without its file."""
        self.place.delete(_record(shard))
        self.place.delete(_quarantine(shard))
        for name in self.place.listed("data"):
            if name.startswith(f"data/part-{shard.number:05d}-"):
                self.place.delete(name)

    def quarantined(self, shards: list[Shard]) -> dict[int, str]:
        """Each row of these shards that could not be scored, with the reason."""
        found = [read_json_in(self.place, _quarantine(s)) for s in shards if self._lacks(s)]
        return {row["row_id"]: row["reason"] for f in found if f for row in f["rows"]}

    def records(self, shards: list[Shard]) -> list[dict[str, Any]]:
        """The commit records of all shards. StoreError names those that have none."""
        found = [read_json_in(self.place, _record(shard)) for shard in shards]
        if absent := [s.number for s, r in zip(shards, found, strict=True) if r is None]:
            raise StoreError(
                f"{self.place}: shards {absent} are not scored; run `raykd score` again"
            )
        return found

    def finish(self, shards: list[Shard], statistics: dict[str, Any]) -> dict[str, Any]:
        """The manifest, written once every shard is committed.

        StoreError names the shards that are not.
        """
        records = self.records(shards)
        body = {
            "schema": SCHEMA,
            "store_id": self.place.name,
            "identity": self.identity,
            "shards": records,
        }
        body |= {"bytes": sum(r["bytes"] for r in records), "statistics": statistics}
        manifest = body | {"sha256": digest_of(body)}
        faults.point("score", at="before_manifest")
        self.place.put_once("_MANIFEST.json", to_json(manifest))
        standing = read_json_in(self.place, "_MANIFEST.json")
        if standing != manifest:
            raise StoreError(
                f"{self.place}: scored again, the store differs from its manifest; delete the folder"
            )
        return standing

    def stands(self, shard: Shard) -> bool:
        """Whether a shard has a record, and its file's bytes give just that record."""
        try:
            record = read_json_in(self.place, _record(shard))
            data = self.place.get(record["file"]) if record else None
            if data is None or record != record_of(shard, data):
                return False
            return len(self.quarantined([shard])) == self._lacks(shard)
        except (StoreError, OSError, pa.ArrowException, KeyError, TypeError):
            return False

    def _lacks(self, shard: Shard) -> int:
        """How many of its rows a shard's file lacks."""
        record = read_json_in(self.place, _record(shard)) or {}
        return shard.last - shard.first - record.get("rows", 0)


def _quarantine(shard: Shard) -> str:
    return f"_quarantine/{shard.number:05d}.json"


def _record(shard: Shard) -> str:
    return f"_commits/{shard.number:05d}.json"


def to_parquet(table: pa.Table) -> bytes:
    """A shard's file: no dictionary, because encoded rows do not repeat; no statistics of what is
    only bytes.
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
    name = f"data/part-{shard.number:05d}-{sha[:16]}.parquet"
    rows = pq.read_metadata(io.BytesIO(data)).num_rows
    return asdict(shard) | {"file": name, "bytes": len(data), "rows": rows, "sha256": sha}
