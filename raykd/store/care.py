"""Looking after a store that stands: verify, show, repair, gc. None of them needs the teacher."""

import io
import re
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.open import open_place
from raykd.files.place import Place, read_json_in
from raykd.store import layer_signals
from raykd.store.commit import Shard, record_of
from raykd.store.reader import PART, Store, read_shard

KEPT = ("_RECIPE.json", "_MANIFEST.json", "_TIMING.json")
RECORD = re.compile(r"_(commits|quarantine)/[^/]*\.json")
Fault = dict[str, str]


def shards(where: Address | Place) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(every shard's record, what is wrong with the records). StoreError if the place is no store.

    A sound manifest has the records; without one they are those that are committed and can be read.
    """
    place = open_place(where)
    if read_json_in(place, "_RECIPE.json") is None:
        raise StoreError(f"{place} is not a teacher store: it has no _RECIPE.json")
    committed = {
        name: _record(place, name) for name in place.listed("_commits") if name.endswith(".json")
    }
    try:
        known = Store(place).manifest["shards"]
    except StoreError as error:
        faults = [
            {"file": name, "fault": "no shard's record"}
            for name, record in committed.items()
            if not record
        ]
        if _is_finished(place):
            faults.append({"file": "_MANIFEST.json", "fault": str(error)})
        return [r for r in committed.values() if r], faults
    wanted = {_commit(record): record for record in known}
    faults = [name for name, record in wanted.items() if committed.get(name) != record]
    return known, [{"file": name, "fault": "not the manifest's record"} for name in faults]


def _record(place: Place, name: str) -> dict[str, Any] | None:
    """The commit record in a file; None if it can not be one of that name."""
    try:
        found = read_json_in(place, name)
        Shard(*(found[key] for key in ("number", "split", "first", "last")))
        sound = PART.fullmatch(found["file"]) and name == _commit(found) and found["rows"] >= 0
    except (StoreError, KeyError, TypeError, ValueError):
        return None
    return found if sound else None


def _commit(record: dict[str, Any]) -> str:
    return f"_commits/{record['number']:05d}.json"


def _is_finished(place: Place) -> bool:
    return place.get("_MANIFEST.json") is not None


def verify(where: Address | Place) -> dict[str, Any]:
    """Every file against its digest and bounds, its pages against their checksums."""
    place = open_place(where)
    known, damaged = shards(place)
    damaged += [fault for record in known if (fault := _fault(place, record))]
    complete = _is_finished(place) and not damaged
    for layer in layer_signals.stored(place):
        below = verify(layer)
        complete &= below["complete"]
        known = known + below["shards"] * [{}]
        damaged += [
            d | {"file": f"{layer_signals.FOLDER}/{layer.name}/{d['file']}"}
            for d in below["damaged"]
        ]
    return {"complete": complete, "shards": len(known), "damaged": damaged}


def _fault(place: Place, record: dict[str, Any]) -> Fault | None:
    """What is wrong with a shard's file; None if it is sound."""
    try:
        read_shard(place, record)
        shard = Shard(*(record[key] for key in ("number", "split", "first", "last")))
        if record_of(shard, place.get(record["file"]) or b"") != record:
            return {"file": record["file"], "fault": "its record is not that of its bytes"}
        lacks = record["last"] - record["first"] - record["rows"]
        if lacks != len(quarantined(place, record)):
            return {"file": record["file"], "fault": f"{lacks} rows are missing without a reason"}
    except StoreError as error:
        return {"file": record["file"], "fault": str(error)}
    return None


def quarantined(place: Place, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a shard leaves out, each with the reason."""
    if record["rows"] == record["last"] - record["first"]:
        return []
    found = read_json_in(place, f"_quarantine/{record['number']:05d}.json") or {}
    return list(found.get("rows", []))


def show(where: Address | Place) -> dict[str, Any]:
    """What a store is: identity, rows and bytes by split, and each column with its type and bytes a
    row.
    """
    place = open_place(where)
    known, _ = shards(place)
    splits: dict[str, dict[str, int]] = {}
    columns: dict[str, dict[str, Any]] = {}
    unreadable = []
    for record in known:
        part = splits.setdefault(record["split"], {"rows": 0, "bytes": 0})
        part["rows"] += record["rows"]
        part["bytes"] += record["bytes"]
        try:
            _add_columns(columns, _footer(place, record["file"]))
        except (OSError, pa.ArrowException):
            unreadable.append(record["file"])
    rows = sum(part["rows"] for part in splits.values())
    for column in columns.values():
        column["bytes_per_row"] = round(column.pop("bytes") / max(rows, 1), 2)
    complete = _is_finished(place)
    for layer in layer_signals.stored(place):
        below = show(layer)
        columns |= {name: column for name, column in below["columns"].items() if name == layer.name}
        for name, part in below["splits"].items():
            splits.setdefault(name, {"rows": part["rows"], "bytes": 0})["bytes"] += part["bytes"]
    return {
        "store": str(place),
        "complete": complete,
        "identity": read_json_in(place, "_RECIPE.json"),
        "splits": splits,
        "columns": columns,
        "quarantined": [row for record in known for row in quarantined(place, record)],
        "unreadable": unreadable,
        "statistics": read_json_in(place, "_MANIFEST.json").get("statistics") if complete else None,
    }


def _footer(place: Place, name: str) -> pq.FileMetaData:
    """A Parquet file's footer, fetched alone: its own length stands before the last four bytes."""
    length = int.from_bytes((place.get(name, last=8) or b"")[:4], "little")
    return pq.read_metadata(io.BytesIO(place.get(name, last=length + 8) or b""))


def _add_columns(columns: dict[str, dict[str, Any]], footer: pq.FileMetaData) -> None:
    """Compressed bytes of each column, from a file's footer."""
    for field in footer.schema.to_arrow_schema():
        columns.setdefault(field.name, {"type": str(field.type), "bytes": 0})
    for group in range(footer.num_row_groups):
        for i in range(footer.num_columns):
            part = footer.row_group(group).column(i)
            whole = part.path_in_schema  # of a struct's child it ends in the child's name
            columns[whole if whole in columns else whole.rpartition(".")[0]]["bytes"] += (
                part.total_compressed_size
            )


def repair(where: Address | Place) -> list[str]:
    """Damaged files, removed with the records of their shards, so that scoring does just these
    again; their names.

    Of a store that stands, a commit record that is lost is written again from the manifest.
    """
    place = open_place(where)
    known, faults = shards(place)
    for fault in faults:
        place.delete(fault["file"])
    doubtful = [record for record in known if _fault(place, record)]
    for record in known:
        if record in doubtful:
            place.delete(_commit(record))
            place.delete(f"_quarantine/{record['number']:05d}.json")
            place.delete(record["file"])
        elif place.get(_commit(record)) is None:
            place.put(_commit(record), to_json(record))
    below = [
        f"{layer_signals.FOLDER}/{layer.name}/{name}"
        for layer in layer_signals.stored(place)
        for name in repair(layer)
    ]
    return [fault["file"] for fault in faults] + [record["file"] for record in doubtful] + below


def again(where: Address | Place) -> str:
    """What writes the missing shards of a store: scoring, or for a log of drafts the training that
    kept them.
    """
    if "drafts" in (read_json_in(open_place(where), "_RECIPE.json") or {}):
        return "delete arms/ARM/arm.json of its run and type: raykd train RECIPE"
    return "type: raykd score RECIPE"


def gc(where: Address | Place, *, older_than_s: float) -> list[str]:
    """Files that no record names and that have stood for `older_than_s`, removed: what killed
    writers left behind.
    """
    place = open_place(where)
    named = {record["file"] for record in shards(place)[0]} | set(KEPT)
    now, removed = time.time(), []
    for layer in layer_signals.stored(place):
        removed += [
            f"{layer_signals.FOLDER}/{layer.name}/{name}"
            for name in gc(layer, older_than_s=older_than_s)
        ]
    for name, found in place.listed().items():
        is_ours = (
            name in named or RECORD.fullmatch(name) or name.startswith(f"{layer_signals.FOLDER}/")
        )
        if not is_ours and now - found.written_s > older_than_s:
            place.delete(name)
            removed.append(name)
    return removed


def differences(wanted: Any, found: Any, key: str = "") -> list[str]:
    """Field by field, where two identities differ: "teacher.weights: sha256:12 here, sha256:34
    there".
    """
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | found.keys())
        return [
            d
            for k in keys
            for d in differences(wanted.get(k), found.get(k), f"{key}.{k}" if key else k)
        ]
    return [] if wanted == found else [f"{key}: {wanted} wanted, {found} stored"]


def nearest(home: Address, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Of the stores in a place the one whose identity is nearest to the wanted: {"store",
    "differences"}.
    """
    found = []
    for store in (open_place(home).below(name) for name in open_place(home).folders()):
        try:
            stored = read_json_in(store, "_RECIPE.json")
        except StoreError:
            continue
        if stored is not None:
            found.append({"store": str(store), "differences": differences(wanted, stored)})
    return min(found, key=lambda store: len(store["differences"]), default=None)
