"""How well the teacher foresees what people felt: r of its value head with the realised future valence.

python -m examples.valence.future
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raykd import checks, data, models
from raykd.valence import future_valence

RECIPE = Path(__file__).parent / "recipe.toml"
RESAMPLES = 2000


def main() -> None:
    """Print r on reviews that the teacher never saw, with its 95 % interval over reviews."""
    torch.set_num_threads(1)
    recipe = checks.load(RECIPE)
    dataset = data.load(recipe.data)
    assert recipe.teacher is not None
    teacher = models.build(recipe.teacher, **dataset.shape, key="teacher").eval()
    for split in ("val", "test"):
        rows = dataset.splits[split]
        assert rows.valence is not None
        human = torch.from_numpy(rows.valence)
        realised, known = future_valence(human, torch.from_numpy(rows.mask), recipe.valence.discount)
        with torch.inference_mode():
            foreseen = teacher(torch.from_numpy(rows.inputs))["valence"]
        group = np.broadcast_to(rows.group[:, None], known.shape)[known.numpy()]
        r, lo, hi = correlation(foreseen[known].numpy(), realised[known].numpy(), group)
        print(f"{split:<5} r {r:.2f} ({lo:.2f} to {hi:.2f}), {len(group)} steps of {len(np.unique(group))} reviews")


def correlation(x: NDArray, y: NDArray, group: NDArray) -> tuple[float, float, float]:
    """Pearson's r and its 95 % interval by drawing groups with replacement."""
    moments = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y]).astype(np.float64)
    own = np.stack([moments[:, group == g].sum(1) for g in np.unique(group)])  # (groups, 6)
    drawn = np.random.default_rng(0).multinomial(len(own), np.full(len(own), 1 / len(own)), RESAMPLES)
    n, sx, sy, sxx, syy, sxy = (np.vstack([np.ones(len(own)), drawn]) @ own).T
    r = (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))
    lo, hi = np.quantile(r[1:], [0.025, 0.975])
    return float(r[0]), float(lo), float(hi)


if __name__ == "__main__":
    main()
