"""What one training is, and this process among the workers that do it."""

import socket
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raykd.recipe.source import Source
from raykd.recipe.tables import Phase, TermSpec, Weighting

LINE_BYTES = 256


@dataclass(frozen=True)
class Arm:
    """One training: the student under its terms, or the control under labels only.

    `source` are rows of its own. With `select`, a validation metric, each phase ends with the
    weights that are best by it, else with its last ones.
    """

    name: str
    seed: int
    terms: dict[str, TermSpec]
    weighting: Weighting | None = None
    phases: tuple[Phase, ...] = ()
    source: Source | None = None
    select: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class World:
    """This process among the workers."""

    rank: int = 0
    size: int = 1
    node: str = field(default_factory=socket.gethostname)

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

    def told(self, text: str, device: torch.device) -> list[str]:
        """What each rank tells the others: a line of up to 256 bytes."""
        if self.size == 1:
            return [text]
        own = torch.zeros(LINE_BYTES, dtype=torch.uint8, device=device)
        letters = text.encode()[:LINE_BYTES]
        own[: len(letters)] = torch.tensor(list(letters), dtype=torch.uint8, device=device)
        lines = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(lines, own)
        whole = [bytes(line.tolist()) for line in lines]
        return [line.rstrip(b"\0").decode(errors="replace") for line in whole]


ONE_PROCESS = World()
