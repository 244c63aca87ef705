"""A command that has read Parquet ends with its own exit code, and not by an abort of Arrow's
threads.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import shards

ROOT = Path(__file__).parents[2]
PROCESSES = 10
SIDE_BY_SIDE = 5
READERS = {"read_table", "ParquetFile", "ParquetDataset", "read_pandas", "iter_batches"}


def codes_of(*argv: object, count: int = PROCESSES) -> list[int]:
    """The exit codes of so many processes of `raykd ARGV`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import torch; from raykd.cli import main; main()"]
    command += map(str, argv)
    codes: list[int] = []
    while len(codes) < count:
        started = [
            subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for _ in range(min(SIDE_BY_SIDE, count - len(codes)))
        ]
        codes += [process.wait(120) for process in started]
    return codes


def test_verifying_a_sound_store_ends_with_0_in_every_process(tmp_path):
    shards.fill(tmp_path / "store")
    assert codes_of("store", "verify", tmp_path / "store") == [0] * PROCESSES


def test_finding_damage_ends_with_3_in_every_process(tmp_path):
    shards.fill(tmp_path / "store")
    damaged = sorted((tmp_path / "store" / "data").iterdir())[0]
    shards.flip(damaged, byte=100, bit=3)
    assert codes_of("store", "verify", tmp_path / "store", count=4) == [3] * 4


def test_only_one_file_of_the_package_reads_parquet():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "raykd").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in READERS
    }
    assert found == {"raykd/files/parquet.py"}
