"""The k likeliest classes and one bucket for all others: the KL over k + 1 outcomes.

    p_i = exp(log p_i / T - lse_T) for the k classes,   p_tail = 1 - sum p_i,   q_tail = 1 - sum q_i

It serves any temperature of a grid, and only the forward KL. The KL is not more than the full one
(merging outcomes never raises it), equal at k = V, and 0 only where the k probabilities agree. It
is deterministic and biased: it does not see how the tail's mass is spread.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import StoreError
from raykd.store.codecs import layout
from raykd.store.codecs.layout import ByteStream, EncodedColumn, Ints, Layout
from raykd.store.codecs.temperatures import chunks, index_of, lse_bound, lse_bytes, tempered
from raykd.targets import SparseTargets


@dataclass(frozen=True)
class TopK:
    """Settings of one column: `k` classes of `vocab` a step, for the temperatures of `grid`."""

    vocab: int
    grid: tuple[float, ...] = (1.0,)
    k: int = 50
    name: ClassVar[str] = "topk"
    serves: ClassVar[frozenset[str]] = frozenset({"forward"})

    def __post_init__(self) -> None:
        assert 1 <= self.k <= self.vocab
        assert min(self.grid, default=0) > 0

    @property
    def streams(self) -> list[str]:
        return ["ids", "log_p", *["lse"] * any(t != 1 for t in self.grid)]

    @torch.no_grad()
    def encode(
        self, logits: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int
    ) -> pa.StructArray:
        """(B,) struct: the valid steps of `logits` (B, T, C), without columns beyond `vocab`.

        Ids are in the plain layout. Nothing is drawn: `row_id` and `key` change nothing.
        """
        steps = mask.sum(1).cpu().numpy()
        encoded = []
        for _, z in chunks(logits, mask, self.vocab):
            log_p = z.log_softmax(1)
            ids = log_p.topk(self.k, dim=1).indices.sort(1).values
            lse = tempered(log_p, self.grid)[1] if "lse" in self.streams else []
            values = log_p.gather(1, ids).cpu().numpy().astype("<f2")
            encoded.append((ids.cpu().numpy(), values, lse_bytes(lse, self.grid, self.vocab)))
        ids, log_p, lse = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
        entries = self.k * steps
        start = self._starts(steps)
        streams = {
            "ids": layout.put_ids(ids.reshape(-1), start, entries, self.vocab, "plain"),
            "log_p": ByteStream(log_p.reshape(-1).view(np.uint8), 2 * entries),
            "lse": ByteStream(lse.reshape(-1), steps * lse.shape[1]),
        }
        return layout.struct({name: streams[name] for name in self.streams})

    def pack(self, column: pa.StructArray, steps: NDArray[Any]) -> tuple[pa.StructArray, Layout]:
        """(a whole shard's column in its smallest layout, the name of that layout)."""
        streams, entries, start = self._checked(column, steps)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, "plain")
        return layout.smallest(column, ids, start, entries, self.vocab)

    def unpack(
        self, column: pa.StructArray, steps: NDArray[Any], laid_out: Layout
    ) -> pa.StructArray:
        """The inverse of `pack`: the column in the plain layout. StoreError for damaged bytes."""
        streams, entries, start = self._checked(column, steps)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, laid_out)
        return layout.struct(
            streams | {"ids": layout.put_ids(ids, start, entries, self.vocab, "plain")}
        )

    def decode(
        self,
        column: EncodedColumn,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
    ) -> SparseTargets:
        """The targets of all rows' steps in turn, at a temperature of the grid.

        StoreError for damaged bytes.
        """
        index_of(temperature, self.grid)
        streams, entries, start = self._checked(column, steps)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, laid_out)
        log_p = streams["log_p"].data.view("<f2").astype(np.float32).reshape(-1, self.k)
        if not (np.isfinite(log_p) & (log_p <= 0)).all():
            raise StoreError("a stored log-prob is not a number up to 0: the column is damaged")
        if temperature != 1:
            others = [t for t in self.grid if t != 1]
            codes = streams["lse"].data.view("<u2").reshape(-1, len(others))
            codes = codes[:, [others.index(temperature)]]
            bound = lse_bound(temperature, self.vocab) / 65535 * (1 if temperature > 1 else -1)
            log_p = log_p / np.float32(temperature) - codes * np.float32(bound)
        p = np.exp(log_p)
        tail = np.maximum(1 - p.sum(1, dtype=np.float64), 0)
        if self.k == self.vocab:
            tail[:] = 0
        entropy = -(p * log_p).sum(1, dtype=np.float64) - tail * np.log(np.maximum(tail, 1e-300))
        return SparseTargets(
            ids=torch.from_numpy(ids),
            start=torch.from_numpy(start),
            weight=_flat(p),
            vocab=self.vocab,
            entropy=_flat(entropy),
            tail=_flat(tail),
        )

    def _starts(self, steps: NDArray[np.integer]) -> Ints:
        """(P + 1,): where each place's entries begin."""
        return np.arange(int(steps.sum(dtype=np.int64)) + 1) * self.k

    def _checked(
        self, column: EncodedColumn, steps: NDArray[Any]
    ) -> tuple[dict[str, ByteStream], Ints, Ints]:
        """(streams of the right sizes, entries of each row (R,), start of each place (P + 1,))."""
        streams = layout.streams_of(column, self.streams)
        entries = self.k * steps.astype(np.int64)
        sizes = {"ids": entries * layout.id_bytes(self.vocab), "log_p": 2 * entries}
        sizes["lse"] = 2 * sum(t != 1 for t in self.grid) * steps.astype(np.int64)
        layout.check_sizes(streams, {name: sizes[name] for name in self.streams})
        return streams, entries, self._starts(steps)


def _flat(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32).reshape(-1))
