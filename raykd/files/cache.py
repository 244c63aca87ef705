"""What a node keeps for later runs: a folder that only this user can write.

It is $RAYKD_CACHE, or `raykd-<uid>` in the temporary folder. Whatever is lost there is made again.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from raykd.errors import InfraError
from raykd.files.atomic import write_bytes
from raykd.files.digests import file_blake2b, file_sha256

HEX = 64  # characters of a digest
SETTLED_NS = 2_000_000_000  # since the last write of a file whose digest is kept


def cache_folder() -> Path:
    """This user's folder on this node. InfraError if others can write there."""
    default = Path(tempfile.gettempdir()) / f"raykd-{os.getuid()}"
    folder = Path(os.environ.get("RAYKD_CACHE") or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InfraError(
            f"{folder} can be written by others, so no copy in it is trusted; set RAYKD_CACHE to "
            "your own"
        )
    return folder


def sha256_kept(path: Path) -> str:
    """Hex sha256 of a file, computed once on this node while the file stays as it is."""
    return _kept(path, "sha256", file_sha256)


def blake2b_kept(path: Path) -> str:
    """What `file_blake2b` gives of a file, computed once on this node while the file stays as it
    is.
    """
    return _kept(path, "blake2b", file_blake2b)


def _kept(path: Path, kind: str, digest_of: Callable[[Path], str]) -> str:
    """A digest of a file, which stays in the cache under the file's identity and times.

    That of a file that was written just now does not: another write might bear the same time.
    """
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    key = "-".join(f"{value:x}" for value in (status.st_dev, status.st_ino, status.st_size, *times))
    kept = cache_folder() / kind / key
    try:
        digest = kept.read_text()
    except FileNotFoundError:
        digest = ""
    if len(digest) != HEX:
        digest = digest_of(path)
        if time.time_ns() - max(times) > SETTLED_NS:
            write_bytes(kept, digest.encode())
    return digest
