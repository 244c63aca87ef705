"""What a command that computes nothing costs, over an empty Python process.

    python -m pipelines.bench.start [--rounds N]

Commands and the empty process take turns, so that all meet the same load. The last line is a JSON
object: of each command the median CPU seconds of a process, and their ratio to the median of
`python -c pass`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

from pipelines.bench.table import machine

COMMANDS = {
    "empty": ["-c", "pass"],
    "help": ["-m", "raykd.cli", "--help"],
    "keys": ["-m", "raykd.cli", "keys", "optim", "--json"],
    "techniques": ["-m", "raykd.cli", "techniques"],
}
LIMIT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="processes of each command")
    options = parser.parse_args()
    print(machine())
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds):
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures: dict[str, float] = {}
    for name, median in medians.items():
        figures[f"{name}_cpu_seconds"] = round(median, 3)
        figures[f"{name}_ratio"] = round(median / medians["empty"], 1)
    print(json.dumps(figures))


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of one process of Python with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=LIMIT_S)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
