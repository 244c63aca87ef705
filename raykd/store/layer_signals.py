"""Signals beyond the answers: each inner layer's is a store of its own below the first, added
without touching it.

    <store_id>/signals/hidden.blocks.0/    the same protocol: _RECIPE.json, data/, _commits/,
    _MANIFEST.json

So a recipe that reads one more layer extends the store that stands: its teacher runs once more, the
shards that are there are not written again, and recipes that do not read the layer never open it.
"""

import re
from typing import Any

import pyarrow as pa

from raykd.errors import StoreError
from raykd.files.address import Address
from raykd.files.open import open_place
from raykd.files.place import Place
from raykd.store.commit import StoreWriter

FOLDER = "signals"
COUNTS = "#steps"


def place_of(store: Place, signal: str) -> Place:
    """Where a signal's own store stands. StoreError for a name that can not be a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", signal):
        raise StoreError(
            f"signal {signal!r}: a layer's name must be letters, digits, dots, - and _"
        )
    return store.below(f"{FOLDER}/{signal}")


def writers(
    where: Address | Place, identity: dict[str, Any], signals: list[str]
) -> dict[str, StoreWriter]:
    """The writer of the store itself, under "", and of each signal."""
    store = open_place(where)
    extra = {
        name: StoreWriter(place_of(store, name), identity | {"signal": name}) for name in signals
    }
    return {"": StoreWriter(store, identity)} | extra


def split(table: pa.Table) -> dict[str, pa.Table]:
    """A shard's table as its parts: "" holds every column without a dot in its name, each signal
    its own.

    A signal counts its own steps: one where it is pooled, those of the inputs where the teacher
    answers once.
    """
    names = [name for name in table.column_names if is_signal(name)]
    parts = {name: table.select(["row_id", counts(name), name]) for name in names}
    parts = {name: part.rename_columns(["row_id", "steps", name]) for name, part in parts.items()}
    return {"": table.select([name for name in table.column_names if "." not in name])} | parts


def is_signal(name: str) -> bool:
    """Whether a column is an inner layer's signal."""
    return "." in name and not name.endswith(COUNTS)


def counts(name: str) -> str:
    """The column that counts a signal's steps, in the table of a shard before it is split."""
    return name + COUNTS


def stored(store: Place) -> list[Place]:
    """The places of all signals that a store holds, whole or not."""
    below = [store.below(f"{FOLDER}/{name}") for name in store.folders(FOLDER)]
    return [place for place in below if place.get("_RECIPE.json") is not None]
