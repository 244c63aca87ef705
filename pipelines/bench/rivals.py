"""What others store, as codecs of the same form: random-sampling KD, DistillKit's compressed top-k,
top-k renormalised.

Written from their definitions, with our streams, zstd and checks around them, so that bytes compare
like with like.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.store.codecs import Comb, TopK, layout
from raykd.store.codecs.layout import ByteStream, EncodedColumn, Layout
from raykd.store.codecs.temperatures import chunks
from raykd.targets import SparseTargets


@dataclass(frozen=True)
class RandomSampling:
    """RS-KD (Anshumann et al. 2025, arXiv 2503.16870):

    `points` independent draws from p, unique ids with counts.
    """

    vocab: int
    points: int

    @property
    def stored(self) -> Comb:
        return Comb(self.vocab, points=self.points, entropy=False)

    @torch.no_grad()
    def encode(
        self, logits: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int
    ) -> pa.StructArray:
        steps = mask.sum(1).numpy()
        draws = torch.Generator().manual_seed(key + int(row_id[0]))
        parts = [
            torch.multinomial(z.softmax(1), self.points, replacement=True, generator=draws)
            .sort(1)
            .values
            for _, z in chunks(logits, mask, self.vocab)
        ]
        drawn = torch.cat(parts).numpy()
        new = np.ones_like(drawn, bool)
        new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        first = np.flatnonzero(new)
        found = new.sum(1)
        count = np.diff(first, append=drawn.size).astype(np.uint8)
        entries = layout.sums(found, steps)
        start = np.concatenate([[0], np.cumsum(found)])
        ids = layout.put_ids(drawn.reshape(-1)[first], start, entries, self.vocab, "plain")
        return layout.struct({"ids": ids, "counts": ByteStream(count, entries)})

    def pack(self, column: pa.StructArray, steps: NDArray[Any]) -> tuple[pa.StructArray, Layout]:
        return self.stored.pack(column, steps)

    def decode(
        self,
        column: EncodedColumn,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
    ) -> SparseTargets:
        return self.stored.decode(column, steps, temperature, laid_out)


class Renormalised(TopK):
    """The k likeliest classes, their probabilities scaled to a sum of one; nothing of the tail."""

    def decode(
        self,
        column: EncodedColumn,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
    ) -> SparseTargets:
        found = super().decode(column, steps, temperature, laid_out)
        p = found.weight.view(-1, self.k)
        return replace(
            found, weight=(p / p.sum(1, keepdim=True)).reshape(-1), entropy=None, tail=None
        )


@dataclass(frozen=True)
class DistillKit:
    """The k likeliest log-probs: the first `exact` as bf16, the others as a curve over their rank,
    4 bytes a term.

    The curve is the least-squares sum of the powers in `powers` (0.5: the square root) over ranks
    0, 1, .. Without residuals, as both published settings are. The loss renormalises the k
    (missing_probability_handling: zero). Ids stay u16 in the order of rank: packed into 13 bits, as
    published, zstd would leave them larger.
    """

    vocab: int
    k: int
    exact: int
    powers: tuple[float, ...]

    def _terms(self) -> Tensor:
        """(k - exact, terms) in fp64."""
        rank = torch.arange(self.k - self.exact, dtype=torch.float64)
        return torch.stack([rank**power for power in self.powers], 1)

    @torch.no_grad()
    def encode(
        self, logits: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int
    ) -> pa.StructArray:
        steps = mask.sum(1).numpy()
        solve = torch.linalg.pinv(self._terms())
        parts = []
        for _, z in chunks(logits, mask, self.vocab):
            top = z.log_softmax(1).topk(self.k, dim=1)
            curve = (top.values[:, self.exact :].double() @ solve.T).float()
            exact = top.values[:, : self.exact].bfloat16().view(torch.int16)
            parts.append((top.indices.numpy().astype("<u2"), exact.numpy(), curve.numpy()))
        arrays = [np.concatenate(p) for p in zip(*parts, strict=True)]
        sizes = (2 * self.k, 2 * self.exact, 4 * len(self.powers))
        streams = [
            ByteStream(a.reshape(-1).view(np.uint8), steps * n)
            for a, n in zip(arrays, sizes, strict=True)
        ]
        return layout.struct(dict(zip(("ids", "exact", "curve"), streams, strict=True)))

    def pack(self, column: pa.StructArray, steps: NDArray[Any]) -> tuple[pa.StructArray, Layout]:
        return column, "plain"

    def decode(
        self,
        column: EncodedColumn,
        steps: NDArray[Any],
        temperature: float = 1.0,
        laid_out: Layout = "plain",
    ) -> SparseTargets:
        data = {k: s.data for k, s in layout.streams_of(column, ["ids", "exact", "curve"]).items()}
        exact = (
            torch.from_numpy(data["exact"].view("<i2").copy())
            .view(torch.bfloat16)
            .view(-1, self.exact)
            .float()
        )
        curve = torch.from_numpy(data["curve"].view("<f4").copy()).view(-1, len(self.powers))
        log_p = torch.cat([exact, (curve.double() @ self._terms().T).float()], 1)
        ids = torch.from_numpy(data["ids"].view("<u2").astype(np.int64))
        start = torch.arange(len(log_p) + 1) * self.k
        return SparseTargets(ids, start, log_p.softmax(1).reshape(-1), self.vocab)


def recommended(vocab: int) -> DistillKit:
    """DistillKit's recommended setting."""
    return DistillKit(vocab, k=128, exact=16, powers=(0, 1, 2, 3, 4, 0.5))


def budget(vocab: int) -> DistillKit:
    """DistillKit's setting for those who are short of storage."""
    return DistillKit(vocab, k=50, exact=1, powers=(0, 1, 0.5))
