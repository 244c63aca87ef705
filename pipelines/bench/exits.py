"""Whether commands that have read Parquet end with their own exit code, in every process.

    python -m pipelines.bench.exits [--smoke] [--processes N]

A recipe is run once. Then each command starts in N processes, two for each core at a time, so that
they are hurried while they end: Arrow's threads once aborted a process there. The last line is a
JSON object: of each command how often which exit code came, and how many codes of all are above
128, as a shell tells a death by a signal.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from pipelines.bench.table import machine

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
SIGNALLED = 128
OUT = "{out}"  # in a command, the folder that its process has for itself
RECIPE = f"""
name = "exits"
[data]
stride = 40
[teacher]
weights = "{ROOT / "examples" / "gesture" / "teacher.safetensors"}"
settings = {{ width = 96, layers = 3, heads = 4 }}
[student.settings]
width = 8
layers = 1
[store]
rows_per_shard = 64
[optim]
steps = 20
batch = 32
evaluate_every = 10
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two processes, to see that it runs")
    parser.add_argument("--processes", type=int, default=100, help="of each command")
    options = parser.parse_args()
    print(machine())
    found: dict[str, dict[str, int]] = {}
    above = 0
    is_as_expected = True
    with tempfile.TemporaryDirectory() as place:
        for name, (command, expected) in commands_in(Path(place)).items():
            codes = codes_of(command, Path(place), 2 if options.smoke else options.processes)
            print(f"{name}: {dict(codes)}, where {expected} is right", flush=True)
            found[name] = {str(code): count for code, count in sorted(codes.items())}
            above += sum(count for code, count in codes.items() if code > SIGNALLED)
            is_as_expected = is_as_expected and set(codes) == {expected}
    print(json.dumps(found | {"above_128": above}))
    if not is_as_expected:
        sys.exit("a command ended with another exit code than its own")


def commands_in(place: Path) -> dict[str, tuple[list[str], int]]:
    """(command, its right exit code) by name; what they read is made in a folder first."""
    recipe = place / "recipe.toml"
    recipe.write_text(RECIPE)
    raykd = [str(Path(sys.executable).with_name("raykd"))]
    module = [sys.executable, "-m", "raykd.cli"]
    first = [*raykd, "run", str(recipe), "--out", str(place / "out")]
    made = subprocess.run(first, cwd=place, env=environment(), check=False)
    if made.returncode:
        sys.exit(f"raykd run ended with {made.returncode}")
    (store,) = place.glob("out/stores/*")
    damaged = place / "damaged" / store.name
    shutil.copytree(store, damaged)
    shard = min((damaged / "data").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    of_recipe = [str(recipe), "--out", OUT]
    return {
        "raykd store verify": ([*raykd, "store", "verify", str(store)], 0),
        "raykd store verify, damaged": ([*raykd, "store", "verify", str(damaged)], 3),
        "raykd report": ([*raykd, "report", *of_recipe], 0),
        "raykd check": ([*raykd, "check", *of_recipe], 0),
        "python -m raykd.cli score": ([*module, "score", *of_recipe], 0),
    }


def codes_of(command: list[str], place: Path, count: int) -> Counter[int]:
    """How often which exit code came, as a shell would tell it."""

    def code(_: int) -> int:
        out = free.get()
        done = subprocess.run(
            [word.replace(OUT, str(out)) for word in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=place,
            env=environment(),
            timeout=LIMIT_S,
            check=False,
        )
        free.put(out)
        return done.returncode if done.returncode >= 0 else SIGNALLED - done.returncode

    free: Queue[Path] = Queue()  # a run folder is worked on by one process at a time
    side_by_side = 2 * len(os.sched_getaffinity(0))
    for number in range(side_by_side):
        copy = place / f"out-{number}"
        if not copy.exists():
            shutil.copytree(place / "out", copy)
        free.put(copy)
    with ThreadPoolExecutor(side_by_side) as pool:
        return Counter(pool.map(code, range(count)))


def environment() -> dict[str, str]:
    """This process's, with this checkout's modules and one thread for each process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
