"""Laws of a node's shelf: a part is fetched once, whole or absent, and room is kept.

The references are the tables that were fetched.
"""

import json
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from child import CONTEXT, start, wait

from raykd.errors import InfraError, RecipeError, StoreError
from raykd.training.shelf import GB, Shelf, Volume

SIZES = np.array([50, 0, 30, 70])
ROW = 64  # bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("RAYKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table_of(number: int, rows: int) -> pa.Table:
    draw = np.random.default_rng(number)
    return pa.table(
        {
            "row_id": (number << 24) + np.arange(rows),
            "bytes": pa.array([draw.bytes(ROW) for _ in range(rows)], pa.binary(ROW)),
            "text": pa.array([draw.bytes(int(n)) for n in draw.integers(0, 9, rows)], pa.binary()),
        }
    )


class Counted(Volume):
    """A volume that writes down each fetch."""

    def __init__(self, sizes: np.ndarray = SIZES, key: str = "a" * 8):
        fetched: list[int] = []

        def fetch(number: int) -> pa.Table:
            fetched.append(number)
            return table_of(number, int(sizes[number]))

        super().__init__(key, sizes, fetch)
        object.__setattr__(self, "fetched", fetched)


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "parts").glob("*/*.*"))


def test_rows_come_in_the_order_asked_for_from_whatever_parts_hold_them():
    volume = Counted()
    whole = pa.concat_tables(table_of(n, int(size)) for n, size in enumerate(SIZES))
    shelf = Shelf(1, readers=3)
    index = np.random.default_rng(0).integers(0, SIZES.sum(), 200)
    assert shelf.rows(volume, index).equals(whole.combine_chunks().take(pa.array(index)))
    assert shelf.rows(volume, np.array([149, 0, 50])).num_rows == 3
    assert sorted(volume.fetched) == [0, 2, 3]


def test_a_part_is_fetched_once_a_node_and_mapped_by_others(cache):
    first = Counted()
    Shelf(1).rows(first, np.arange(SIZES.sum()))
    again = Counted()
    before = pa.total_allocated_bytes()
    shelf = Shelf(1)
    tables = [shelf.table(again, number) for number in (0, 2, 3)]
    assert again.fetched == []
    assert [table.num_rows for table in tables] == [50, 30, 70]
    assert pa.total_allocated_bytes() - before < 1000
    assert files(cache) == [f"{n:08d}.arrow" for n in (0, 2, 3)]


def open_it(gate, told: str) -> None:
    volume = Counted()
    gate.wait(300)
    Shelf(1, readers=2).rows(volume, np.arange(SIZES.sum()))
    Path(told).write_text(json.dumps(volume.fetched))


def test_of_many_processes_one_fetches_a_part_while_others_wait(cache, tmp_path):
    gate = CONTEXT.Barrier(3)
    told = [tmp_path / f"{i}.json" for i in range(3)]
    env = {"RAYKD_CACHE": str(cache)}
    assert wait([start(open_it, gate, str(t), **env) for t in told]) == [0, 0, 0]
    fetched = [number for t in told for number in json.loads(t.read_text())]
    assert sorted(fetched) == [0, 2, 3]


@pytest.mark.parametrize("left", [b"", b"ARROW1\0\0 and no more"])
def test_what_was_half_written_is_not_trusted(left, cache):
    folder = cache / "parts" / "aaaaaaaa"
    folder.mkdir(parents=True)
    (folder / "00000000.tmp").write_bytes(left)
    (folder / "00000003.arrow").write_bytes(left)
    volume = Counted()
    table = Shelf(1).rows(volume, np.arange(150))
    assert sorted(volume.fetched) == [0, 2, 3]
    assert table.slice(80).equals(table_of(3, 70))
    assert files(cache) == [f"{n:08d}.arrow" for n in (0, 2, 3)]


def test_a_full_disk_is_told_once_and_leaves_nothing(cache):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond it is an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    volume = Counted()
    shelf = Shelf(1)
    try:
        with pytest.raises(InfraError, match=r"cannot be kept .* scale.cache_gb, .* RAYKD_CACHE"):
            shelf.rows(volume, np.arange(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(cache) == []
    assert shelf.rows(volume, np.arange(3)).equals(table_of(0, 50).slice(0, 3))


def test_a_fetch_that_failed_is_tried_again():
    fails = [StoreError("a part that is damaged")]

    def fetch(number: int) -> pa.Table:
        if fails:
            raise fails.pop()
        return table_of(number, 5)

    shelf = Shelf(1)
    volume = Volume("b" * 8, np.array([5]), fetch)
    with pytest.raises(StoreError, match="damaged"):
        shelf.rows(volume, np.arange(5))
    assert shelf.rows(volume, np.arange(5)).equals(table_of(0, 5))


def test_the_parts_used_longest_ago_go_and_what_is_mapped_stays_readable(cache):
    sizes = np.full(6, 50)
    room = 3.5 * (cache_bytes := table_of(0, 50).nbytes * 1.3) / GB
    shelf = Shelf(room)
    volume = Counted(sizes)
    mapped = shelf.table(volume, 0)
    for number in (1, 2, 0, 3, 4, 5):
        shelf.rows(volume, number * 50 + np.arange(3))
        time.sleep(0.01)
    held = sum(path.stat().st_size for path in (cache / "parts").glob("*/*.*"))
    assert held <= room * GB
    assert files(cache)[-1] == "00000005.arrow"
    assert "00000001.arrow" not in files(cache)
    assert pa.Table.from_batches([mapped]).equals(table_of(0, 50))
    assert sum(shelf.bytes.values()) <= room * GB
    assert len(shelf.tables) == len(shelf.bytes) < 6
    assert cache_bytes
    shelf.rows(volume, np.array([60]))
    assert volume.fetched.count(1) == 2


def test_a_part_larger_than_the_room_is_refused_by_key():
    with pytest.raises(RecipeError, match=r"scale.cache_gb = 1e-06: one part"):
        Shelf(1e-6).rows(Counted(), np.arange(3))


def test_files_stay_open_no_longer_than_they_are_mapped():
    volume = Counted(np.full(40, 3))
    shelf = Shelf(1)
    before = len(os.listdir("/proc/self/fd"))
    shelf.rows(volume, np.arange(120))
    assert len(os.listdir("/proc/self/fd")) - before <= 2
