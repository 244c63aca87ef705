"""How much each row counts: exp(boost z) of its standardised saliency z, and what keeps a few rows
from being all.

    raw         w = exp(boost z)                       the formula as it stands snippet     w = mean
    over the batch of exp(boost z), one number for all its rows capped      w = min(exp(boost z),
    cap)             Peng et al. 2019, arXiv 1910.00177 selfnorm    w = n softmax(boost z)
    mean 1 ess         selfnorm with the largest boost' <= boost whose effective sample size is at
    least fraction n uniform     w = 1

The effective sample size of weights is (sum w)^2 / sum w^2 (Kish 1965; Elvira et al. 2018, arXiv
1809.04129). With Gaussian saliency it falls as n exp(-boost^2): at boost 6 a batch of 64 trains on
1.7 rows. It can only fall as boost rises, so bisection finds boost'. A row of unknown saliency
counts as an average one. Everything is float64.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raykd.recipe.recipe import Weighting

Floats = NDArray[np.float64]
HALVINGS = 40
LARGEST = 80.0  # of a log weight: exp(80) and a thousand times it are float32 numbers


@dataclass(frozen=True)
class Spread:
    """How uneven a batch's weights are: effective sample size over rows, the largest row's share,
    the boost used.
    """

    ess: float
    largest_share: float
    boost: float


@dataclass(frozen=True)
class RowWeights:
    """Every training row's weight in any global batch; with dataset statistics it is the same in
    all.
    """

    saliency: Floats  # (N,)
    settings: Weighting
    fixed: tuple[Floats, float] | None  # weights of all rows and their boost

    @classmethod
    def of(cls, saliency: Tensor | None, settings: Weighting | None) -> "RowWeights | None":
        """None where rows are not weighted.

        Without a teacher's saliency all rows are average ones.
        """
        if settings is None or saliency is None:
            return None
        s = saliency.cpu().numpy().astype(np.float64)
        dataset = settings.statistics == "dataset"
        return cls(s, settings, weights(standardised(s, settings), settings) if dataset else None)

    def __call__(self, rows: NDArray[np.int64], share: slice) -> tuple[NDArray[np.float32], Spread]:
        """Weights (share,) of one rank's part of the rows of a global batch, and their spread over
        the batch.

        With local_batch statistics the part is all that there is, so the number of workers changes
        the weights.
        """
        if self.settings.statistics == "local_batch":
            rows, share = rows[share], slice(None)
        if self.fixed and self.settings.mode != "snippet":
            w, boost = self.fixed[0][rows], self.fixed[1]
        else:
            every = self.saliency if self.fixed else self.saliency[rows]
            w, boost = weights(
                standardised(self.saliency[rows], self.settings, every), self.settings
            )
        return w[share].astype(np.float32), Spread(ess(w), float(w.max() / w.sum()), boost)


def standardised(s: Floats, settings: Weighting, every: Floats | None = None) -> Floats:
    """(n,):

    (s - mean) / std of `every` row's known saliency (of s by default), the unbiased std at least
    least_std.
    """
    known = (s if every is None else every)[np.isfinite(s if every is None else every)]
    mean = known.mean() if len(known) else 0.0
    std = known.std(ddof=1) if len(known) > 1 else 0.0
    z = np.where(np.isfinite(s), (s - mean) / max(std, settings.least_std), 0.0)
    return z if settings.clip is None else z.clip(-settings.clip, settings.clip)


def weights(z: Floats, settings: Weighting) -> tuple[Floats, float]:
    """(weights (n,), the boost that made them) of standardised saliency z (n,)."""
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
    """The largest boost up to `most` at which the effective sample size is at least `fraction` of
    the rows.
    """
    if ess(_mean_one(most * z)) >= fraction:
        return most
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if ess(_mean_one(middle * z)) >= fraction else (low, middle)
    return low


def ess(w: Floats) -> float:
    """(sum w)^2 / (n sum w^2): the effective sample size as a share of the rows, in (0, 1]."""
    w = w / w.max()
    return float(w.sum() ** 2 / (len(w) * np.square(w).sum()))


def mean_spread(spreads: list[Spread]) -> dict[str, float]:
    """Means over batches, and the least effective sample size among them."""
    means = {k: float(np.mean([asdict(s)[k] for s in spreads])) for k in asdict(spreads[0])}
    return means | {"least_ess": min(s.ess for s in spreads)}


def _mean_one(g: Floats) -> Floats:
    w = np.exp(g - g.max())
    return w * (len(w) / w.sum())


def _exp(g: Floats) -> Floats:
    return np.exp(g.clip(max=LARGEST))
