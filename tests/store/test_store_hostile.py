"""Files that were made to harm: bombs are refused before they unfold, mutants never crash who reads
them.

Each is signed as its author would sign it, so that the digest lets it pass and only the bounds and
pyarrow stand.
"""

import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from child import start, wait
from shards import IDENTITY, SHARDS, fill, table_of

from raykd.errors import StoreError
from raykd.files.atomic import read_json, to_json
from raykd.files.digests import digest_of
from raykd.store import bounds
from raykd.store.commit import Shard, record_of, to_parquet
from raykd.store.reader import Store, read_parquet

GIB = 1 << 30
MIB = 1 << 20


def written(write: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    write(
        sink, {"compression": "zstd", "write_statistics": False, "use_dictionary": False} | options
    )
    return sink.getvalue()


def zeros(sink: Any, options: dict[str, Any]) -> None:
    """A GiB of int64 zeros, a MiB row group after the other."""
    table = pa.table({"row_id": np.zeros(MIB, np.int64)})
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        for _ in range(GIB // table.nbytes):
            writer.write_table(table)


def unfolding(sink: Any, options: dict[str, Any]) -> None:
    """A thousand rows of one MiB, which a dictionary holds once."""
    blob = pa.array([bytes(MIB)], pa.binary())
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1024, np.int32)), blob)
    pq.write_table(pa.table({"logits": values}), sink, **options, store_schema=False)


def blobs(sink: Any, options: dict[str, Any]) -> None:
    """Sixty-four rows of sixteen MiB, in plain pages."""
    table = pa.table({"logits": pa.array([bytes(16 * MIB)], pa.binary())})
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        for _ in range(64):
            writer.write_table(table)


def lying(data: bytes) -> bytes:
    """The same file with a footer that promises 128 bytes a column for each of its pages' sizes."""
    footer = pq.read_metadata(io.BytesIO(data))
    size = footer.row_group(0).column(0).total_uncompressed_size
    word = bytearray()
    value = 2 * size
    while value > 127:
        word.append(value & 127 | 128)
        value >>= 7
    word.append(value)
    small = bytes([0x80, 0x82, *[0x80] * (len(word) - 3), 0])
    length = int.from_bytes(data[-8:-4], "little") + 8
    changed = data[:-length] + data[-length:].replace(bytes(word), small)
    assert (
        pq.read_metadata(io.BytesIO(changed)).row_group(0).column(0).total_uncompressed_size == 128
    )
    return changed


BOMBS = {
    "rows": lambda: written(zeros),
    "rows in a dictionary": lambda: written(zeros, use_dictionary=True),
    "values in a dictionary": lambda: written(unfolding, use_dictionary=True),
    "values": lambda: written(blobs),
    "values under a lying footer": lambda: lying(written(blobs)),
}
CHECK = """
import re, sys
from pathlib import Path
from raykd.errors import StoreError
from raykd.store import bounds
try:
    bounds.check(Path(sys.argv[1]).read_bytes(), int(sys.argv[2]), "bomb")
except StoreError as error:
    # rusage has the parent's too
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(int(peak) // 1024, error)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_unfolds(bomb, tmp_path):
    data = BOMBS[bomb]()
    assert len(data) < 1_000_000
    (tmp_path / "bomb").write_bytes(data)
    rows = pq.read_metadata(io.BytesIO(data)).num_rows
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "bomb"), str(rows)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, _, told = done.stdout.partition(" ")
    assert "bomb would take" in told or "which no teacher store has" in told, done.stdout
    assert int(peak) < 200, f"{peak} MiB to refuse {bomb}"


def signed(folder: Path, shard: Shard, data: bytes, rows: int) -> None:
    """The store with one shard's file exchanged, every digest made to fit."""
    record = record_of(shard, data) | {"rows": rows}
    (folder / record["file"]).write_bytes(data)
    manifest = read_json(folder / "_MANIFEST.json")
    manifest["shards"][shard.number] = record
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    (folder / "_MANIFEST.json").write_bytes(to_json(body | {"sha256": digest_of(body)}))


def test_a_signed_bomb_in_a_store_is_refused(tmp_path):
    fill(tmp_path / "store")
    data = written(blobs)
    for shard, rows, told in (
        (Shard(0, "train", 0, 64), 64, "would take"),
        (SHARDS[0], 16, "promises 64 rows where 16 belong"),
        (SHARDS[0], 64, "64 rows cannot be of 16"),
    ):
        signed(tmp_path / "store", shard, data, rows)
        with pytest.raises(StoreError, match=told):
            Store(tmp_path / "store").table("train")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (pa.table({"x": pa.array(["a"])}), "types that no teacher store has: x"),
        (pa.table({"x": pa.array([[1, 2]])}), "no teacher store has"),
        (
            pa.table({"x": pa.array([b"a"], pa.large_binary())}),
            "types that no teacher store has: x",
        ),
    ],
)
def test_types_that_no_store_has_are_refused(table, told):
    with pytest.raises(StoreError, match=told):
        bounds.check(to_parquet(table), 1, "file")


@pytest.mark.parametrize(
    "options", [{"compression": "snappy"}, {"use_dictionary": True}, {"data_page_version": "2.0"}]
)
def test_encodings_that_no_store_has_are_refused(options):
    data = written(lambda sink, o: pq.write_table(table_of(SHARDS[0]), sink, **o), **options)
    with pytest.raises(StoreError, match="no teacher store has"):
        bounds.check(data, 16, "file")


def test_a_sound_file_is_within_its_bounds():
    for shard in SHARDS:
        table = table_of(shard)
        bounds.check(to_parquet(table), table.num_rows, "file")
        assert read_parquet(to_parquet(table), table.num_rows, "file").equals(table)


def mutant(data: bytes, draw: random.Random) -> bytes:
    """The file with something done to it, half of the time in its footer."""
    footer = int.from_bytes(data[-8:-4], "little") + 8
    first = len(data) - footer if draw.random() < 0.5 else 0
    at = draw.randrange(first, len(data))
    size = draw.randrange(1, 40)
    match draw.randrange(6):
        case 0:
            new = bytearray(data)
            for _ in range(draw.randrange(1, 9)):
                new[draw.randrange(first, len(data))] ^= 1 << draw.randrange(8)
            return bytes(new)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + draw.randbytes(size) + data[at:]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return (
                data[:at]
                + bytes([draw.choice([0, 127, 128, 255])]) * min(size, len(data) - at)
                + data[at + size :]
            )
        case _:
            other = draw.randrange(len(data))
            return data[:at] + data[other : other + size] + data[at + size :]


def decode_all(told: str, count: int) -> None:
    """Decode mutants one by one, saying before each which it is, and after it what came of it."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    with Path(told).open("w", buffering=1) as say:
        for seed in range(count):
            draw = random.Random(seed)
            table = table_of(SHARDS[seed % len(SHARDS)])
            changed = mutant(to_parquet(table), draw)
            try:
                found = read_parquet(changed, table.num_rows, "mutant")
                result = "equal" if found.equals(table) else "other"
            except StoreError:
                result = "refused"
            say.write(json.dumps([seed, result, len(changed)]) + "\n")


def test_five_hundred_mutants_never_crash_their_reader(tmp_path):
    told = tmp_path / "told"
    assert wait([start(decode_all, str(told), 500)]) == [0]
    found = Counter(json.loads(line)[1] for line in told.read_text().splitlines())
    assert sum(found.values()) == 500
    assert found["refused"] > 400
    # without a digest a footer's flip can pass as another column name or key; the digest is what
    # stands against it
    assert found["other"] < 25, found


def test_five_hundred_mutants_are_never_taken_for_the_shard(tmp_path):
    folder = tmp_path / "store"
    fill(folder)
    records = Store(folder).manifest["shards"]
    for seed in range(500):
        record = records[seed % len(records)]
        path = folder / record["file"]
        data = path.read_bytes()
        changed = mutant(data, random.Random(seed))
        path.write_bytes(changed)
        view = Store.of_shards(folder, [record])
        if changed != data:
            with pytest.raises(StoreError):
                list(view.shards(record["split"]))
        path.write_bytes(data)
    assert read_json(folder / "_RECIPE.json") == IDENTITY
