"""A store without a teacher: shards of rows that follow from their number alone, and who commits
them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raykd.store import columns
from raykd.store.commit import Shard, StoreWriter, plan_shards
from raykd.store.reader import Store

ROWS = {"train": 50, "val": 10, "test": 9}
SHARDS = plan_shards(ROWS, 16)
IDENTITY = {"teacher": "of the tests"}


def table_of(shard: Shard, salt: int = 0) -> pa.Table:
    """Deterministic rows of a shard, without a teacher."""
    draw = np.random.default_rng([salt, shard.number])
    rows = shard.last - shard.first
    mask = np.arange(6) < draw.integers(1, 7, (rows, 1))
    values = draw.normal(size=(rows, 6, 3)).astype(np.float32)
    schema = pa.schema(
        [
            pa.field("row_id", pa.int64()),
            pa.field("steps", pa.int32()),
            columns.field("logits", values, "steps"),
        ]
    )
    row_id = np.arange(shard.first, shard.last)
    return pa.table(
        [pa.array(row_id), pa.array(mask.sum(1).astype(np.int32)), columns.encode(values, mask)],
        schema=schema,
    )


def fill(
    folder: Path, *, salt: int = 0, backwards: bool = False, gate: Any = None
) -> dict[str, Any]:
    """What scoring does: commit every shard that is missing, then finish."""
    writer = StoreWriter(folder, IDENTITY)
    missing = writer.missing(SHARDS)
    if gate:
        gate.wait(300)
    for shard in reversed(missing) if backwards else missing:
        writer.commit(shard, table_of(shard, salt))
    return writer.finish(SHARDS, {"rows": ROWS})


def manifest_of(folder: Path) -> bytes:
    return (folder / "_MANIFEST.json").read_bytes()


def read_all(folder: Path) -> list[pa.Table]:
    """Every split from the shards themselves, whatever copies a node has."""
    found = Store(folder)
    return [pa.concat_tables(found.shards(split)) for split in ROWS]


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def race(folder: Path, salt: int, gate: Any, told: Path) -> None:
    """Commit every shard with rows of one's own, and write down which records stood."""
    writer = StoreWriter(folder, IDENTITY)
    missing = writer.missing(SHARDS)
    gate.wait(300)
    told.write_text(json.dumps([writer.commit(shard, table_of(shard, salt)) for shard in missing]))
    writer.finish(SHARDS, {"rows": ROWS})
