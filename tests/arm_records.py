"""Records of arms that nobody trained, for tests of what reads them."""

import hashlib
from pathlib import Path

from raykd.training import run_files, trained_arm

WEIGHTS = b"the weights"


def write(run: Path, name: str, seed: int, val: dict[str, float]) -> None:
    """The folder of an arm with these validation metrics, as the end of its training leaves it."""
    folder = run_files.arm(run, f"{name}-{seed}")
    folder.mkdir(parents=True)
    (folder / run_files.WEIGHTS).write_bytes(WEIGHTS)
    (folder / run_files.PREDICTIONS).write_bytes(b"the predictions")
    record = {
        "arm": name,
        "seed": seed,
        "steps": 1,
        "seconds": 0.5,
        "params": 1,
        "weights_sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        "history": [{"step": 1, **val}],
        "val": val,
    }
    trained_arm.write_record(folder, record)
