"""arm.json: the record of a trained arm, which holds the digest of every file beside it.

It is written last, so its presence means that the arm is done; and the arm counts as done only
while every file is the one that was written. Records of before there were such digests are taken
if the weights have the sha256 that they name; the files beside those are then taken as they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raykd.errors import StoreError
from raykd.files import records
from raykd.files.atomic import read_json, write_json
from raykd.training import run_files

FILES = (run_files.WEIGHTS, run_files.PREDICTIONS, run_files.DRAFTS, run_files.ROUNDED)
RUN = re.compile(r"-([0-9a-f]{8})")  # ends the name of a run's folder
KINDS: dict[str, type | tuple[type, ...]] = {
    "arm": str,
    "seed": int,
    "steps": int,
    "seconds": (int, float),
    "params": int,
    "weights_sha256": str,
    "history": list,
    "val": dict,
}


def run_of(run: Path) -> str | None:
    """The digits of its run's digest in the name of a run folder; None in any other folder.

    A worker may know no more of that digest: it need not have the teacher's weights, which are
    part of it.
    """
    named = RUN.search(run.resolve().name)
    return named[1] if named else None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write an arm's record into its folder, with the digests of all files there, and its own."""
    sealed = {**record, "files": records.entries_of(folder, FILES)}
    write_json(folder / run_files.ARM, records.with_own_digest(sealed))


def read_record(run: Path, key: str) -> dict[str, Any] | None:
    """The record of an arm of a run; None if the arm is not done.

    StoreError if the record is none of this arm's, or if a file beside it is not what was written.
    Answers of weights that were rounded afterwards may be missing, because they are made again.
    """
    folder = run_files.arm(run, key)
    record = read_json(folder / run_files.ARM)
    if record is None:
        return None
    name = run_files.ARM
    fault = _fault_of(record, run, key)
    if fault is None:
        files = _files_of(record)
        faults = {
            each: found
            for each, entry in files.items()
            if each != run_files.ROUNDED or (folder / each).exists()
            if (found := records.fault_of(folder / each, entry))
        }
        name = next(iter(faults), name)
        fault = faults.get(name)
    if fault is not None:
        raise StoreError(
            f"{folder / name}: {fault}; put the file back as it was, or delete {folder} and give "
            "the same command, which trains this arm again"
        )
    return record


def _fault_of(record: Any, run: Path, key: str) -> str | None:
    """Why a JSON value is not the record of an arm; None if it is."""
    if not isinstance(record, dict):
        return "not the record of an arm"
    lacking = [name for name, kind in KINDS.items() if not isinstance(record.get(name), kind)]
    if lacking:
        return f"not the record of an arm: {', '.join(lacking)} missing or of another kind"
    has_curve = record["history"] and all(isinstance(each, dict) for each in record["history"])
    if not has_curve or not isinstance(record["val"].get("val_accuracy"), int | float):
        return "not the record of an arm: no learning curve, or no val_accuracy"
    if f"{record['arm']}-{record['seed']}" != key:
        return f"the record of {record['arm']}-{record['seed']}, not of {key}"
    if "files" in record and not records.has_own_digest(record):
        return "its digest does not match, so it was changed after it was written"
    if "files" in record and not _are_files(record["files"]):
        return "names other files than an arm's"
    digits = run_of(run)
    if digits and record.get("run") is not None and str(record["run"])[:8] != digits:
        return f"of the run {str(record['run'])[:8]}, not of {digits}"
    return None


def _are_files(files: Any) -> bool:
    wanted = {run_files.WEIGHTS, run_files.PREDICTIONS}
    return isinstance(files, dict) and wanted <= files.keys() <= set(FILES)


def _files_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the files beside a record must be."""
    return record.get("files") or {run_files.WEIGHTS: {"sha256": record["weights_sha256"]}}
