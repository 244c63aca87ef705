"""The store's column of teacher answers: its codec, and the answers of a batch's rows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import RecipeError, StoreError
from raykd.recipe.tables import StoreSettings
from raykd.store.codecs import CODECS, Codec, default_codec
from raykd.store.codecs.comb import Comb
from raykd.store.codecs.dense import Dense
from raykd.store.codecs.layout import Layout
from raykd.store.codecs.topk import TopK
from raykd.targets import SparseTargets

SPARSE = frozenset({"comb", "topk"})


@dataclass(frozen=True)
class StoredLogits:
    """The logits column of some rows, still encoded."""

    column: pa.ChunkedArray  # (N,)
    steps: NDArray[np.int32]  # (N,) valid steps of each row
    codec: Codec
    layout: Layout

    @property
    def is_sparse(self) -> bool:
        return self.codec.name in SPARSE

    def serves(self, temperature: float) -> bool:
        """Whether the KL to these answers at a temperature has no bias."""
        grid = getattr(self.codec, "grid", (temperature,))
        return not isinstance(self.codec, TopK) and temperature in grid

    def take(self, index: NDArray[np.int64]) -> "StoredLogits":
        """The rows at `index`, in that order."""
        return StoredLogits(
            column=take_rows(self.column, index),
            steps=self.steps[index],
            codec=self.codec,
            layout=self.layout,
        )

    def decode(self, temperature: float = 1.0) -> SparseTargets | Tensor:
        """Sparse targets at a temperature of the codec's grid, or values (P, V) or (P, D)."""
        return self.codec.decode(self.column, self.steps, temperature, self.layout)

    def targets(self, device: torch.device) -> "Targets":
        """Sparse targets of all rows' steps in turn, on a device, at any temperature."""
        return Targets(self, device)


class Targets:
    """Sparse targets as a function of the temperature.

    Each is decoded once; `decoded` holds those that were read, by temperature.
    """

    def __init__(self, stored: StoredLogits, device: torch.device):
        self.stored = stored
        self.device = device
        self.decoded: dict[float, SparseTargets] = {}

    def __call__(self, temperature: float) -> SparseTargets:
        if temperature not in self.decoded:
            targets = self.stored.decode(temperature)
            assert isinstance(targets, SparseTargets)
            self.decoded[temperature] = targets.to(self.device)
        return self.decoded[temperature]


def take_rows(column: pa.ChunkedArray, index: NDArray[np.int64]) -> pa.ChunkedArray:
    """The rows at `index`, read only from the chunks that hold them.

    Arrow's take() on the whole column would copy all of it.
    """
    if not len(index):
        return column.slice(0, 0)
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    chunk = np.searchsorted(ends, index, side="right")
    order = np.argsort(chunk, kind="stable")
    taken = []
    for number in np.unique(chunk):
        start = ends[number] - len(column.chunk(number))
        inside = index[order][chunk[order] == number] - start
        taken.append(column.chunk(number).take(pa.array(inside)))
    back = np.empty(len(index), np.int64)
    back[order] = np.arange(len(index))
    return pa.chunked_array([pa.concat_arrays(taken).take(pa.array(back))], column.type)


def in_plain_layout(table: pa.Table) -> pa.Table:
    """A shard's table with its answers in the plain layout, from which any rows can be read.

    All shards can share that layout; each shard's file has the one that made it smallest.
    """
    if "logits" not in table.column_names:
        return table
    at = table.schema.get_field_index("logits")
    field = table.schema.field(at)
    if not field.metadata or b"codec" not in field.metadata:
        return table
    codec, layout = codec_of(field.metadata)
    column = table.column(at).combine_chunks()
    if layout != "plain":
        column = codec.unpack(column, table.column("steps").to_numpy(), layout)
    field = pa.field(field.name, column.type, field.nullable, codec_metadata(codec, "plain"))
    return table.set_column(at, field, column)


def codec_name(settings: StoreSettings, classes: int) -> str:
    """The codec's name; "auto" stores every class of a small head and draws from a large one."""
    return default_codec(classes) if settings.codec == "auto" else settings.codec


def check_fits(stored: Mapping[str, Any], classes: int) -> None:
    """RecipeError where the `store` table of a store's identity asks for more than there is."""
    if stored["codec"] == "topk" and stored["top"] > classes:
        raise RecipeError(
            f"store.top = {stored['top']}: the data have {classes} classes; write at most "
            f'{classes}, or store.codec = "dense", which keeps them all'
        )


def codec_for(stored: Mapping[str, Any], classes: int) -> Codec:
    """The codec of the `store` table of a store's identity.

    "hidden" is not among them: the scorer knows its head.
    """
    grid = tuple(stored.get("temperatures") or (1.0,))
    match stored["codec"]:
        case "dense":
            return Dense(vocab=classes, values=stored["values"])
        case "comb":
            return Comb(vocab=classes, grid=grid, points=stored["points"])
        case "topk":
            return TopK(vocab=classes, grid=grid, k=stored["top"])
    raise AssertionError(stored["codec"])


def codec_metadata(codec: Codec, layout: Layout) -> dict[str, str]:
    """The metadata of an encoded column's schema entry."""
    return {
        "codec": codec.name,
        "settings": json.dumps(asdict(codec)),
        "layout": layout,
        "steps": "steps",
    }


def codec_of(metadata: Mapping[bytes, bytes] | None) -> tuple[Codec, Layout]:
    """(codec, layout) of a column; StoreError for one that this version does not know."""
    try:
        assert metadata is not None
        settings = json.loads(metadata[b"settings"])
        if "grid" in settings:
            settings["grid"] = tuple(settings["grid"])
        layout: Any = metadata[b"layout"].decode()
        return CODECS[metadata[b"codec"].decode()](**settings), layout
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"the logits column's description is not one that this version reads: {error!r}"
        ) from None
