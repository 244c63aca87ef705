"""The teacher's last hidden states, from which its frozen head gives exact logits in training.

    z = hidden W^T + b

They take 2 D bytes a step, whatever the vocabulary; fp16 hidden states are the only rounding. The
head's digest is among the column's settings; another head is refused.
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
from raykd.store.codecs.layout import EncodedColumn, Layout


@dataclass(frozen=True)
class Hidden:
    """Settings of one column: the width D of a hidden state, and the `head_digest` of its head."""

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
        column: EncodedColumn,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
    ) -> Tensor:
        """(P, D) fp16: the hidden states of all rows' steps in turn."""
        return Dense(self.width).decode(column, steps)

    def check_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """StoreError unless this is the head whose hidden states are stored."""
        digest = head_digest(weight, bias)
        if digest != self.head:
            raise StoreError(
                f"the stored hidden states belong to the output head {self.head[:12]}, and this "
                f"teacher's is {digest[:12]}: load the weights that scored the store, or score "
                "again"
            )


def head_digest(weight: Tensor, bias: Tensor | None = None) -> str:
    """sha256 of the dtype, shape and bytes of a head's weight and of its bias."""
    sha = hashlib.sha256()
    for tensor in (weight, bias):
        if tensor is not None:
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
