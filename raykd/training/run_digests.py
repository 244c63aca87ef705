"""digests.json of a run folder: the sha256 of what search, export and report left, held against
the files before they are used again.

A stage forgets its files before it writes them, and adds them when it is done. Digests of trained
arms stand in their own arm.json.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raykd.errors import StoreError
from raykd.files import records
from raykd.files.atomic import read_json, write_json
from raykd.training import run_files

AGAIN = "put it back as it was, or move it away and give the same command, which makes it again"


@contextmanager
def renewed(run: Path, names: Collection[str]) -> Iterator[None]:
    """Write these files of a run in the block; they are recorded at its end, as they are then.

    What was recorded of them is forgotten first: a process that is killed in the block leaves
    files that nothing is known of, which are made again, and none that look changed.
    """
    known = _read(run)
    kept = {name: entry for name, entry in known.items() if name not in names}
    if kept != known:
        _write(run, kept)
    yield
    _write(run, kept | records.entries_of(run, names))


def _write(run: Path, files: Mapping[str, object]) -> None:
    sealed = records.with_own_digest({"files": dict(sorted(files.items()))})
    write_json(run / run_files.DIGESTS, sealed)


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
