"""Codecs: how a teacher's answers become bytes, a file each, and which divergences each serves."""

from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import RecipeError
from raykd.store.codecs.comb import Comb
from raykd.store.codecs.dense import Dense
from raykd.store.codecs.hidden import Hidden
from raykd.store.codecs.layout import EncodedColumn, Layout
from raykd.store.codecs.temperatures import index_of
from raykd.store.codecs.topk import TopK
from raykd.targets import SparseTargets

SMALL = 64  # up to so many classes all are stored: a sparse form has no fewer bytes


class Codec(Protocol):
    """A frozen dataclass of a column's settings.

    `encode` gives a batch's rows, `pack` a shard's rows in their smallest layout, `unpack` those in
    the plain layout, `decode` the answers of any rows.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    serves: ClassVar[frozenset[str]]  # divergences

    def encode(
        self, values: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int, /
    ) -> pa.Array: ...
    def pack(self, column: Any, steps: NDArray[Any], /) -> tuple[pa.Array, Layout]: ...
    def unpack(self, column: Any, steps: NDArray[Any], laid_out: Layout, /) -> pa.Array: ...
    def decode(
        self,
        column: EncodedColumn,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
        /,
    ) -> SparseTargets | Tensor: ...


CODECS: dict[str, type[Codec]] = {"dense": Dense, "comb": Comb, "topk": TopK, "hidden": Hidden}


def default_codec(classes: int) -> str:
    """The name of the codec for a head of so many classes."""
    return "dense" if classes <= SMALL else "comb"


def check_serves(
    codec: type[Codec] | Codec, divergence: str, temperature: float | None = None
) -> None:
    """RecipeError unless a column of this codec serves the divergence (at the temperature)."""
    if divergence not in codec.serves:
        raise RecipeError(
            f"a {codec.name!r} store serves the {', '.join(sorted(codec.serves))} divergence, not "
            f'{divergence!r}, which needs every class: score with store.codec = "dense", or '
            '"hidden", which is small for a large head'
        )
    grid = getattr(codec, "grid", None)
    if isinstance(grid, tuple) and temperature is not None:
        index_of(temperature, grid)
