"""An artefact's own run.py, run as its user runs it: a process that is given rows in a file.

What it answers is what a report says of the artefact. Rows go in as a device has them, each of its
own length. The process is bounded in time, and imports nothing that lies beside the script.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import Rows
from raykd.errors import GateError, StoreError
from raykd.recipe import imports

PART = 4096  # rows a process
LEAST_S = 300.0  # for one process
ROW_S = 2.0  # more for each row
CARDS = ("run.py", "run_lm.py", "run_text.py")  # the scripts that raykd writes


def check(folder: Path) -> None:
    """StoreError if the run.py of an artefact folder is not one that raykd writes.

    A manifest vouches for nothing here: who changes one file can write the other anew.
    """
    script = (folder / "run.py").read_bytes()
    cards = [resources.files("raykd.deploy") / "card" / name for name in CARDS]
    if script not in [card.read_bytes() for card in cards]:
        raise StoreError(
            f"{folder / 'run.py'} is not the script that this raykd writes, and is not run; delete "
            f"{folder} and type: raykd export RECIPE"
        )


def row_logits(folder: Path, rows: Rows) -> NDArray[np.float32]:
    """(N, C): the logits of every row, as the run.py of an artefact folder answers it.

    GateError if the script fails, or prints other classes than its logits say.
    """
    classes = json.loads((folder / "model.json").read_bytes())["classes"]
    parts = []
    for first in range(0, len(rows), PART):
        part = rows.take(slice(first, first + PART))
        with tempfile.TemporaryDirectory(prefix="raykd-") as place:
            given = Path(place, "rows.npz")
            written = Path(place, "logits.npy")
            arrays: Any = as_given(part)
            np.savez(given, **arrays)
            limit = LEAST_S + ROW_S * len(part)
            printed = run(folder, given, "--logits", written, limit_s=limit)
            logits = np.load(written, allow_pickle=False)
        expected = "".join(f"{classes[z.argmax()]}\t{_likely(z)}\n" for z in logits)
        if len(logits) != len(part) or printed.replace("\r\n", "\n") != expected:
            raise GateError(
                f"export: run.py gave {len(logits)} answers to {len(part)} test rows, or printed "
                "others than it wrote; no artefact was written"
            )
        parts.append(logits)
    return np.concatenate(parts)


def as_given(rows: Rows) -> dict[str, NDArray[Any]]:
    """Rows as the arrays of a file that run.py reads: an array each, of sentences their tokens.

    Where a row has invalid steps before valid ones, all are given together with their mask.
    """
    length = rows.mask.sum(1)
    if rows.is_sentences:
        tokens = zip(rows.inputs[..., 0], rows.mask, strict=True)
        return {f"row{number}": row[mask] for number, (row, mask) in enumerate(tokens)}
    if (rows.mask == (np.arange(rows.mask.shape[1]) < length[:, None])).all():
        cut = zip(rows.inputs, length, strict=True)
        return {f"row{number}": row[:steps] for number, (row, steps) in enumerate(cut)}
    return {"inputs": rows.inputs, "mask": rows.mask}


def run(folder: Path, *words: Path | str, limit_s: float) -> str:
    """What a folder's run.py prints for these words. GateError if it fails or takes too long."""
    # A script that needs raykd and the student's module finds them where this process does.
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | imports.environment()
    command = [sys.executable, "-P", str(folder / "run.py"), *map(str, words)]
    try:
        done = subprocess.run(
            command,
            env=os.environ | paths,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GateError(
            f"export: run.py did not answer within {limit_s:.0f} s; no artefact was written"
        ) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing said"]
        raise GateError(
            f"export: run.py ended with {done.returncode}: {lines[-1]}; no artefact was written"
        )
    return done.stdout.decode()


def _likely(z: NDArray[np.float32]) -> str:
    """How likely the class of logits (C,) is, as run.py prints it."""
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return f"{p.max():.3f}"
