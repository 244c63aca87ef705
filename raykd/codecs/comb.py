"""The comb: N evenly spaced points, one random offset, on the teacher's cumulative distribution.

Each class gets a count of floor or ceil of N r_i, r the distribution drawn from, so the counts sum to N and count / N
is an unbiased r: the forward KL's gradient from the stored weights is that of all classes in expectation. This is
systematic sampling in the place of the independent draws of Anshumann et al. 2025 (arXiv 2503.16870): same bytes, a
smaller error. The vocabulary is never sorted.

One temperature: r = softmax(z / T), weight = count / N, no value is needed. A grid of temperatures: r is the mean of
softmax(z / T) over the grid, log p of each drawn class at T = 1 and the log-sum-exp of log p / T are stored, and

    weight_T = count / N * p_T / r,    log p_T = log p / T - lse_T,    at most count / N * (number of grid values)

is unbiased for each T of the grid (importance sampling; never renormalised, which would be biased). Outside the grid
r may miss what p_T needs: refused. Log-probs are rounded to 8 bits at random, so that rounding is no bias either
(what its curvature leaves is below 0.1 % of a weight). Other divergences are not linear in p: they are not served.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raykd.codecs import draws, layout
from raykd.codecs.grid import chunks, index_of, lse_bound, lse_bytes, tempered
from raykd.codecs.layout import Column, Layout, Stream
from raykd.errors import StoreError
from raykd.targets import SparseTargets

LOWEST = -1e4  # a class of smaller log p is never drawn at any sensible temperature
BLOCK = 32  # classes that are added up before the search
ENTROPY_STEP = 0.25  # nats, rounded at random: far below the noise of the draws


@dataclass(frozen=True)
class Comb:
    """Settings of one column: `points` draws a step, for the temperatures of `grid`, over `vocab` real classes.

    `entropy`: one byte a step makes the loss's value a KL instead of a cross-entropy; gradients need none. A grid
    of several temperatures has what it takes anyway.
    """

    vocab: int
    grid: tuple[float, ...] = (1.0,)
    points: int = 50
    entropy: bool = True
    name: ClassVar[str] = "comb"
    serves: ClassVar[frozenset[str]] = frozenset({"forward"})

    def __post_init__(self) -> None:
        assert 1 <= self.points <= 255
        assert min(self.grid, default=0) > 0

    @property
    def streams(self) -> list[str]:
        return ["ids", "counts", *(["log_p", "scale", "lse"] if len(self.grid) > 1 else ["entropy"] * self.entropy)]

    @torch.no_grad()
    def encode(self, logits: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int) -> pa.StructArray:
        """(B,) struct, ids in the plain layout: valid steps of `logits` (B, T, C), columns beyond `vocab` left out.

        Draws are keyed by (key, row id, number of the valid step), so neither batches nor padding change a byte.
        """
        steps = mask.sum(1).cpu().numpy()
        row = np.repeat(np.arange(len(steps)), steps)
        word = draws.words(key, row_id[row], layout.ragged(np.zeros_like(steps), steps))
        room = torch.empty(0, device=logits.device)  # one for all chunks: fresh pages cost as much as the softmax
        parts = [self._draw(z, word[at], room) for at, z in chunks(logits, mask, self.vocab)]
        found, ids, count, log_p, fixed = (np.concatenate(p) for p in zip(*parts, strict=True))
        entries, start = layout.sums(found, steps), np.concatenate([[0], np.cumsum(found)])
        streams = {"ids": layout.put_ids(ids, start, entries, self.vocab, "plain"), "counts": Stream(count, entries)}
        if len(self.grid) > 1:
            u = draws.uniform(draws.mix(np.repeat(word, found), ids))
            low, code = _quantise(log_p, entries, u)
            streams |= {"log_p": Stream(code, entries), "scale": Stream(low.view(np.uint8), 4 * (entries > 0))}
            streams["lse"] = Stream(fixed.reshape(-1), steps * 2 * sum(t != 1 for t in self.grid))
        elif self.entropy:
            streams["entropy"] = Stream(fixed.reshape(-1), steps)
        return layout.struct(streams)

    def _draw(self, z: Tensor, word: NDArray[np.uint64], room: Tensor) -> tuple[NDArray[Any], ...]:
        """Of z (c, V): entries per place (c,), then per entry ids, counts, log p at T = 1; the fixed bytes (c, F)."""
        first, *others = self.grid
        if others:
            log_p = z.log_softmax(1)
            r, lse = tempered(log_p, self.grid)
        else:
            log_p = r = torch.softmax(z if first == 1 else z / first, 1, out=room.resize_(z.shape))
            lse = None
        u = torch.from_numpy(draws.uniform(word)).to(z.device)[:, None]
        teeth = torch.arange(self.points, device=z.device, dtype=torch.float64)
        ids = _find(r, (teeth + u) / self.points)
        picked = log_p.gather(1, ids)
        if lse is None:
            again = draws.uniform(draws.mix(word, np.full(len(word), self.vocab, np.int64)))
            entropy = -picked.double().clamp(min=1e-38).log().mean(1).cpu().numpy()
            fixed = np.floor(entropy / ENTROPY_STEP + again).clip(0, 255).astype(np.uint8)[:, None]
        else:
            fixed = lse_bytes(lse, self.grid, self.vocab)
        drawn, values = ids.cpu().numpy(), picked.cpu().numpy()
        new = np.ones_like(drawn, bool)
        new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        start = np.flatnonzero(new)
        count = np.diff(start, append=drawn.size).astype(np.uint8)
        return new.sum(1), drawn.reshape(-1)[start], count, values.reshape(-1)[start], fixed

    def pack(self, column: pa.StructArray, steps: NDArray[Any]) -> tuple[pa.StructArray, Layout]:
        """A whole shard's column in its smallest layout, and that layout's name, which `decode` must be told."""
        streams = layout.streams_of(column, self.streams)
        entries, start, _ = self._places(streams, steps)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, "plain")
        return layout.smallest(column, ids, start, entries, self.vocab)

    def unpack(self, column: pa.StructArray, steps: NDArray[Any], laid_out: Layout) -> pa.StructArray:
        """The inverse of `pack`: the column in the plain layout. StoreError for damaged bytes."""
        streams = layout.streams_of(column, self.streams)
        entries, start, _ = self._places(streams, steps)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, laid_out)
        return layout.struct(streams | {"ids": layout.put_ids(ids, start, entries, self.vocab, "plain")})

    def decode(
        self, column: Column, steps: NDArray[Any], temperature: float = 1.0, laid_out: Layout = "plain"
    ) -> SparseTargets:
        """The targets of all rows' steps in turn, at a temperature of the grid. StoreError for damaged bytes."""
        at = index_of(temperature, self.grid)
        streams = layout.streams_of(column, self.streams)
        entries, start, counts = self._places(streams, steps)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, laid_out)
        weight, entropy = counts.astype(np.float32) / np.float32(self.points), None
        if len(self.grid) > 1:
            weight, entropy = self._weigh(weight, streams, start, entries, at)
        elif self.entropy:
            entropy = torch.from_numpy(streams["entropy"].data.astype(np.float32) * np.float32(ENTROPY_STEP))
        return SparseTargets(
            torch.from_numpy(ids), torch.from_numpy(start), torch.from_numpy(weight), self.vocab, entropy
        )

    def _places(self, streams: dict[str, Stream], steps: NDArray[Any]) -> tuple[Any, Any, NDArray[np.uint8]]:
        """Entries of each row (R,), start (P + 1,) and counts (M,), every stream's size checked against them.

        A place ends where the counts pass a multiple of `points`.
        """
        steps = steps.astype(np.int64)
        counts, entries = streams["counts"]
        if len(entries) != len(steps) or (entries < steps).any() or (entries > self.points * steps).any():
            raise StoreError(
                f"a comb of {self.points} points has 1 to {self.points} entries a step: the column is damaged"
            )
        scale, each = 4 * (entries > 0), 2 * sum(t != 1 for t in self.grid)
        sizes = {"ids": entries * layout.id_bytes(self.vocab), "log_p": entries, "scale": scale}
        sizes |= {"lse": each * steps, "entropy": steps}
        layout.check_sizes(streams, {name: sizes[name] for name in self.streams if name != "counts"})
        end = np.cumsum(counts, dtype=np.int64)
        start = np.concatenate([[0], np.flatnonzero(end % self.points == 0) + 1])
        if (counts == 0).any() or not np.array_equal(layout.sums(counts, entries), self.points * steps):
            raise StoreError(f"a comb's counts do not sum to {self.points} a step: the column is damaged")
        if len(start) != steps.sum() + 1:
            raise StoreError(f"a comb's counts do not stop at {self.points} in each step: the column is damaged")
        return entries, start, counts

    def _weigh(
        self, share: NDArray[np.float32], streams: dict[str, Stream], start: Any, entries: Any, at: int
    ) -> tuple[NDArray[np.float32], Tensor]:
        """Weights (M,) and entropy (P,) at the grid's temperature number `at`, from shares count / N (M,)."""
        low = streams["scale"].data.view("<f4")
        if not ((low > LOWEST) & (low < 0)).all():
            raise StoreError(f"a comb's scale of log-probs is not within {LOWEST:g} and 0: the column is damaged")
        log_p = streams["log_p"].data * np.repeat(low / np.float32(255), entries[entries > 0])
        codes, places = (
            streams["lse"].data.view("<u2").reshape(len(start) - 1, sum(t != 1 for t in self.grid)),
            np.diff(start),
        )
        each, column = [], 0
        for t in self.grid:
            lse: Any = 0.0
            if t != 1:
                bound = np.float32(math.copysign(lse_bound(t, self.vocab), t - 1) / 65535)
                lse, column = np.repeat(codes[:, column] * bound, places), column + 1
            each.append(log_p / np.float32(t) - lse)
        ratio = np.zeros_like(share)  # r / p_T; beyond exp(80) a weight is 0 whatever it is
        for other in each:
            ratio += np.exp(np.minimum(other - each[at], np.float32(80))) / np.float32(len(each))
        weight = share / ratio
        own = np.bincount(np.repeat(np.arange(len(places)), places), weight * each[at], len(places))
        return weight.astype(np.float32), torch.from_numpy(-own.astype(np.float32))


def _find(r: Tensor, share: Tensor) -> Tensor:
    """(c, N) int64: the class of r (c, V) whose part of the cumulative distribution holds each `share` (c, N) of it.

    Sums over blocks are searched first, then only the blocks found are added up: a third of the cost of all V.
    """
    short = -r.shape[1] % BLOCK
    blocks = (F.pad(r, (0, short)) if short else r).unflatten(1, (-1, BLOCK))
    mass = blocks.sum(2)
    total = mass.cumsum(1)
    block = torch.searchsorted(total, _below(share * total[:, -1:], total), right=True)
    rest = share * total[:, -1:] - (total - mass).gather(1, block)
    row = torch.arange(len(r), device=r.device)[:, None] * mass.shape[1]
    inner = blocks.flatten(0, 1).index_select(0, (row + block).flatten()).cumsum(1)
    at = _below(rest.view(-1, 1), inner).clamp(min=0)
    return block * BLOCK + torch.searchsorted(inner, at, right=True).view_as(block)


def _below(value: Tensor, total: Tensor) -> Tensor:
    """`value` in the type of running sums `total` (.., n), below the last of them: rounding may have lifted it."""
    end = total[..., -1:]
    return torch.minimum(value.to(total.dtype), torch.nextafter(end, torch.zeros_like(end)))


def _quantise(
    log_p: NDArray[np.float32], entries: NDArray[np.int64], u: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Each filled row's lowest log-prob, and codes c (M,) such that low c / 255 is log p in expectation over u."""
    filled = entries[entries > 0]
    if not len(filled):
        return np.zeros(0, "<f4"), np.zeros(0, np.uint8)
    low = np.minimum.reduceat(log_p, np.cumsum(filled) - filled).clip(max=-1e-6).astype("<f4")
    x = log_p.astype(np.float64) / np.repeat(low.astype(np.float64), filled) * 255
    return low, np.clip(np.floor(x + u), 0, 255).astype(np.uint8)
