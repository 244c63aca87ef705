"""The store's column of teacher answers: which codec it has, and how a batch's rows come back out
of it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import StoreError
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

    def tells(self, temperature: float) -> bool:
        """Whether the KL to it at a temperature can be told without bias."""
        grid = getattr(self.codec, "grid", (temperature,))
        return not isinstance(self.codec, TopK) and temperature in grid

    def take(self, index: NDArray[np.int64]) -> "StoredLogits":
        """The rows at `index`, in that order."""
        return StoredLogits(taken(self.column, index), self.steps[index], self.codec, self.layout)

    def at(self, temperature: float = 1.0) -> SparseTargets | Tensor:
        """What the codec gives: sparse targets at a temperature of its grid, or (P, V) or (P, D)
        values.
        """
        return self.codec.decode(self.column, self.steps, temperature, self.layout)

    def targets(self, device: torch.device) -> "Targets":
        """Sparse targets of all rows' steps in turn, on a device, as a function of the temperature."""
        return Targets(self, device)


class Targets:
    """Sparse targets as a function of the temperature; each is decoded once, `asked` are those that
    were read.
    """

    def __init__(self, stored: StoredLogits, device: torch.device):
        self.stored, self.device = stored, device
        self.asked: dict[float, SparseTargets] = {}

    def __call__(self, temperature: float) -> SparseTargets:
        if temperature not in self.asked:
            found = self.stored.at(temperature)
            assert isinstance(found, SparseTargets)
            self.asked[temperature] = found.to(self.device)
        return self.asked[temperature]


def taken(column: pa.ChunkedArray, index: NDArray[np.int64]) -> pa.ChunkedArray:
    """The rows at `index`; only the chunks that hold them are touched, because take() on all would
    copy all.
    """
    if not len(index):
        return column.slice(0, 0)
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    chunk = np.searchsorted(ends, index, side="right")
    order = np.argsort(chunk, kind="stable")
    parts = []
    for number in np.unique(chunk):
        here = index[order][chunk[order] == number] - (ends[number] - len(column.chunk(number)))
        parts.append(column.chunk(number).take(pa.array(here)))
    back = np.empty(len(index), np.int64)
    back[order] = np.arange(len(index))
    return pa.chunked_array([pa.concat_arrays(parts).take(pa.array(back))], column.type)


def plain(table: pa.Table) -> pa.Table:
    """A shard's table with its answers in the plain layout, which all shards can share and any rows
    are read from.

    Each shard's file has the layout that made it smallest.
    """
    if "logits" not in table.column_names:
        return table
    at = table.schema.get_field_index("logits")
    field = table.schema.field(at)
    if not field.metadata or b"codec" not in field.metadata:
        return table
    codec, laid_out = from_metadata(field.metadata)
    column = table.column(at).combine_chunks()
    if laid_out != "plain":
        column = codec.unpack(column, table.column("steps").to_numpy(), laid_out)
    field = pa.field(field.name, column.type, field.nullable, metadata(codec, "plain"))
    return table.set_column(at, field, column)


def codec_name(settings: StoreSettings, classes: int) -> str:
    """The codec's name; "auto" keeps every class of a small head and draws from a large one."""
    return default_codec(classes) if settings.codec == "auto" else settings.codec


def codec_for(stored: Mapping[str, Any], classes: int) -> Codec:
    """The codec of a store identity's `store` table. `hidden` is told its head by the scorer."""
    grid = tuple(stored.get("temperatures") or (1.0,))
    match stored["codec"]:
        case "dense":
            return Dense(vocab=classes, values=stored["values"])
        case "comb":
            return Comb(vocab=classes, grid=grid, points=stored["points"])
        case "topk":
            return TopK(vocab=classes, grid=grid, k=stored["top"])
    raise AssertionError(stored["codec"])


def metadata(codec: Codec, layout: Layout) -> dict[str, str]:
    """The schema entry of an encoded column."""
    return {
        "codec": codec.name,
        "settings": json.dumps(asdict(codec)),
        "layout": layout,
        "steps": "steps",
    }


def from_metadata(found: Mapping[bytes, bytes] | None) -> tuple[Codec, Layout]:
    """The codec and layout of a column; StoreError for one that this version does not know."""
    try:
        assert found is not None
        settings = json.loads(found[b"settings"])
        settings |= {"grid": tuple(settings["grid"])} if "grid" in settings else {}
        layout: Any = found[b"layout"].decode()
        return CODECS[found[b"codec"].decode()](**settings), layout
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"the logits column's description is not one that this version reads: {error!r}"
        ) from None
