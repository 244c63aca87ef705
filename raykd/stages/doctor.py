"""A check-up of this machine: what raykd needs, what is there, and what to type if it is wrong."""

import importlib.metadata
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from raykd.errors import InfraError
from raykd.files.address import public_uri
from raykd.orchestration.session import knock, named_cluster

FREE_BYTES = 2 * 2**30


def examine(out: Path, uri: str | None) -> list[dict[str, Any]]:
    """One row for each question: {"name", "ok", "found", "do"}."""
    return [_python(), *_packages(), _disk(out), _memory(), _auth(), _cluster(), _mlflow(uri)]


def _row(name: str, ok: bool, found: str, do: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "found": found, "do": "" if ok else do}


def _python() -> dict[str, Any]:
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    return _row("python", ok, sys.version.split()[0], "use Python 3.11, 3.12 or 3.13")


def _packages() -> list[dict[str, Any]]:
    """Every declared dependency, extras left out, against what is installed."""
    rows = []
    for text in importlib.metadata.requires("raykd") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(_row(wanted.name, False, "not installed", f"pip install '{text}'"))
            continue
        ok = wanted.specifier.contains(version, prereleases=True)
        do = f"pip install '{wanted.name}{wanted.specifier}'"
        rows.append(_row(wanted.name, ok, version, do))
    return rows


def _disk(out: Path) -> dict[str, Any]:
    whole = out.absolute()
    folder = next(path for path in (whole, *whole.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    ok = free > FREE_BYTES and os.access(folder, os.W_OK)
    do = f"free {FREE_BYTES / 2**30:.0f} GiB there, or name a writable --out"
    return _row("disk", ok, f"{free / 2**30:.1f} GiB free at {folder}", do)


def _memory() -> dict[str, Any]:
    """Ray keeps its objects in /dev/shm; a small one makes it use the disk, slowly."""
    shm = Path("/dev/shm")
    if not shm.exists():
        return _row("shared memory", True, "no /dev/shm on this system")
    size = shutil.disk_usage(shm).total
    do = "start the container with --shm-size=2g or more"
    return _row("shared memory", size >= 2**28, f"{size / 2**30:.2f} GiB at {shm}", do)


def _auth() -> dict[str, Any]:
    mode = os.environ.get("RAY_AUTH_MODE")
    address = named_cluster()
    if address is None:
        return _row("ray auth", True, "embedded cluster, with a token of its own")
    try:
        host = urlsplit(address if "//" in address else f"//{address}").hostname
    except ValueError:  # no address, as the next row says
        host = None
    local = host in ("127.0.0.1", "localhost", "auto")
    do = (
        "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH: a cluster without a token runs "
        "anybody's code"
    )
    ok = mode == "token" or (local and mode is not None)
    return _row("ray auth", ok, f"RAY_AUTH_MODE={mode}", do)


def _cluster() -> dict[str, Any]:
    address = named_cluster()
    if address is None:
        text = "none named; one is started inside each command that needs it"
        return _row("ray cluster", True, text)
    do = 'cluster/local.sh start && eval "$(cluster/local.sh env)", or unset RAY_ADDRESS'
    try:
        knock(address)
    except InfraError:
        return _row("ray cluster", False, f"RAY_ADDRESS={public_uri(address)}", do)
    return _row("ray cluster", True, f"RAY_ADDRESS={public_uri(address)}")


def _mlflow(uri: str | None) -> dict[str, Any]:
    if uri is None:
        return _row("mlflow", True, "a sqlite file under --out")
    parts = urlsplit(uri)
    ok = parts.scheme == "sqlite" or _answers(parts.hostname or "", parts.port or 443)
    server = f"{parts.scheme}://{parts.hostname or parts.path}"
    shown = public_uri(uri)
    return _row("mlflow", ok, server, f"start the server at {urlsplit(shown).netloc or shown}")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def table(rows: list[dict[str, Any]]) -> str:
    """The check-up for a terminal. A line that is wrong is marked and says what to type."""
    lines = []
    for row in rows:
        mark = " " if row["ok"] else "!"
        lines.append(f"{mark} {row['name']:<15}{row['found']}{_advice(row)}")
    return "\n".join(lines)


def _advice(row: dict[str, Any]) -> str:
    return f"\n  {'':<15}{row['do']}" if row["do"] else ""
