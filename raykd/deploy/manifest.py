"""manifest.json of an artefact, and every file held against it.

README.md is a card to fill in, so it may change.
"""

from pathlib import Path
from typing import Any

from raykd.errors import StoreError
from raykd.files import links, records
from raykd.files.atomic import read_json
from raykd.training import run_files

SCHEMA = 1
CARD = "README.md"
STUDENT = "weights_sha256"  # key of the manifest: of the trained weights that it was made from
KINDS: dict[str, type] = {"format": str, "seed": int, "bytes": int, "parity": dict, "files": dict}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an artefact; None if the folder has none.

    StoreError if it is no manifest, if it is of another schema, or if it names files elsewhere.
    """
    path = folder / run_files.MANIFEST
    manifest = read_json(path)
    if manifest is None:
        return None
    if not isinstance(manifest, dict):
        raise StoreError(f"{path} is damaged: not the manifest of an artefact; {_again(folder)}")
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"{path} is of schema {manifest.get('schema')!r:.40}, and this raykd reads {SCHEMA}; "
            f"use the raykd that wrote it, or {_again(folder)}"
        )
    wrong = [name for name, kind in KINDS.items() if not isinstance(manifest.get(name), kind)]
    wrong = [name for name in wrong if name != "seed" or name in manifest]
    if wrong:
        raise StoreError(
            f"{path} is damaged: {', '.join(wrong)} missing or of another kind; {_again(folder)}"
        )
    for name in manifest["files"]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise StoreError(f"{path} names {name!r}, which is no file beside it; {_again(folder)}")
    return manifest


def is_complete(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file of a manifest is there. StoreError if one is not what was written."""
    links.check_tree(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return False
        fault = None if name == CARD else records.fault_of(path, entry)
        if fault is not None:
            raise StoreError(f"{path}: {fault}; {_again(folder)}")
    return True


def check(folder: Path) -> None:
    """StoreError if an artefact's files are not those of its manifest, or lead out of the folder.

    A folder without a manifest is held against nothing but links.
    """
    links.check_tree(folder)
    manifest = read_manifest(folder)
    if manifest is not None and not is_complete(folder, manifest):
        raise StoreError(f"{folder} lacks files that its manifest names; {_again(folder)}")


def check_alone(folder: Path) -> None:
    """StoreError if an artefact folder holds what its manifest does not name."""
    manifest = read_manifest(folder) or {"files": {}}
    known = {*manifest["files"], run_files.MANIFEST}
    if more := sorted(path.name for path in folder.iterdir() if path.name not in known):
        raise StoreError(
            f"{folder / more[0]}: the artefact's manifest does not name it; move it away"
        )


def _again(folder: Path) -> str:
    return f"put the file back as it was, or delete {folder} and type: raykd export RECIPE"
