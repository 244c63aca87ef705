"""Every class of every step, as fp16 logits or 8-bit log-probs, for any divergence and temperature.

fp16   2 V bytes a step; logits within 2^-11 of themselves, so |error of log p| <= 2^-10 max |z|
int8   V + 2 bytes a step, for small heads; log p rounded to 1/255 of the step's lowest log p
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import DataError, StoreError
from raykd.store.codecs import layout
from raykd.store.codecs.layout import ByteStream, EncodedColumn, Layout


@dataclass(frozen=True)
class Dense:
    """Settings of one column: `vocab` real classes a step, as `values`."""

    vocab: int
    values: Literal["fp16", "int8"] = "fp16"
    name: ClassVar[str] = "dense"
    serves: ClassVar[frozenset[str]] = frozenset({"forward", "reverse", "js", "tv", "any"})

    @torch.no_grad()
    def encode(
        self, logits: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int
    ) -> pa.BinaryArray:
        """(B,) binary: the valid steps of `logits` (B, T, C), columns beyond `vocab` left out."""
        steps = mask.sum(1).cpu().numpy()
        z = logits[mask][:, : self.vocab].float()
        if self.values == "fp16":
            data = z.half().cpu().numpy().astype("<f2", copy=False)
            _check_finite(data, steps, row_id)
            return layout.binary(
                ByteStream(data.reshape(-1).view(np.uint8), steps * 2 * self.vocab)
            )
        log_p = z.log_softmax(1).cpu().numpy()
        _check_finite(log_p, steps, row_id)
        low = np.minimum(log_p.min(1, initial=-1e-3), -1e-3).astype("<f2")
        codes = np.rint(log_p / low[:, None].astype(np.float32) * 255).clip(0, 255).astype(np.uint8)
        data = np.concatenate([low[:, None].view(np.uint8), codes], 1)
        return layout.binary(ByteStream(data.reshape(-1), steps * (2 + self.vocab)))

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
        """(P, V): fp16 logits or fp32 log-probs of all rows' steps in turn.

        The loss divides them by the temperature.
        """
        width = 2 * self.vocab if self.values == "fp16" else 2 + self.vocab
        stream = layout.bytes_of(column)
        layout.check_sizes({"values": stream}, {"values": width * steps.astype(np.int64)})
        data = stream.data.reshape(-1, width)
        if self.values == "fp16":
            values = data.view("<f2")
        else:
            low = np.ascontiguousarray(data[:, :2]).view("<f2").astype(np.float32)
            values = data[:, 2:] * (low / np.float32(255))
        if not np.isfinite(values).all():
            raise StoreError("a stored logit is not finite: the column is damaged")
        return torch.from_numpy(values)


def _check_finite(
    values: NDArray[np.floating], steps: NDArray[Any], row_id: NDArray[np.int64]
) -> None:
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        rows = np.unique(np.repeat(row_id, steps)[bad])[:5].tolist()
        raise DataError(
            f"the teacher gives NaN, infinite or fp16-overflowing values for rows {rows}"
        )
