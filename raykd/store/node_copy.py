"""The hot form: one split of a store as an Arrow file that is mapped into memory, made once a node
and shared.

    <cache>/<the manifest's sha256>/train.arrow    one record batch a shard, not compressed, ids in
    the plain layout
                                    train.json     what it is a copy of, and its sha256: written
                                    last

The cache is $RAYKD_CACHE, else `raykd-<uid>` in the temporary folder. One process makes the copy
while others wait; all workers and trials of the node map the same pages. A copy that is not what
its record says is made again.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from raykd.errors import InfraError, StoreError
from raykd.files import waiting
from raykd.files.atomic import read_json, write_json

FORM = 1  # of the copy; another one is made again


def cache() -> Path:
    """This user's folder of copies on this node. InfraError if others can write there."""
    folder = Path(
        os.environ.get("RAYKD_CACHE") or Path(tempfile.gettempdir()) / f"raykd-{os.getuid()}"
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InfraError(
            f"{folder} can be written by others, so no copy in it is trusted; set RAYKD_CACHE to your own"
        )
    return folder


def mapped(manifest: str, split: str, shards: Iterable[pa.Table]) -> pa.Table:
    """The split's table, memory mapped; `shards` is read, one at a time, only if there is no sound
    copy yet.

    `manifest` is the sha256 of the store's manifest.
    """
    folder = cache() / manifest
    path, wanted = folder / f"{split}.arrow", {"form": FORM, "manifest": manifest, "split": split}
    if not _stands(path, wanted):
        with waiting.locked(folder, wait=True):
            if not _stands(path, wanted):
                _make(path, wanted, shards)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _stands(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a copy is there whose bytes are those that were written, from the store that is
    wanted.
    """
    try:
        record = read_json(path.with_suffix(".json"))
        with path.open("rb") as file:
            return record == wanted | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except (FileNotFoundError, StoreError):
        return False


def _make(path: Path, wanted: dict[str, Any], shards: Iterable[pa.Table]) -> None:
    """Write the copy aside, rename it, then its record.

    A copy that a killed process left half written is no copy.
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
            f"{path.parent}: the node's copy of the teacher store can not be written: {error.strerror or error}; "
            "free that disk, or set RAYKD_CACHE to a folder with more room"
        ) from None
    finally:
        staged.unlink(missing_ok=True)


def _write(path: Path, shards: Iterable[pa.Table]) -> None:
    writer = schema = None
    with path.open("wb") as sink:
        for shard in shards:
            schema = schema or shard.schema
            writer = writer or pa.ipc.new_file(sink, schema)
            if not shard.schema.equals(schema, check_metadata=True):
                raise StoreError(
                    "the store's shards do not have the same columns; score it again in another --out"
                )
            for batch in shard.combine_chunks().to_batches():
                writer.write_batch(batch)
        assert writer is not None
        writer.close()
    pa.default_memory_pool().release_unused()
