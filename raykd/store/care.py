"""Care for an existing store: verify, show, repair, gc. None of them needs the teacher.

Each verb looks at the store and at the stores of its layers, which have no layers themselves. A
store of another schema, of which nothing is known here, is refused before anything is touched.
"""

import io
import re
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import RecipeError, StoreError
from raykd.files.address import Address
from raykd.files.atomic import to_json
from raykd.files.open import open_place
from raykd.files.place import Place, read_json_in
from raykd.store import layer_signals
from raykd.store.commit import Shard, record_of, rows_left_out
from raykd.store.manifest import PART, check_name, check_schema
from raykd.store.reader import Store, read_shard

HOUR_S = 3600
LIVE_S = 900  # a writer commits a shard within this time of writing it
HALF_WRITTEN = re.compile(
    r"(data/\.part-\d{5,}-[0-9a-f]{16}\.parquet|_(commits|quarantine|sums)/\.\d{5,}\.json"
    r"|\._(RECIPE|MANIFEST|TIMING)\.json)\.[0-9a-f]{32}\.tmp"
)
Fault = dict[str, str]


def shards(where: Address | Place) -> tuple[Sequence[dict[str, Any]], list[Fault]]:
    """(every shard's record, the faults of the records). StoreError if the place is no store.

    The records are the manifest's; without a sound manifest, those commits that can be read.
    """
    place = open_place(where)
    _check_schemas(place)
    identity = _identity(place)
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
        return [record for record in committed.values() if record], faults
    wanted = {_commit(record): record for record in known}
    faults = []
    if committed and not known:
        faults.append({"file": "_MANIFEST.json", "fault": "names no shard, and some are there"})
    if identity is None:
        faults.append({"file": "_RECIPE.json", "fault": "not the manifest's identity"})
    faults += [
        {"file": name, "fault": "not the manifest's record"}
        for name, record in wanted.items()
        if committed.get(name) != record
    ]
    return known, faults


def _check_schemas(place: Place) -> None:
    """StoreError if a store, finished or not, is of another schema."""
    for name in ("_RECIPE.json", "_MANIFEST.json"):
        try:
            content = read_json_in(place, name)
        except StoreError:  # what is no JSON is damaged, and is told as such
            continue
        check_schema(place, content, name)


def _identity(place: Place) -> dict[str, Any] | None:
    """What a store is the store of; None if its _RECIPE.json is not what its manifest says.

    StoreError if the place is no store, or another store than its name says.
    """
    if place.get("_RECIPE.json") is None:
        raise StoreError(f"{place} is not a teacher store: it has no _RECIPE.json")
    try:
        finished = Store(place)
    except StoreError:
        identity = read_json_in(place, "_RECIPE.json")
        check_name(place, identity)
        return identity
    try:
        identity = read_json_in(place, "_RECIPE.json")
    except StoreError:
        return None
    return identity if identity == finished.manifest["identity"] else None


def _record(place: Place, name: str) -> dict[str, Any] | None:
    """The commit record in a file; None if it cannot be one of that name."""
    try:
        record = read_json_in(place, name)
        _shard_of(record)
        sound = PART.fullmatch(record["file"]) and name == _commit(record) and record["rows"] >= 0
    except (StoreError, KeyError, TypeError, ValueError):
        return None
    return record if sound else None


def _shard_of(record: dict[str, Any]) -> Shard:
    return Shard(
        number=record["number"],
        split=record["split"],
        first=record["first"],
        last=record["last"],
    )


def _commit(record: dict[str, Any]) -> str:
    return f"_commits/{record['number']:05d}.json"


def _is_finished(place: Place) -> bool:
    return place.get("_MANIFEST.json") is not None


def verify(where: Address | Place) -> dict[str, Any]:
    """Check every file against its digest and bounds, and its pages against their checksums.

    {"complete", "shards": how many, "damaged": [{"file", "fault"}]}.
    """
    complete = True
    count = 0
    damaged = []
    for prefix, place in _stores(open_place(where)):
        known, faults = shards(place)
        faults += [fault for record in known if (fault := _fault(place, record))]
        complete &= _is_finished(place) and not faults
        count += len(known)
        damaged += [fault | {"file": prefix + fault["file"]} for fault in faults]
    return {"complete": complete, "shards": count, "damaged": damaged}


def _stores(place: Place) -> list[tuple[str, Place]]:
    """A store and those of its inner layers, each with what its files' names begin with.

    StoreError if one is no store, of another schema, or a layer of another store.
    """
    _check_schemas(place)
    identity = _identity(place)
    layers = layer_signals.stores_below(place)
    if layers and identity is None:
        identity = Store(place).manifest["identity"]
    for layer in layers:
        _check_schemas(layer)
        assert identity is not None
        if read_json_in(layer, "_RECIPE.json") != identity | {"signal": layer.name}:
            raise StoreError(
                f"{layer} is a layer of another store; delete that folder, then type: raykd score "
                "RECIPE"
            )
    below = [(f"{layer_signals.FOLDER}/{layer.name}/", layer) for layer in layers]
    return [("", place), *below]


def _fault(place: Place, record: dict[str, Any]) -> Fault | None:
    """What is wrong with a shard's file; None if it is sound."""
    try:
        read_shard(place, record)
        data = place.get(record["file"]) or b""
        if record_of(_shard_of(record), data) != record:
            return {"file": record["file"], "fault": "its record is not that of its bytes"}
        missing = record["last"] - record["first"] - record["rows"]
        if missing != len(quarantined(place, record)):
            return {"file": record["file"], "fault": f"{missing} rows are missing without a reason"}
    except StoreError as error:
        return {"file": record["file"], "fault": str(error)}
    return None


def quarantined(place: Place, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a shard leaves out, each with the reason."""
    if record["rows"] == record["last"] - record["first"]:
        return []
    return rows_left_out(place, _quarantine(record))


def _quarantine(record: dict[str, Any]) -> str:
    return f"_quarantine/{record['number']:05d}.json"


def show(where: Address | Place) -> dict[str, Any]:
    """What a store holds: its identity, rows and bytes by split, type and bytes of each column."""
    place = open_place(where)
    splits: dict[str, dict[str, int]] = {}
    columns: dict[str, dict[str, Any]] = {}
    unreadable = []
    for prefix, part in _stores(place):
        rows = 0
        held: dict[str, dict[str, Any]] = {}
        for record in shards(part)[0]:
            rows += record["rows"]
            split = splits.setdefault(record["split"], {"rows": 0, "bytes": 0})
            split["rows"] += 0 if prefix else record["rows"]
            split["bytes"] += record["bytes"]
            try:
                _add_columns(held, _footer(part, record["file"]))
            except (OSError, pa.ArrowException):
                unreadable.append(prefix + record["file"])
        for column in held.values():
            column["bytes_per_row"] = round(column.pop("bytes") / max(rows, 1), 2)
        columns |= {name: held[name] for name in held if not prefix or name == part.name}
    known, _ = shards(place)
    complete = _is_finished(place)
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
    """A Parquet file's footer, fetched alone: its length is before the file's last four bytes."""
    length = int.from_bytes((place.get(name, last=8) or b"")[:4], "little")
    return pq.read_metadata(io.BytesIO(place.get(name, last=length + 8) or b""))


def _add_columns(columns: dict[str, dict[str, Any]], footer: pq.FileMetaData) -> None:
    """Add the compressed bytes of each column, from a file's footer."""
    for field in footer.schema.to_arrow_schema():
        columns.setdefault(field.name, {"type": str(field.type), "bytes": 0})
    for group in range(footer.num_row_groups):
        for i in range(footer.num_columns):
            chunk = footer.row_group(group).column(i)
            name = chunk.path_in_schema
            if name not in columns:
                name = name.rpartition(".")[0]  # a struct's child
            columns[name]["bytes"] += chunk.total_compressed_size


def repair(where: Address | Place) -> list[str]:
    """Remove damaged files with the records of their shards; the names of these files.

    Scoring then does just these shards again. In a complete store, a lost commit record and the
    store's identity are written again from the manifest.
    """
    removed = []
    for prefix, place in _stores(open_place(where)):
        removed += [prefix + name for name in _repair(place)]
    return removed


def _repair(place: Place) -> list[str]:
    known, faults = shards(place)
    for fault in faults:
        place.delete(fault["file"])
    if "_RECIPE.json" in [fault["file"] for fault in faults]:
        place.put("_RECIPE.json", to_json(Store(place).manifest["identity"]))
    removed = [fault["file"] for fault in faults]
    damaged = [record for record in known if _fault(place, record)]
    for record in known:
        if record in damaged:
            place.delete(_commit(record))
            place.delete(_quarantine(record))
            place.delete(f"_sums/{record['number']:05d}.json")
            place.delete(record["file"])
            removed.append(record["file"])
        elif place.get(_commit(record)) is None:
            place.put(_commit(record), to_json(record))
    return removed


def rewriting_hint(where: Address | Place) -> str:
    """What to type to write a store's missing shards: to score, or to train for a log of drafts."""
    identity = read_json_in(open_place(where), "_RECIPE.json")
    if isinstance(identity, dict) and "drafts" in identity:
        return "delete arms/ARM/arm.json of its run and type: raykd train RECIPE"
    return "type: raykd score RECIPE"


def gc(where: Address | Place, *, older_than_s: float, force: bool = False) -> list[str]:
    """Remove shards that no record names and files left half written, as killed writers leave them;
    the names of these files.

    Only files whose names only a writer of stores gives, written at least `older_than_s` seconds
    ago. RecipeError below an hour, in which a writer may be about to commit, unless `force`; even
    then what is younger than LIVE_S stays in a store that is not finished.
    """
    least_s = 0 if force else HOUR_S
    if not older_than_s >= least_s:
        raise RecipeError(
            f"--older-than: {older_than_s / HOUR_S:g} hours; shards younger than an hour may be a "
            "live writer's; give at least 1, or with --force at least 0"
        )
    removed = []
    for prefix, place in _stores(open_place(where)):
        removed += [prefix + name for name in _left_over(place, older_than_s)]
    return removed


def _left_over(place: Place, older_than_s: float) -> list[str]:
    """Remove what writers left in one store; the names of these files."""
    known, _ = shards(place)
    named = {record["file"] for record in known}
    if not _is_finished(place):
        older_than_s = max(older_than_s, LIVE_S)
    now = time.time()
    removed = []
    for name, entry in place.listed().items():
        is_left = (PART.fullmatch(name) and name not in named) or HALF_WRITTEN.fullmatch(name)
        if is_left and now - entry.written_s >= older_than_s:
            place.delete(name)
            removed.append(name)
    return removed


def differences(wanted: Any, stored: Any, key: str = "") -> list[str]:
    """Where two identities differ, a line a field: "key: A wanted, B stored"."""
    if isinstance(wanted, dict) and isinstance(stored, dict):
        lines = []
        for name in sorted(wanted.keys() | stored.keys()):
            field = f"{key}.{name}" if key else name
            lines += differences(wanted.get(name), stored.get(name), field)
        return lines
    return [] if wanted == stored else [f"{key}: {wanted} wanted, {stored} stored"]


def nearest(home: Address, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """{"store", "differences"} of the store below `home` whose identity is nearest to `wanted`."""
    place = open_place(home)
    candidates = []
    for store in (place.below(name) for name in place.folders()):
        try:
            stored = read_json_in(store, "_RECIPE.json")
        except StoreError:
            continue
        if stored is not None:
            lines = differences(wanted, stored)
            candidates.append({"store": str(store), "differences": lines})
    return min(candidates, key=lambda store: len(store["differences"]), default=None)
