"""Looking after a store that stands: verify, show, repair, gc. None of them needs the teacher."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError
from raykd.files import read_json, write_json
from raykd.store import layers
from raykd.store.commit import Shard, record_of
from raykd.store.reader import PART, Store, read_shard

KEPT = ("_RECIPE.json", "_MANIFEST.json", "_TIMING.json")
Fault = dict[str, str]


def shards(folder: Path) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(every shard's record, what is wrong with the records). StoreError if the folder is no store.

    A sound manifest has the records; without one they are those that are committed and can be read.
    """
    if read_json(folder / "_RECIPE.json") is None:
        raise StoreError(f"{folder} is not a teacher store: it has no _RECIPE.json")
    committed = {path: _record(path) for path in sorted((folder / "_commits").glob("*.json"))}
    try:
        known = Store(folder).manifest["shards"]
    except StoreError as error:
        faults = [
            {"file": str(p.relative_to(folder)), "fault": "no shard's record"} for p, r in committed.items() if not r
        ]
        if (folder / "_MANIFEST.json").exists():
            faults.append({"file": "_MANIFEST.json", "fault": str(error)})
        return [r for r in committed.values() if r], faults
    wanted = {_commit(folder, record): record for record in known}
    faults = [path for path, record in wanted.items() if committed.get(path) != record]
    return known, [{"file": str(p.relative_to(folder)), "fault": "not the manifest's record"} for p in faults]


def _record(path: Path) -> dict[str, Any] | None:
    """The commit record in a file; None if it can not be one of that name."""
    try:
        found = read_json(path)
        Shard(*(found[key] for key in ("number", "split", "first", "last")))
        sound = PART.fullmatch(found["file"]) and path.stem == f"{found['number']:05d}" and found["rows"] >= 0
    except (StoreError, KeyError, TypeError, ValueError):
        return None
    return found if sound else None


def _commit(folder: Path, record: dict[str, Any]) -> Path:
    return folder / "_commits" / f"{record['number']:05d}.json"


def verify(folder: Path) -> dict[str, Any]:
    """Every file against its digest and bounds, its pages against their checksums."""
    known, damaged = shards(folder)
    damaged += [fault for record in known if (fault := _fault(folder, record))]
    complete = (folder / "_MANIFEST.json").exists() and not damaged
    for layer in layers.stored(folder):
        below = verify(layer)
        complete &= below["complete"]
        known = known + below["shards"] * [{}]
        damaged += [d | {"file": f"{layers.FOLDER}/{layer.name}/{d['file']}"} for d in below["damaged"]]
    return {"complete": complete, "shards": len(known), "damaged": damaged}


def _fault(folder: Path, record: dict[str, Any]) -> Fault | None:
    """What is wrong with a shard's file; None if it is sound."""
    try:
        read_shard(folder, record)
        shard = Shard(*(record[key] for key in ("number", "split", "first", "last")))
        if record_of(shard, (folder / record["file"]).read_bytes()) != record:
            return {"file": record["file"], "fault": "its record is not that of its bytes"}
        lacks = record["last"] - record["first"] - record["rows"]
        if lacks != len(quarantined(folder, record)):
            return {"file": record["file"], "fault": f"{lacks} rows are missing without a reason"}
    except StoreError as error:
        return {"file": record["file"], "fault": str(error)}
    return None


def quarantined(folder: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a shard leaves out, each with the reason."""
    if record["rows"] == record["last"] - record["first"]:
        return []
    found = read_json(folder / "_quarantine" / f"{record['number']:05d}.json") or {}
    return list(found.get("rows", []))


def show(folder: Path) -> dict[str, Any]:
    """What a store is: identity, rows and bytes by split, and each column with its type and bytes a row."""
    known, _ = shards(folder)
    splits: dict[str, dict[str, int]] = {}
    columns: dict[str, dict[str, Any]] = {}
    unreadable = []
    for record in known:
        part = splits.setdefault(record["split"], {"rows": 0, "bytes": 0})
        part["rows"] += record["rows"]
        part["bytes"] += record["bytes"]
        try:
            _add_columns(columns, folder / record["file"])
        except (OSError, pa.ArrowException):
            unreadable.append(record["file"])
    rows = sum(part["rows"] for part in splits.values())
    for column in columns.values():
        column["bytes_per_row"] = round(column.pop("bytes") / max(rows, 1), 2)
    complete = (folder / "_MANIFEST.json").exists()
    for layer in layers.stored(folder):
        below = show(layer)
        columns |= {name: column for name, column in below["columns"].items() if name == layer.name}
        for name, part in below["splits"].items():
            splits.setdefault(name, {"rows": part["rows"], "bytes": 0})["bytes"] += part["bytes"]
    return {
        "store": str(folder),
        "complete": complete,
        "identity": read_json(folder / "_RECIPE.json"),
        "splits": splits,
        "columns": columns,
        "quarantined": [row for record in known for row in quarantined(folder, record)],
        "unreadable": unreadable,
        "statistics": read_json(folder / "_MANIFEST.json").get("statistics") if complete else None,
    }


def _add_columns(columns: dict[str, dict[str, Any]], path: Path) -> None:
    """Compressed bytes of each column, from a file's footer."""
    footer = pq.read_metadata(path)
    for field in footer.schema.to_arrow_schema():
        columns.setdefault(field.name, {"type": str(field.type), "bytes": 0})
    for group in range(footer.num_row_groups):
        for i in range(footer.num_columns):
            part = footer.row_group(group).column(i)
            whole = part.path_in_schema  # of a struct's child it ends in the child's name
            columns[whole if whole in columns else whole.rpartition(".")[0]]["bytes"] += part.total_compressed_size


def repair(folder: Path) -> list[str]:
    """Damaged files, removed with the records of their shards, so that scoring does just these again; their names.

    Of a store that stands, a commit record that is lost is written again from the manifest.
    """
    known, faults = shards(folder)
    for fault in faults:
        (folder / fault["file"]).unlink(missing_ok=True)
    doubtful = [record for record in known if _fault(folder, record)]
    for record in known:
        if record in doubtful:
            _commit(folder, record).unlink(missing_ok=True)
            (folder / "_quarantine" / f"{record['number']:05d}.json").unlink(missing_ok=True)
            (folder / record["file"]).unlink(missing_ok=True)
        elif not _commit(folder, record).exists():
            write_json(_commit(folder, record), record)
    below = [f"{layers.FOLDER}/{layer.name}/{name}" for layer in layers.stored(folder) for name in repair(layer)]
    return [fault["file"] for fault in faults] + [record["file"] for record in doubtful] + below


def gc(folder: Path, *, older_than_s: float) -> list[str]:
    """Files that no record names and that have stood for `older_than_s`, removed: what killed writers left behind."""
    named = {record["file"] for record in shards(folder)[0]} | set(KEPT)
    now, removed = time.time(), []
    for layer in layers.stored(folder):
        removed += [f"{layers.FOLDER}/{layer.name}/{name}" for name in gc(layer, older_than_s=older_than_s)]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(f"{layers.FOLDER}/"):
            continue
        is_ours = name in named or (path.parent.name in ("_commits", "_quarantine") and path.suffix == ".json")
        if path.is_file() and not is_ours and now - path.stat().st_mtime > older_than_s:
            path.unlink()
            removed.append(name)
    return removed


def differences(wanted: Any, found: Any, key: str = "") -> list[str]:
    """Field by field, where two identities differ: "teacher.weights: sha256:12 here, sha256:34 there"."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | found.keys())
        return [d for k in keys for d in differences(wanted.get(k), found.get(k), f"{key}.{k}" if key else k)]
    return [] if wanted == found else [f"{key}: {wanted} wanted, {found} stored"]


def nearest(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Of the stores in a folder the one whose identity is nearest to the wanted: {"store", "differences"}."""
    found = []
    for path in sorted(folder.glob("*/_RECIPE.json")):
        try:
            found.append({"store": str(path.parent), "differences": differences(wanted, read_json(path))})
        except StoreError:
            continue
    return min(found, key=lambda store: len(store["differences"]), default=None)
