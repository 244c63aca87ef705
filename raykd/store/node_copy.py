"""A node's copy of a store's split: an Arrow file that all of the node's processes memory-map.

    <cache>/<the manifest's sha256>/
        train.arrow    one record batch a shard, not compressed, ids in the plain layout
        train.json     what it is a copy of, and its sha256; written last

The cache is `raykd.files.cache`'s. One process writes the copy while others wait; all workers and
trials of the node map the same pages. A copy that does not fit its record is written again.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from raykd.errors import InfraError, StoreError
from raykd.files import waiting
from raykd.files.atomic import read_json, write_json
from raykd.files.cache import cache_folder

FORM = 1  # version of the copy; one of another version is written again


def mapped(manifest: str, split: str, shards: Iterable[pa.Table]) -> pa.Table:
    """The split's table, memory mapped from this node's copy.

    `manifest` is the sha256 of the store's manifest. `shards` is read, one at a time, only if there
    is no sound copy yet.
    """
    folder = cache_folder() / manifest
    path = folder / f"{split}.arrow"
    wanted = {"form": FORM, "manifest": manifest, "split": split}
    if not _is_sound(path, wanted):
        with waiting.locked(folder, wait=True):
            if not _is_sound(path, wanted):
                _make(path, wanted, shards)
    alone = pa.ipc.IpcReadOptions(use_threads=False)
    return pa.ipc.open_file(pa.memory_map(str(path)), options=alone).read_all()


def _is_sound(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a copy of the wanted split exists, with the bytes that were written."""
    try:
        record = read_json(path.with_suffix(".json"))
        with path.open("rb") as file:
            return record == wanted | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except (FileNotFoundError, StoreError):
        return False


def _make(path: Path, wanted: dict[str, Any], shards: Iterable[pa.Table]) -> None:
    """Write the copy under another name, rename it, then write its record.

    So a copy that a killed process left half written has no record.
    """
    staged = path.with_suffix(".tmp")
    path.with_suffix(".json").unlink(missing_ok=True)
    try:
        _write(staged, shards)
        with staged.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(staged, path)
        write_json(path.with_suffix(".json"), wanted | {"sha256": digest})
    except OSError as error:
        raise InfraError(
            f"{path.parent}: the node's copy of the teacher store cannot be written: "
            f"{error.strerror or error}; free that disk, or set RAYKD_CACHE to a folder with more "
            "room"
        ) from None
    finally:
        staged.unlink(missing_ok=True)


def _write(path: Path, shards: Iterable[pa.Table]) -> None:
    writer = None
    schema = None
    with path.open("wb") as sink:
        for shard in shards:
            schema = schema or shard.schema
            writer = writer or pa.ipc.new_file(sink, schema)
            if not shard.schema.equals(schema, check_metadata=True):
                raise StoreError(
                    "the store's shards do not have the same columns; score it again in another "
                    "--out"
                )
            for batch in shard.combine_chunks().to_batches():
                writer.write_batch(batch)
        assert writer is not None
        writer.close()
    pa.default_memory_pool().release_unused()
