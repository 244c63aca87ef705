"""Looking after a store that stands: verify, show, repair, gc. None of them needs the teacher."""

import io
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raykd.errors import StoreError
from raykd.files import read_json
from raykd.store.commit import intact
from raykd.store.reader import Store

KEPT = ("_RECIPE.json", "_MANIFEST.json", "_TIMING.json")


def records(folder: Path) -> list[dict[str, Any]]:
    """Every commit record that can be read, by shard. StoreError if the folder is no store."""
    if read_json(folder / "_RECIPE.json") is None:
        raise StoreError(f"{folder} is not a teacher store: it has no _RECIPE.json")
    found = []
    for path in sorted((folder / "_commits").glob("*.json")):
        try:
            found.append(read_json(path))
        except StoreError:
            continue
    return found


def verify(folder: Path) -> dict[str, Any]:
    """Every file against its digest, its pages against their checksums; {"complete", "shards", "damaged"}."""
    known = records(folder)
    damaged = [_fault(folder, record) for record in known]
    try:
        Store(folder)
        complete = True
    except StoreError as error:
        complete = False
        damaged.append({"file": "_MANIFEST.json", "fault": str(error)})
    return {"complete": complete, "shards": len(known), "damaged": [d for d in damaged if d]}


def _fault(folder: Path, record: dict[str, Any]) -> dict[str, str] | None:
    path = folder / record["file"]
    if not path.exists():
        return {"file": record["file"], "fault": "missing"}
    if not intact(folder, record):
        return {"file": record["file"], "fault": "its bytes are not those that were committed"}
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        return {"file": record["file"], "fault": f"unreadable: {error}"}
    rows = table.num_rows
    return None if rows == record["rows"] else {"file": record["file"], "fault": f"{rows} rows, not {record['rows']}"}


def show(folder: Path) -> dict[str, Any]:
    """What a store is: identity, rows and bytes by split, and each column with its type and bytes a row."""
    known = records(folder)
    splits: dict[str, dict[str, int]] = {}
    columns: dict[str, dict[str, Any]] = {}
    for record in known:
        part = splits.setdefault(record["split"], {"rows": 0, "bytes": 0})
        part["rows"] += record["rows"]
        part["bytes"] += record["bytes"]
        _add_columns(columns, folder / record["file"])
    rows = sum(part["rows"] for part in splits.values())
    for column in columns.values():
        column["bytes_per_row"] = round(column.pop("bytes") / max(rows, 1), 2)
    manifest = read_json(folder / "_MANIFEST.json") or {}
    return {
        "store": str(folder),
        "complete": bool(manifest),
        "identity": read_json(folder / "_RECIPE.json"),
        "splits": splits,
        "columns": columns,
        "statistics": manifest.get("statistics"),
    }


def _add_columns(columns: dict[str, dict[str, Any]], path: Path) -> None:
    """Compressed bytes of each column, from a file's footer."""
    footer = pq.read_metadata(path)
    for field in footer.schema.to_arrow_schema():
        columns.setdefault(field.name, {"type": str(field.type), "bytes": 0})
    for group in range(footer.num_row_groups):
        for i in range(footer.num_columns):
            part = footer.row_group(group).column(i)
            columns[part.path_in_schema.split(".")[0]]["bytes"] += part.total_compressed_size


def repair(folder: Path) -> list[int]:
    """The shards whose file is missing or damaged, their records and files removed: scoring does just these again."""
    doubtful = [record for record in records(folder) if _fault(folder, record)]
    for record in doubtful:
        (folder / record["file"]).unlink(missing_ok=True)
        (folder / "_commits" / f"{record['number']:05d}.json").unlink(missing_ok=True)
    return [record["number"] for record in doubtful]


def gc(folder: Path, *, older_than_s: float) -> list[str]:
    """Files that no record names and that have stood for `older_than_s`, removed: what killed writers left behind."""
    named = {record["file"] for record in records(folder)} | set(KEPT)
    now, removed = time.time(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_ours = name in named or (name.startswith("_commits/") and path.suffix == ".json")
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
