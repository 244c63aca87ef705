"""The teacher's last hidden state, for a head that is frozen and kept: exact logits again at
training time.

    z = hidden W^T + b    2 D bytes a step whatever the vocabulary; fp16 hidden states are the only
    rounding

The head's digest stands in the column's settings; another head is refused.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import StoreError
from raykd.store.codecs.dense import Dense
from raykd.store.codecs.layout import Column, Layout


@dataclass(frozen=True)
class Hidden:
    """Settings of one column: the width D of a hidden state, and the `head_digest` of the head it
    belongs to.
    """

    width: int
    head: str
    name: ClassVar[str] = "hidden"
    serves: ClassVar[frozenset[str]] = frozenset({"forward", "reverse", "js", "tv", "any"})

    def encode(
        self, hidden: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int
    ) -> pa.BinaryArray:
        """(B,) binary: the valid steps of `hidden` (B, T, D) as fp16."""
        return Dense(self.width).encode(hidden, mask, row_id, key)

    def pack(self, column: pa.BinaryArray, steps: NDArray[Any]) -> tuple[pa.BinaryArray, Layout]:
        """The column as it is: it has one layout."""
        return column, "plain"

    def unpack(
        self, column: pa.BinaryArray, steps: NDArray[Any], laid_out: Layout
    ) -> pa.BinaryArray:
        return column

    def decode(
        self,
        column: Column,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
    ) -> Tensor:
        """(P, D) fp16: hidden states of all rows' steps in turn; with the head they are
        `raykd.losses.fused.Head`.
        """
        return Dense(self.width).decode(column, steps)

    def check_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """StoreError unless this is the head whose hidden states are stored."""
        found = head_digest(weight, bias)
        if found != self.head:
            raise StoreError(
                f"the stored hidden states belong to the output head {self.head[:12]}, and this teacher's is "
                f"{found[:12]}: load the weights that scored the store, or score again"
            )


def head_digest(weight: Tensor, bias: Tensor | None = None) -> str:
    """sha256 of a head's dtype, shape and bytes; of its bias too."""
    sha = hashlib.sha256()
    for part in (weight, bias):
        if part is not None:
            sha.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            sha.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
