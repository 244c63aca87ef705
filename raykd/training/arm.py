"""What one training is, and this process among the workers that do it."""

from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor

from raykd.recipe.source import Source
from raykd.recipe.tables import Phase, TermSpec, Weighting


@dataclass(frozen=True)
class Arm:
    """One training: the student under its terms, or the control under labels only.

    `source` are rows of its own.
    """

    name: str
    seed: int
    terms: dict[str, TermSpec]
    weighting: Weighting | None = None
    phases: tuple[Phase, ...] = ()
    source: Source | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class World:
    """This process among the workers."""

    rank: int = 0
    size: int = 1

    def share(self, batch: int) -> slice:
        """This rank's contiguous part of a global batch; parts differ by at most one row."""
        bounds = np.linspace(0, batch, self.size + 1).round().astype(int)
        return slice(int(bounds[self.rank]), int(bounds[self.rank + 1]))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


ONE_PROCESS = World()
