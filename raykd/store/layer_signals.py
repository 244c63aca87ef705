"""Signals of inner layers: each is a store below the teacher's, in the folder `signals`.

    <store_id>/signals/hidden.blocks.0/    _RECIPE.json, data/, _commits/, _MANIFEST.json as above

So a recipe that reads one more layer extends the existing store: the teacher runs once more, the
existing shards are not rewritten, and recipes that do not read the layer never open it.
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
    """The place of a signal's store. StoreError for a name that cannot be a folder's."""
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
    writer_of = {"": StoreWriter(store, identity)}
    for name in signals:
        writer_of[name] = StoreWriter(place_of(store, name), identity | {"signal": name})
    return writer_of


def split(table: pa.Table) -> dict[str, pa.Table]:
    """A shard's table by store: "" has every column without a dot, each signal has its own.

    A signal has its own steps: one if it is pooled, those of the inputs even if the teacher answers
    once a sequence.
    """
    answers = [name for name in table.column_names if "." not in name]
    tables = {"": table.select(answers)}
    for name in filter(is_signal, table.column_names):
        signal = table.select(["row_id", steps_column(name), name])
        tables[name] = signal.rename_columns(["row_id", "steps", name])
    return tables


def is_signal(name: str) -> bool:
    """Whether a column is an inner layer's signal."""
    return "." in name and not name.endswith(COUNTS)


def steps_column(name: str) -> str:
    """The column that counts a signal's steps, in the table of a shard before it is split."""
    return name + COUNTS


def stores_below(store: Place) -> list[Place]:
    """The places of all signals that a store has, complete or not."""
    below = [store.below(f"{FOLDER}/{name}") for name in store.folders(FOLDER)]
    return [place for place in below if place.get("_RECIPE.json") is not None]
