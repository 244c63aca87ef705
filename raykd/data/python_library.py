"""The source of Python's standard library, a text that every installation brings along.

Files differ between Python versions, so the data set is a list of files with their digests,
`shipped/python_library.txt`. The digest of a file's name decides its split: 94 of 100 files are in
train, 5 in test and 1 in val. Licence: PSF, see NOTICE.
"""

import hashlib
import platform
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Any

from raykd.data import text
from raykd.data.rows import SPLITS, Dataset
from raykd.errors import DataError, RecipeError
from raykd.recipe.tables import DataRef

MADE_WITH = "3.11.7"
SETTINGS = {"share": 1.0, "pinned": True}
HELD_OUT = {0: "val", 1: "test", 2: "test", 3: "test", 4: "test", 5: "test"}  # of 100


def load(ref: DataRef) -> Dataset:
    """The data set of the library's files as rows of tokens."""
    return text.load(records(ref), "python_library", ref)


def records(ref: DataRef) -> list[dict[str, Any]]:
    """The library's files as records of texts.

    `data.settings.share` is the share of the training files. DataError if a file is not that of the
    list; `data.settings.pinned = false` takes the files as they are, as another data set.
    """
    if not ref.tokenizer:
        raise RecipeError(
            "data.tokenizer: missing; python_library is text, and needs a tokenizer.json"
        )
    if unknown := sorted(set(ref.settings) - set(SETTINGS)):
        raise RecipeError(
            f"data.settings: python_library has no {', '.join(unknown)}; "
            f"it takes {', '.join(SETTINGS)}"
        )
    settings: dict[str, Any] = SETTINGS | ref.settings
    if not isinstance(settings["share"], int | float) or not 0 < settings["share"] <= 1:
        raise RecipeError(
            f"data.settings.share = {settings['share']!r}: write a number above 0, at most 1"
        )
    root = Path(sysconfig.get_path("stdlib"))
    digests = listed()
    files = {name: (root / name).read_bytes() for name in digests if (root / name).is_file()}
    changed = [
        name
        for name, digest in digests.items()
        if hashlib.sha256(files.get(name, b"")).hexdigest() != digest
    ]
    if changed and settings["pinned"]:
        raise DataError(
            f"python_library: {len(changed)} of {len(digests)} files of Python "
            f"{platform.python_version()} are not those of Python {MADE_WITH}, which this data set "
            f"is made of (first: {changed[0]}); use that Python, or take yours as another data "
            "set: data.settings.pinned = false"
        )
    limit = 65536 * float(settings["share"])
    return [
        {"text": content.decode("utf-8", "replace"), "split": split_of(name), "group": name}
        for name, content in files.items()
        if split_of(name) != "train" or _two_bytes(name, 2) < limit
    ]


def split_of(name: str) -> str:
    """The split that a file belongs to."""
    return HELD_OUT.get(_two_bytes(name, 0) % 100, SPLITS[0])


def _two_bytes(name: str, at: int) -> int:
    """Two bytes of a name's digest as a number from 0 to 65535."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[at : at + 2])


def listed() -> dict[str, str]:
    """The digest of each file by its name."""
    path = resources.files("raykd.data") / "shipped" / "python_library.txt"
    digests = {}
    for line in path.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        digests[name] = digest
    return digests
