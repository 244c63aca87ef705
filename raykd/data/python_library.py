"""The Python standard library's own source, as text that every installation brings along (PSF
licence, see NOTICE).

Files differ between Python versions, so the data set is a list of them with digests,
`shipped/python_library.txt`. A file is of one split, told by its name's digest: of 100, 94 are of
training, 5 of test and 1 of val.
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
from raykd.recipe.recipe import DataRef

MADE_WITH = "3.11.7"
SETTINGS = {"share": 1.0, "pinned": True}
HELD = {0: "val", 1: "test", 2: "test", 3: "test", 4: "test", 5: "test"}  # of 100


def load(ref: DataRef) -> Dataset:
    """The library's files as rows of tokens. `data.settings`: `share` of the training files,
    `pinned`.

    DataError where files are not those of the list; `pinned = false` takes them as they are, as
    another data set.
    """
    if not ref.tokenizer:
        raise RecipeError(
            "data.tokenizer: missing; python_library is text, and needs a tokenizer.json"
        )
    if unknown := sorted(set(ref.settings) - set(SETTINGS)):
        raise RecipeError(
            f"data.settings: python_library has no {', '.join(unknown)}; it takes {', '.join(SETTINGS)}"
        )
    settings: dict[str, Any] = SETTINGS | ref.settings
    if not isinstance(settings["share"], int | float) or not 0 < settings["share"] <= 1:
        raise RecipeError(
            f"data.settings.share = {settings['share']!r}: write a number above 0, at most 1"
        )
    root = Path(sysconfig.get_path("stdlib"))
    digests = listed()
    found = {name: (root / name).read_bytes() for name in digests if (root / name).is_file()}
    changed = [
        name
        for name, digest in digests.items()
        if hashlib.sha256(found.get(name, b"")).hexdigest() != digest
    ]
    if changed and settings["pinned"]:
        raise DataError(
            f"python_library: {len(changed)} of {len(digests)} files of Python {platform.python_version()} are not "
            f"those of Python {MADE_WITH}, which this data set is made of (first: {changed[0]}); use that Python, or "
            "take yours as another data set: data.settings.pinned = false"
        )
    records = [
        {"text": data.decode("utf-8", "replace"), "split": split, "group": name}
        for name, data in found.items()
        if (split := split_of(name)) != "train"
        or _place(name, 2) < 65536 * float(settings["share"])
    ]
    return text.load(records, "python_library", ref)


def split_of(name: str) -> str:
    """The split that a file belongs to."""
    return HELD.get(_place(name, 0) % 100, SPLITS[0])


def _place(name: str, at: int) -> int:
    """Two bytes of a name's digest."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[at : at + 2])


def listed() -> dict[str, str]:
    """The digest of each file by its name."""
    lines = (
        (resources.files("raykd.data") / "shipped" / "python_library.txt").read_text().splitlines()
    )
    return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
