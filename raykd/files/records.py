"""Records of files: the bytes and sha256 that each had when it was written, held against it later.

A file is hashed once a process, and again only if it was written since.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raykd.files.digests import digest_of, file_sha256

OWN = "sha256"  # the key of a record's own digest
_HASHED: dict[tuple[int, ...], str] = {}


def sha256_once(path: Path) -> str:
    """Hex sha256 of a file, remembered for this process while the file stays as it is."""
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _HASHED:
        _HASHED[key] = file_sha256(path)
    return _HASHED[key]


def entries_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of those files that are there."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_once(folder / name)}
        for name in sorted(names)
        if (folder / name).is_file()
    }


def fault_of(path: Path, entry: Any) -> str | None:
    """Why a file is not the one of its entry; None if it is."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
        return "its record has no sha256"
    if not path.is_file():
        return "it is missing"
    if sha256_once(path) != entry["sha256"]:
        return "its sha256 is not the recorded one, so it was changed after it was written"
    return None


def with_own_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of all that it says."""
    body = {key: value for key, value in record.items() if key != OWN}
    return body | {OWN: digest_of(body)}


def has_own_digest(record: Mapping[str, Any]) -> bool:
    """Whether a record says what its digest is of."""
    return with_own_digest(record)[OWN] == record.get(OWN)
