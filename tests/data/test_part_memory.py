"""Memory does not grow with the rows that are read in parts."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd.data import SPLITS, sources
from raykd.data.prepared import series_parts, units
from raykd.data.prepared.parts import PreparedParts
from raykd.orchestration.preparing import prepare_rows
from raykd.recipe.tables import DataRef

ROWS = 2048  # of a part, 2 MiB
SHAPE = (4, 64)


def write(folder: Path, parts: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for number in range(parts if split == "train" else 1):
            flat = pa.array(rng.normal(size=ROWS * SHAPE[0] * SHAPE[1]).astype(np.float32))
            steps = pa.FixedSizeListArray.from_arrays(flat, SHAPE[1])
            inputs = pa.FixedSizeListArray.from_arrays(steps, SHAPE[0])
            label = pa.array(np.arange(ROWS) % 5)
            table = pa.table({"inputs": inputs, "label": label})
            pq.write_table(table, folder / f"{split}-{number:03}.parquet", compression="none")


def status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def write_lines(folder: Path, count: int) -> None:
    """JSON lines of 120 values and their splits."""
    folder.mkdir()
    steps = [[i / 7 for i in range(4)]] * 30
    lines = [
        json.dumps({"inputs": steps, "label": i % 5, "split": SPLITS[i % 3]}) for i in range(9)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines * count))


def read_all(folder: Path) -> None:
    """Open a table and read each part once."""
    source = sources.open_source(DataRef(source=str(folder)), "blocks")
    for part in source.table().parts:
        assert len(source.read(part)) == ROWS


def prepare_all(folder: Path) -> None:
    """Prepare rows, and read each part once."""
    source = sources.open_source(DataRef(source=str(folder)), "blocks", folder.with_suffix(".home"))
    assert isinstance(source, PreparedParts)
    prepare_rows(source.work)
    for part in source.table().parts:
        assert len(source.read(part)) == part.rows


def peak_kb(work: Callable[[Path], None], folder: Path) -> int:
    """By how much a new process grows at its peak that does some work with a folder."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
            before = status_kb("VmRSS")
            work(folder)
            os.write(writing, str(status_kb("VmHWM") - before).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(process, 0)[1] == 0
    os.close(writing)
    with os.fdopen(reading) as told:
        return int(told.read())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_times_the_rows_take_no_more_memory(tmp_path):
    for name, parts in (("once", 6), ("four", 24)):
        write(tmp_path / name, parts)
    once = peak_kb(read_all, tmp_path / "once")
    four = peak_kb(read_all, tmp_path / "four")
    assert four <= 1.1 * once, (once, four)
    assert four < 24 * 2048 // 2  # of all rows, half


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_times_the_lines_take_no_more_memory_to_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 20)
    monkeypatch.setattr(series_parts, "PART_BYTES", 1 << 18)
    for name, count in (("once", 400), ("four", 1600)):
        write_lines(tmp_path / name, count)
    once = peak_kb(prepare_all, tmp_path / "once")
    four = peak_kb(prepare_all, tmp_path / "four")
    assert four <= 1.1 * once, (once, four)
    size = (tmp_path / "four" / "a.jsonl").stat().st_size
    assert four < size // 1024, (four, size)
