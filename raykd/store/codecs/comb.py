"""The comb: N evenly spaced points, one random offset, on the teacher's cumulative distribution.

Each class has a count of floor or ceil of N r_i, where r is the distribution that is drawn from. So
the counts sum to N, and count / N is an unbiased r: in expectation the forward KL's gradient from
the stored weights is that of all classes. This is systematic sampling instead of the independent
draws of Anshumann et al. 2025 (arXiv 2503.16870): the same bytes, a smaller error. The vocabulary
is never sorted.

For one temperature, r = softmax(z / T) and weight = count / N; no value is stored. For a grid of
temperatures, r is the mean of softmax(z / T) over the grid; log p of each drawn class at T = 1 and
the log-sum-exp of log p / T are stored, and

    weight_T = count / N * p_T / r,    log p_T = log p / T - lse_T

is unbiased for each T of the grid and at most count / N * (number of temperatures). This is
importance sampling; it is never renormalised, which would be biased. Outside the grid r may miss
what p_T needs, so other temperatures are refused. Log-probs are rounded to 8 bits at random, so
that rounding is no bias (what its curvature leaves is below 0.1 % of a weight). Other divergences
are not linear in p and are not served.
"""

import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import StoreError
from raykd.store.codecs import draws, layout, ranked
from raykd.store.codecs.layout import ByteStream, EncodedColumn, Layout
from raykd.store.codecs.teeth import find_classes
from raykd.store.codecs.temperatures import chunks, index_of, lse_bound, lse_bytes, tempered
from raykd.targets import SparseTargets

LOWEST = -1e4  # a class of smaller log p is never drawn at any sensible temperature
ENTROPY_STEP = 0.25  # nats, rounded at random: far below the noise of the draws
MOST_NATS = 88  # -log of the smallest probability that is drawn


@dataclass(frozen=True)
class Comb:
    """Settings of one column: `points` draws a step over `vocab` classes, for a `grid` of T.

    `entropy` makes the loss's value a KL instead of a cross-entropy; gradients need none. With
    "row", each row's mean is stored in 4 bytes; with True, as in older stores, one byte a step. A
    grid of several temperatures stores enough for the KL anyway.
    """

    vocab: int
    grid: tuple[float, ...] = (1.0,)
    points: int = 50
    entropy: bool | Literal["row"] = "row"
    name: ClassVar[str] = "comb"
    serves: ClassVar[frozenset[str]] = frozenset({"forward"})

    def __post_init__(self) -> None:
        assert 1 <= self.points <= 255
        assert min(self.grid, default=0) > 0

    @property
    def streams(self) -> list[str]:
        rest = ["log_p", "scale", "lse"] if len(self.grid) > 1 else ["entropy"] * bool(self.entropy)
        return ["ids", "counts", *rest]

    @property
    def _lse_bytes(self) -> int:
        """Bytes of a step in the stream "lse": two for each temperature but 1."""
        return 2 * sum(t != 1 for t in self.grid)

    @torch.no_grad()
    def encode(
        self, logits: Tensor, mask: Tensor, row_id: NDArray[np.int64], key: int
    ) -> pa.StructArray:
        """(B,) struct: the valid steps of `logits` (B, T, C), without columns beyond `vocab`.

        Ids are in the plain layout. Draws are keyed by (key, row id, number of the valid step), so
        neither batches nor padding change a byte.
        """
        steps = mask.sum(1).cpu().numpy()
        row = np.repeat(np.arange(len(steps)), steps)
        word = draws.words(key, row_id[row], layout.ragged(np.zeros_like(steps), steps))
        room = _room(logits.device, threading.get_ident())
        drawn = [self._draw(z, word[at], room) for at, z in chunks(logits, mask, self.vocab)]
        columns = [np.concatenate(arrays) for arrays in zip(*drawn, strict=True)]
        size, ids, count = columns[:3]
        log_p, fixed = columns[3:]
        entries = layout.sums(size, steps)
        start = np.concatenate([[0], np.cumsum(size)])
        streams = {
            "ids": layout.put_ids(ids, start, entries, self.vocab, "plain"),
            "counts": ByteStream(count, entries),
        }
        if len(self.grid) > 1:
            u = draws.uniform(draws.mix(np.repeat(word, size), ids))
            low, code = _quantise(log_p, entries, u)
            streams["log_p"] = ByteStream(code, entries)
            streams["scale"] = ByteStream(low.view(np.uint8), 4 * (entries > 0))
            streams["lse"] = ByteStream(fixed.reshape(-1), steps * self._lse_bytes)
        elif self.entropy:
            streams["entropy"] = self._entropies(fixed.reshape(-1), row, steps, word)
        return layout.struct(streams)

    def _entropies(
        self, entropy: NDArray[Any], row: Any, steps: NDArray[Any], word: NDArray[np.uint64]
    ) -> ByteStream:
        """The stream of the places' entropies (P,)."""
        if self.entropy == "row":
            mean = np.bincount(row, entropy, len(steps)) / np.maximum(steps, 1)
            return ByteStream(mean[steps > 0].astype("<f4").view(np.uint8), 4 * (steps > 0))
        u = draws.uniform(draws.mix(word, np.full(len(word), self.vocab, np.int64)))
        codes = np.floor(entropy / ENTROPY_STEP + u).clip(0, 255)
        return ByteStream(codes.astype(np.uint8), steps)

    def _draw(self, z: Tensor, word: NDArray[np.uint64], room: Tensor) -> tuple[NDArray[Any], ...]:
        """The draws at places with logits z (c, V).

        Entries of each place (c,); ids, counts and log p at T = 1 of each entry; what each place
        has besides, (c, F): its entropy or the bytes of its lse.
        """
        first, *others = self.grid
        if others:
            log_p = z.log_softmax(1)
            r, lse = tempered(log_p, self.grid)
        else:
            r = torch.softmax(z if first == 1 else z / first, 1, out=room.resize_(z.shape))
            log_p = r
            lse = None
        u = torch.from_numpy(draws.uniform(word)).to(z.device)[:, None]
        teeth = torch.arange(self.points, device=z.device, dtype=torch.float64)
        ids = find_classes(r, (teeth + u) / self.points)
        picked = log_p.gather(1, ids)
        if lse is None:
            fixed = -picked.double().clamp(min=1e-38).log().mean(1, keepdim=True).cpu().numpy()
        else:
            fixed = lse_bytes(lse, self.grid, self.vocab)
        drawn = ids.cpu().numpy()
        values = picked.cpu().numpy()
        new = np.ones_like(drawn, bool)
        new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        start = np.flatnonzero(new)
        count = np.diff(start, append=drawn.size).astype(np.uint8)
        return new.sum(1), drawn.reshape(-1)[start], count, values.reshape(-1)[start], fixed

    def pack(self, column: pa.StructArray, steps: NDArray[Any]) -> tuple[pa.StructArray, Layout]:
        """(a whole shard's column in its smallest layout, the name of that layout)."""
        streams, entries = self._read(column, steps, "plain")
        if len(self.grid) == 1 and self.vocab <= ranked.LARGEST:
            smaller, name = ranked.put(entries, steps.astype(np.int64), self.vocab)
            if "entropy" in streams:
                smaller["entropy"] = streams["entropy"]
            packed = layout.struct(smaller)
            named = len(name) * 4 // 3  # a file's metadata is base64
            # a small shard may have fewer bytes in another layout
            if layout.compressed(packed) + named < 0.9 * layout.compressed(column):
                return packed, name
        return layout.smallest(column, entries.ids, entries.start, entries.entries, self.vocab)

    def unpack(
        self, column: pa.StructArray, steps: NDArray[Any], laid_out: Layout
    ) -> pa.StructArray:
        """The inverse of `pack`: the column in the plain layout. StoreError for damaged bytes."""
        streams, (ids, counts, start, entries) = self._read(column, steps, laid_out)
        streams["ids"] = layout.put_ids(ids, start, entries, self.vocab, "plain")
        streams["counts"] = ByteStream(counts, entries)
        return layout.struct({name: streams[name] for name in self.streams})

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
        at = index_of(temperature, self.grid)
        streams, (ids, counts, start, entries) = self._read(column, steps, laid_out)
        weight = counts.astype(np.float32) / np.float32(self.points)
        entropy = None
        if len(self.grid) > 1:
            weight, entropy = self._weigh(weight, streams, start, entries, at)
        elif self.entropy:
            entropy = torch.from_numpy(self._entropy(streams["entropy"].data, steps))
        return SparseTargets(
            ids=torch.from_numpy(ids),
            start=torch.from_numpy(start),
            weight=torch.from_numpy(weight),
            vocab=self.vocab,
            entropy=entropy,
        )

    def _read(
        self, column: EncodedColumn, steps: NDArray[Any], laid_out: Layout
    ) -> tuple[dict[str, ByteStream], ranked.Entries]:
        """(streams, entries) of a column in any layout, the size of every stream checked."""
        steps = steps.astype(np.int64)
        rest = {}
        if "entropy" in self.streams:
            rest["entropy"] = 4 * (steps > 0) if self.entropy == "row" else steps
        if laid_out.startswith(ranked.PREFIX) and len(self.grid) == 1:
            streams = layout.streams_of(column, [*ranked.STREAMS, *rest])
            layout.check_sizes(streams, rest)
            return streams, ranked.take(streams, steps, self.vocab, self.points, laid_out)
        streams = layout.streams_of(column, self.streams)
        counts, entries = streams["counts"]
        if (
            len(entries) != len(steps)
            or (entries < steps).any()
            or (entries > self.points * steps).any()
        ):
            raise StoreError(
                f"a comb of {self.points} points has 1 to {self.points} entries a step: "
                "the column is damaged"
            )
        sizes = rest | {
            "ids": entries * layout.id_bytes(self.vocab),
            "log_p": entries,
            "scale": 4 * (entries > 0),
        }
        sizes["lse"] = self._lse_bytes * steps
        layout.check_sizes(
            streams, {name: sizes[name] for name in self.streams if name != "counts"}
        )
        start = self._starts(counts, steps, entries)
        ids = layout.take_ids(streams["ids"], start, entries, self.vocab, laid_out)
        return streams, ranked.Entries(ids, counts, start, entries)

    def _starts(self, counts: NDArray[np.uint8], steps: Any, entries: Any) -> Any:
        """(P + 1,): the start of each place; the counts of a place sum to `points`."""
        end = np.cumsum(counts, dtype=np.int64)
        wanted = self.points * np.arange(1, int(steps.sum()) + 1)
        start = np.concatenate([[0], np.searchsorted(end, wanted) + 1])
        if (
            (counts == 0).any()
            or (start[-1] != len(counts))
            or not np.array_equal(end[start[1:] - 1], wanted)
        ):
            raise StoreError(
                f"a comb's counts do not sum to {self.points} in each step: the column is damaged"
            )
        if not np.array_equal(start[np.cumsum(steps)], np.cumsum(entries)):
            raise StoreError(
                "a comb's counts are of other steps than its rows have: the column is damaged"
            )
        return start

    def _entropy(self, data: NDArray[np.uint8], steps: NDArray[Any]) -> NDArray[np.float32]:
        """(P,): the entropy of every step, from its stream."""
        if self.entropy != "row":
            return data.astype(np.float32) * np.float32(ENTROPY_STEP)
        mean = data.view("<f4")
        if not ((mean >= 0) & (mean <= MOST_NATS)).all():
            raise StoreError(
                f"a row's entropy is not within 0 and {MOST_NATS}: the column is damaged"
            )
        return np.repeat(mean, steps[steps > 0])

    def _weigh(
        self,
        share: NDArray[np.float32],
        streams: dict[str, ByteStream],
        start: Any,
        entries: Any,
        at: int,
    ) -> tuple[NDArray[np.float32], Tensor]:
        """(weight (M,), entropy (P,)) at the grid's temperature number `at`.

        `share` (M,) are the entries' count / N.
        """
        low = streams["scale"].data.view("<f4")
        if not ((low > LOWEST) & (low < 0)).all():
            raise StoreError(
                f"a comb's scale of log-probs is not within {LOWEST:g} and 0: the column is damaged"
            )
        log_p = streams["log_p"].data * np.repeat(low / np.float32(255), entries[entries > 0])
        codes = streams["lse"].data.view("<u2").reshape(len(start) - 1, self._lse_bytes // 2)
        size = np.diff(start)
        log_p_of = []  # each temperature
        column = 0
        for t in self.grid:
            lse: Any = 0.0
            if t != 1:
                bound = np.float32(math.copysign(lse_bound(t, self.vocab), t - 1) / 65535)
                lse = np.repeat(codes[:, column] * bound, size)
                column += 1
            log_p_of.append(log_p / np.float32(t) - lse)
        wanted = log_p_of[at]
        number = np.float32(len(log_p_of))
        ratio = np.zeros_like(share)  # r / p_T; beyond exp(80) a weight is 0 whatever it is
        for other in log_p_of:
            ratio += np.exp(np.minimum(other - wanted, np.float32(80))) / number
        weight = share / ratio
        place = np.repeat(np.arange(len(size)), size)
        log_sum = np.bincount(place, weight * wanted, len(size))
        return weight.astype(np.float32), torch.from_numpy(-log_sum.astype(np.float32))


@lru_cache(maxsize=4)
def _room(device: torch.device, _thread: int) -> Tensor:
    """One piece of memory for all chunks of a thread.

    Fresh pages cost as much as the softmax, and a fragmented heap more. The tensor is made outside
    inference mode: one made inside could not be written once that mode has ended.
    """
    with torch.inference_mode(mode=False):
        return torch.empty(0, device=device)


def _quantise(
    log_p: NDArray[np.float32], entries: NDArray[np.int64], u: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(low of each row with entries, codes c (M,)): low c / 255 is log p in expectation over u.

    `low` is the row's lowest log-prob.
    """
    filled = entries[entries > 0]
    if not len(filled):
        return np.zeros(0, "<f4"), np.zeros(0, np.uint8)
    low = np.minimum.reduceat(log_p, np.cumsum(filled) - filled).clip(max=-1e-6).astype("<f4")
    x = log_p.astype(np.float64) / np.repeat(low.astype(np.float64), filled) * 255
    return low, np.clip(np.floor(x + u), 0, 255).astype(np.uint8)
