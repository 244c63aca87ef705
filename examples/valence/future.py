"""How well the teacher, or the students of a run, foresee what people felt: r with the realised
future valence.

python -m examples.valence.future [RUN]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raykd import data, models
from raykd.losses.valence import realised_future
from raykd.recipe.recipe import Recipe
from raykd.stages.load import load

RECIPE = Path(__file__).parent / "recipe.toml"
RESAMPLES = 2000


def main() -> None:
    """Print r on reviews that no model has seen, with its 95 % interval; of students the mean over
    seeds.
    """
    torch.set_num_threads(1)
    recipe = load(RECIPE)
    dataset = data.load(recipe.data)
    found = readers(recipe, dataset.shape, *map(Path, sys.argv[1:]))
    for split in ("val", "test"):
        rows = dataset.splits[split]
        assert rows.valence is not None
        human = torch.from_numpy(rows.valence)
        realised, known = realised_future(
            human, torch.from_numpy(rows.mask), recipe.valence.discount
        )
        with torch.inference_mode():
            foreseen = [
                reader(torch.from_numpy(rows.inputs))["valence"][known].numpy() for reader in found
            ]
        group = np.broadcast_to(rows.group[:, None], known.shape)[known.numpy()]
        each = np.array([correlation(one, realised[known].numpy(), group) for one in foreseen])
        r, lo, hi = each.mean(0)
        print(
            f"{split:<5} r {r:.2f} ({lo:.2f} to {hi:.2f}), {len(group)} steps of "
            f"{len(np.unique(group))} reviews"
        )


def readers(recipe: Recipe, shape: dict[str, int], run: Path | None = None) -> list[nn.Module]:
    """The teacher, or the student of each seed of a run."""
    if run is None:
        assert recipe.teacher is not None
        return [models.build_model(recipe.teacher, **shape, key="teacher").eval()]
    weights = sorted(run.glob("arms/student-*/weights.safetensors"))
    tables = [recipe.student.model_copy(update={"weights": str(path)}) for path in weights]
    return [models.build_model(table, **shape, key="student").eval() for table in tables]


def correlation(x: NDArray, y: NDArray, group: NDArray) -> tuple[float, float, float]:
    """Pearson's r and its 95 % interval by drawing groups with replacement."""
    moments = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y]).astype(np.float64)
    by_group = np.stack([moments[:, group == g].sum(1) for g in np.unique(group)])  # (groups, 6)
    drawn = np.random.default_rng(0).multinomial(
        len(by_group), np.full(len(by_group), 1 / len(by_group)), RESAMPLES
    )
    sums = (np.vstack([np.ones(len(by_group)), drawn]) @ by_group).T
    n, sx, sy = sums[:3]
    sxx, syy, sxy = sums[3:]
    r = (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))
    lo, hi = np.quantile(r[1:], [0.025, 0.975])
    return float(r[0]), float(lo), float(hi)


if __name__ == "__main__":
    main()
