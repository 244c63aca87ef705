"""digests.json of a run folder: the sha256 of what search, export and report left, held against
the files before they are used again.

A stage adds its files when it is done. Digests of trained arms stand in their own arm.json.
"""

from collections.abc import Iterable
from pathlib import Path

from raykd.errors import StoreError
from raykd.files import records
from raykd.files.atomic import read_json, write_json
from raykd.training import run_files

AGAIN = "put it back as it was, or move it away and give the same command, which makes it again"


def add(run: Path, names: Iterable[str]) -> None:
    """Record these files of a run as they are; those that are not there are forgotten."""
    names = list(names)
    kept = {name: entry for name, entry in _read(run).items() if name not in names}
    files = dict(sorted((kept | records.entries_of(run, names)).items()))
    write_json(run / run_files.DIGESTS, records.with_own_digest({"files": files}))


def holds(run: Path, name: str) -> bool:
    """Whether a file is recorded and is the one that was written. False if it is missing."""
    entry = _read(run).get(name)
    return entry is not None and records.fault_of(run / name, entry) is None


def is_recorded(run: Path, name: str) -> bool:
    """The same, but StoreError if the file was changed after it was written."""
    entry = _read(run).get(name)
    if entry is None or not (run / name).exists():
        return False
    fault = records.fault_of(run / name, entry)
    if fault is not None:
        raise StoreError(f"{run / name}: {fault}; {AGAIN}")
    return True


def check(run: Path) -> None:
    """StoreError names the first recorded file that was changed after it was written."""
    for name in _read(run):
        is_recorded(run, name)


def _read(run: Path) -> dict[str, object]:
    path = run / run_files.DIGESTS
    record = read_json(path)
    if record is None:
        return {}
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not records.has_own_digest(record):
        raise StoreError(
            f"{path} is damaged: its digest does not match; delete it and give the same command, "
            "which exports and reports again"
        )
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise StoreError(f"{path} names a file outside of the run folder; delete it")
    return files
