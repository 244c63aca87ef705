"""How every benchmark measures and ends: the machine, a table of figures, and one line of JSON."""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Clock:
    """CPU seconds of this process, and wall seconds, since the last reading."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> tuple[float, float]:
        now = time.process_time(), time.perf_counter()
        passed = tuple(a - b for a, b in zip(now, getattr(self, "last", now), strict=True))
        self.last = now
        return passed[0], passed[1]


class Figure(NamedTuple):
    """One ratio: what it is measured against, its median and spread over rounds, what it should
    reach, what it can.
    """

    name: str
    baseline: str
    reached: float
    spread: float
    bar: str
    floor: str


def figure(
    name: str, baseline: str, ratios: NDArray[np.float64], *, bar: str, floor: str
) -> Figure:
    """The median of one ratio a round; the spread is the distance between the quartiles."""
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Figure(name, baseline, float(median), float(high - low), bar, floor)


def show(figures: Sequence[Figure]) -> None:
    """Print the machine's class, the table, and {name: reached} as the last line."""
    print(machine())
    cells = [
        (f.name, f.baseline, f"{f.reached:.3f}", f"{f.spread:.3f}", f.bar, f.floor) for f in figures
    ]
    rows = [("figure", "baseline", "reached", "spread", "bar", "floor"), *cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(json.dumps({f.name: round(f.reached, 4) for f in figures}))


def breakdown(title: str, parts: dict[str, float], unit: str) -> None:
    """Print where the time goes, one part after the other, with each one's share."""
    total = sum(parts.values())
    shares = ", ".join(f"{name} {value:.3f} ({value / total:.1%})" for name, value in parts.items())
    print(f"{title} {total:.2f} {unit}: {shares}")


def machine() -> str:
    """One line: the processor, how many of its cores this process has, and the load on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown CPU",
    )
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {name}, {cores} cores, load {load:.1f}, {platform.system()}"
