"""Memory does not grow with the rows that are read in parts."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd.data import SPLITS, sources
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


def peak_kb(folder: Path) -> int:
    """By how much a new process grows, at its peak, that opens a table and reads each part once."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
            before = status_kb("VmRSS")
            source = sources.open_source(DataRef(source=str(folder)), "blocks")
            for part in source.table().parts:
                assert len(source.read(part)) == ROWS
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
    once = peak_kb(tmp_path / "once")
    four = peak_kb(tmp_path / "four")
    assert four <= 1.1 * once, (once, four)
    assert four < 24 * 2048 // 2  # of all rows, half
