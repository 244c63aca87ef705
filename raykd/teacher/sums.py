"""What one shard adds to a store's statistics: sums that come to those of all shards.

Written by whoever scores the shard, who has its rows at hand. Nothing but these few kilobytes a
shard is read for the statistics of a store whose rows are read in parts.

Saliency is counted in bins of BITS bits of mantissa: the value at the middle of a bin is off by
at most 1 / 2 ** (BITS + 1) of its size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raykd.data import Rows
from raykd.losses import valence
from raykd.signals import documents_of
from raykd.store.stored_rows import column_of, stored_steps

BITS = 8  # of a float32's 23 bits of mantissa that tell bins apart
SHIFT = 23 - BITS
SIGN = 1 << 31
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Moments:
    """The number, means and centred sums of squares and products of pairs of values."""

    count: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, x: Floats, y: Floats) -> "Moments":
        """Those of these pairs."""
        if not len(x):
            return cls()
        x = x.astype(np.float64)
        y = y.astype(np.float64)
        far_x = x - x.mean()
        far_y = y - y.mean()
        sums = (far_x @ far_x, far_y @ far_y, far_x @ far_y)
        return cls(len(x), float(x.mean()), float(y.mean()), *map(float, sums))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        weight = self.count * share
        far_x = other.x - self.x
        far_y = other.y - self.y
        return Moments(
            count,
            self.x + share * far_x,
            self.y + share * far_y,
            self.xx + other.xx + weight * far_x * far_x,
            self.yy + other.yy + weight * far_y * far_y,
            self.xy + other.xy + weight * far_x * far_y,
        )

    @property
    def std(self) -> float | None:
        """The standard deviation of x, with one degree of freedom less; None of fewer than two."""
        return (self.xx / (self.count - 1)) ** 0.5 if self.count > 1 else None

    @property
    def correlation(self) -> float | None:
        """None where either is constant, or nothing is known."""
        if self.xx <= 0 or self.yy <= 0:
            return None
        return self.xy / (self.xx * self.yy) ** 0.5


@dataclass(frozen=True)
class Sums:
    """What a shard adds: the saliency of its rows, and how the value head follows the future."""

    missing: int = 0  # rows of unknown saliency
    least: float | None = None
    most: float | None = None
    saliency: Moments = field(default_factory=Moments)
    bins: Mapping[int, int] = field(default_factory=dict)  # of saliency: rows by number of the bin
    future: Moments = field(default_factory=Moments)  # of validation rows: said, and realised

    def __add__(self, other: "Sums") -> "Sums":
        bins = dict(self.bins)
        for number, rows in other.bins.items():
            bins[number] = bins.get(number, 0) + rows
        told = [s for s in (self, other) if s.least is not None and s.most is not None]
        return Sums(
            self.missing + other.missing,
            min((s.least for s in told if s.least is not None), default=None),
            max((s.most for s in told if s.most is not None), default=None),
            self.saliency + other.saliency,
            bins,
            self.future + other.future,
        )

    def told(self) -> dict[str, Any]:
        """The sums as JSON."""
        return asdict(self) | {"bins": [[number, rows] for number, rows in self.bins.items()]}

    @classmethod
    def read(cls, told: Any) -> "Sums | None":
        """The sums that JSON tells; None if it is something else."""
        try:
            moments = {name: Moments(**told[name]) for name in ("saliency", "future")}
            bins = {int(number): int(rows) for number, rows in told["bins"]}
            least, most = (
                None if told[name] is None else float(told[name]) for name in ("least", "most")
            )
            found = cls(int(told["missing"]), least, most, **moments, bins=bins)
            is_sound = found.saliency.count == sum(bins.values())
        except (KeyError, TypeError, ValueError):
            return None
        return found if is_sound else None

    def quantile(self, share: float) -> float:
        """The value below which this share of the known rows lies: the least, the most, or the
        middle of its bin.
        """
        assert self.least is not None
        assert self.most is not None
        if share in (0, 1):
            return self.most if share else self.least
        numbers, counts = self._sorted()
        place = share * (counts.sum() - 1)
        number = numbers[np.searchsorted(np.cumsum(counts), place, side="right")]
        return float(np.clip(_middle(number), self.least, self.most))

    def histogram(self, bins: int) -> dict[str, Any]:
        """So many counts between the least and the most value, and the edges."""
        numbers, counts = self._sorted()
        assert self.least is not None
        assert self.most is not None
        middle = np.clip(_middle(numbers), self.least, self.most)
        rows, edges = np.histogram(middle, bins, (self.least, self.most), weights=counts)
        return {"counts": rows.astype(int).tolist(), "edges": edges.tolist()}

    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(numbers, rows) of the bins, in the order of their values."""
        numbers = np.array(sorted(self.bins), np.int64)
        return numbers, np.array([self.bins[number] for number in numbers.tolist()], np.int64)


def sums_of(table: pa.Table, rows: Rows, split: str, discount: float) -> Sums:
    """What a shard adds; `table` is as it is stored, and `rows` are its own."""
    saliency = column_of(table, "saliency").values.astype(np.float32)
    known = saliency[np.isfinite(saliency)]
    numbers, counts = np.unique(_number(known), return_counts=True)
    return Sums(
        missing=len(saliency) - len(known),
        least=float(known.min()) if len(known) else None,
        most=float(known.max()) if len(known) else None,
        saliency=Moments.of(known, known),
        bins=dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        future=Moments.of(*futures(table, rows, discount)) if split == "val" else Moments(),
    )


def total(sums: Iterable[Sums]) -> Sums:
    """The sums of all shards, added in this order."""
    return reduce(Sums.__add__, sums, Sums())


def futures(table: pa.Table, rows: Rows, discount: float) -> tuple[Floats, Floats]:
    """What the value head said of the future at each known step of stored rows, and what came."""
    stored_ids = table.column("row_id").to_numpy()
    rows = rows.take(np.isin(rows.row_id, stored_ids))
    stored = column_of(table, "valence")
    mask = stored_steps(stored.steps, rows.mask)
    signal = torch.from_numpy(stored.padded(mask).astype(np.float32))
    document = documents_of(torch.from_numpy(np.array(rows.inputs)))
    realised, known = valence.realised_future(signal, torch.from_numpy(mask), discount, document)
    at = known.numpy()
    said = column_of(table, "trajectory").padded(mask)[at]
    return said.astype(np.float64), realised.numpy()[at].astype(np.float64)


def _number(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """The number of each value's bin; numbers ascend as values do."""
    bits = (values + np.float32(0)).view(np.uint32).astype(np.int64)  # + 0 has no negative zero
    return np.where(bits >= SIGN, SIGN - 1 - (bits - SIGN), SIGN + bits) >> SHIFT


def _middle(number: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value in the middle of each bin."""
    low = np.asarray(number, np.int64) << SHIFT
    both = [low, low + (1 << SHIFT) - 1]
    edges = [np.where(b >= SIGN, b - SIGN, (SIGN - 1 - b) + SIGN) for b in both]
    return np.mean([e.astype(np.uint32).view(np.float32).astype(np.float64) for e in edges], 0)
