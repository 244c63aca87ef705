"""How much each row counts, by its saliency, without a few rows counting for all.

With z the standardised saliency of n rows, weights are one of

    raw       w = exp(boost z), the formula itself
    snippet   w = mean over the batch of exp(boost z), one number for all its rows
    capped    w = min(exp(boost z), cap) (Peng et al. 2019, arXiv 1910.00177)
    selfnorm  w = n softmax(boost z), whose mean is 1
    ess       selfnorm with the largest boost' <= boost whose effective sample size is at least
              `fraction` of n
    uniform   w = 1

The effective sample size of weights is (sum w)^2 / sum w^2 (Kish 1965; Elvira et al. 2018, arXiv
1809.04129). With Gaussian saliency it falls as n exp(-boost^2): at boost 6 a batch of 64 trains on
1.7 rows. It can only fall as boost rises, so bisection finds boost'. A row of unknown saliency
counts as an average one. Everything is float64.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raykd.errors import StoreError
from raykd.recipe.tables import Weighting

Floats = NDArray[np.float64]
HALVINGS = 40
LARGEST = 80.0  # of a log weight: exp(80) and a thousand times it are float32 numbers


@dataclass(frozen=True)
class Spread:
    """How uneven a batch's weights are."""

    ess: float  # the effective sample size over the number of rows
    largest_share: float  # the largest row's share of all weight
    boost: float  # as it was used


@dataclass(frozen=True)
class RowWeights:
    """Every training row's weight in any global batch.

    With dataset statistics a row's weight is the same in all batches.
    """

    saliency: Floats  # (N,)
    settings: Weighting
    fixed: tuple[Floats, float] | None  # weights of all rows and their boost

    @classmethod
    def of(cls, saliency: Tensor | None, settings: Weighting | None) -> "RowWeights | None":
        """The weights of the rows with this saliency; None where rows are not weighted.

        StoreError without a saliency, but where all weights are 1.
        """
        if settings is None:
            return None
        if settings.mode == "uniform":
            return cls(np.zeros(0), settings, None)
        if saliency is None:
            raise StoreError(
                "weighting: the teacher's store holds no saliency; delete it, then type: raykd "
                "score RECIPE"
            )
        s = saliency.cpu().numpy().astype(np.float64)
        fixed = None
        if settings.statistics == "dataset":
            fixed = weights(standardised(s, settings), settings)
        return cls(s, settings, fixed)

    def __call__(self, rows: NDArray[np.int64], share: slice) -> tuple[NDArray[np.float32], Spread]:
        """Weights (share,) of one rank's part of a global batch, and their spread over the batch.

        `rows` are the places of the global batch's rows, and `share` is this rank's part of them.
        With local_batch statistics a rank sees its part alone, so the number of workers changes the
        weights.
        """
        if self.settings.statistics == "local_batch":
            rows = rows[share]
            share = slice(None)
        if self.settings.mode == "uniform":
            w, boost = weights(np.zeros(len(rows)), self.settings)
        elif self.fixed and self.settings.mode != "snippet":
            all_weights, boost = self.fixed
            w = all_weights[rows]
        else:
            every = self.saliency if self.fixed else self.saliency[rows]
            z = standardised(self.saliency[rows], self.settings, every)
            w, boost = weights(z, self.settings)
        spread = Spread(ess(w), largest_share=float(w.max() / w.sum()), boost=boost)
        return w[share].astype(np.float32), spread


def standardised(s: Floats, settings: Weighting, every: Floats | None = None) -> Floats:
    """(s - mean) / std, as (n,), with the mean and the unbiased std of the known ones of `every`.

    `every` is s unless given. The std is at least `least_std`, and an unknown s gives 0.
    """
    every = s if every is None else every
    known = every[np.isfinite(every)]
    mean = known.mean() if len(known) else 0.0
    std = known.std(ddof=1) if len(known) > 1 else 0.0
    z = np.where(np.isfinite(s), (s - mean) / max(std, settings.least_std), 0.0)
    return z if settings.clip is None else z.clip(-settings.clip, settings.clip)


def weights(z: Floats, settings: Weighting) -> tuple[Floats, float]:
    """The weights (n,) of standardised saliency z (n,), and the boost that made them."""
    boost = settings.boost
    match settings.mode:
        case "uniform":
            return np.ones_like(z), 0.0
        case "selfnorm":
            return _mean_one(boost * z), boost
        case "ess":
            boost = boost_of(z, boost, settings.fraction)
            return _mean_one(boost * z), boost
        case "raw":
            return _exp(boost * z), boost
        case "capped":
            return np.minimum(_exp(boost * z), settings.cap), boost
        case "snippet":
            return np.full_like(z, _exp(boost * z).mean()), boost


def boost_of(z: Floats, most: float, fraction: float) -> float:
    """The largest boost up to `most` whose effective sample size is at least `fraction` of n."""
    if ess(_mean_one(most * z)) >= fraction:
        return most
    low = 0.0
    high = most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if ess(_mean_one(middle * z)) >= fraction:
            low = middle
        else:
            high = middle
    return low


def ess(w: Floats) -> float:
    """The effective sample size over the number of rows, (sum w)^2 / (n sum w^2), in (0, 1]."""
    w = w / w.max()
    return float(w.sum() ** 2 / (len(w) * np.square(w).sum()))


def mean_spread(spreads: list[Spread]) -> dict[str, float]:
    """Means over batches, and the least effective sample size among them."""
    tables = [asdict(spread) for spread in spreads]
    means = {key: float(np.mean([table[key] for table in tables])) for key in tables[0]}
    return means | {"least_ess": min(spread.ess for spread in spreads)}


def _mean_one(g: Floats) -> Floats:
    """n softmax(g)."""
    w = np.exp(g - g.max())
    return w * (len(w) / w.sum())


def _exp(g: Floats) -> Floats:
    """exp(g), of at most LARGEST."""
    return np.exp(g.clip(max=LARGEST))
