"""A finished store's manifest, held against its own digest, its shape, and the store's name."""

import re
from typing import Any

from raykd.errors import StoreError
from raykd.files.digests import digest_of
from raykd.files.place import Place, read_json_in
from raykd.store.commit import MANIFEST, SCHEMA, store_id
from raykd.store.shard_records import ShardRecords, digest_of_manifest, manifest_of

PART = re.compile(r"data/part-\d{5,}-[0-9a-f]{16}\.parquet")
ID = re.compile(r"[0-9a-f]{16}")  # names that are ids; layers and logs of drafts have other names
NUMBERS = ("number", "first", "last", "bytes", "rows")  # of a shard's record
TEXTS = ("split", "file", "sha256")


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a store.

    StoreError if there is none, if it is damaged, or if it is of another store than the place's
    name says.
    """
    manifest = manifest_of(place.get(MANIFEST), f"{place}/{MANIFEST}")
    if manifest is None:
        raise StoreError(
            f"{place} is not a complete store: it has no manifest; run `raykd score` to finish it"
        )
    path = f"{place}/_MANIFEST.json"
    again = f"type: raykd store repair {place}"
    if not isinstance(manifest, dict):
        raise StoreError(f"{path} is damaged: no object of keys and values; {again}")
    check_schema(place, manifest, "_MANIFEST.json")
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    is_whole = isinstance(manifest.get("shards"), ShardRecords)
    found = digest_of_manifest(body) if is_whole else digest_of(body)
    if found != manifest.get("sha256"):
        raise StoreError(f"{path} is damaged: its digest does not match; {again}")
    if not _has_shape(manifest):
        raise StoreError(f"{path} is damaged: it lacks what a manifest holds; {again}")
    check_name(place, manifest["identity"])
    return manifest


def check_schema(place: Place, content: Any, name: str) -> None:
    """StoreError if a file of a store says that it is of another schema.

    Of such a store nothing is known here: what looks damaged, or left over, may be sound.
    """
    schema = content.get("schema", SCHEMA) if isinstance(content, dict) else SCHEMA
    if schema != SCHEMA:
        raise StoreError(
            f"{place}/{name} is of schema {schema!r:.40}, and this raykd reads {SCHEMA}; "
            "use the raykd that wrote it, or score again in another --out"
        )


def check_name(place: Place, identity: Any) -> None:
    """StoreError if a place whose name is an id holds a store of another identity."""
    if not ID.fullmatch(place.name):
        return
    found = store_id(identity)
    if found != place.name:
        raise StoreError(
            f"{place} holds the store {found}: another teacher, other data or other settings than "
            f"its name stands for; rename the folder to {found}, then type: raykd score RECIPE"
        )


def seconds_of(place: Place) -> float | None:
    """The teacher's CPU seconds that a store took; None where nobody wrote them down.

    StoreError if the file holds something else.
    """
    timing = read_json_in(place, "_TIMING.json")
    if timing is None:
        return None
    seconds = timing.get("seconds") if isinstance(timing, dict) else None
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or seconds < 0:
        raise StoreError(f"{place}/_TIMING.json is damaged: no seconds in it; delete it")
    return float(seconds)


def _has_shape(manifest: dict[str, Any]) -> bool:
    records = manifest.get("shards")
    return (
        manifest.get("schema") == SCHEMA
        and isinstance(manifest.get("identity"), dict)
        and isinstance(manifest.get("statistics"), dict)
        and isinstance(records, ShardRecords)
        and all(map(_is_record, records.others.values()))
    )


def _is_record(record: Any) -> bool:
    """Whether a value can be a shard's record."""
    return (
        isinstance(record, dict)
        and all(type(record.get(name)) is int and record[name] >= 0 for name in NUMBERS)
        and all(isinstance(record.get(name), str) for name in TEXTS)
        and PART.fullmatch(record["file"]) is not None
    )
