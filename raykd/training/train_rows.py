"""What the loop asks of the rows that it trains on, wherever they are."""

from typing import Protocol

import torch
from torch import Tensor

from raykd.data.order import Order
from raykd.recipe.tables import Optim
from raykd.signals import Batch


class TrainRows(Protocol):
    """One split for a training: `DeviceRows` holds it, `PartRows` reads it in parts.

    A position is that of a row in the split, among those that training sees.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def readers(self) -> int:
        """Threads that make batches ahead; 0 where a batch is at hand at once."""
        ...

    @property
    def row_shape(self) -> torch.Size:
        """The shape of one row's inputs, (T, K)."""
        ...

    @property
    def saliency(self) -> Tensor | None:
        """(N,): of all rows, NaN where it is unknown; None where the store has none."""
        ...

    @property
    def teaches_logits(self) -> bool:
        """Whether the teacher's distribution at temperature 1 is known."""
        ...

    def order(self, optim: Optim, seed: int) -> Order:
        """The positions of every global batch."""
        ...

    def expect(self, order: Order, step: int, share: slice) -> None:
        """Begin to fetch what a share of the batches after this step's needs."""
        ...

    def close(self) -> None:
        """End what works ahead, when no training reads these rows any more."""
        ...

    def batch(self, index: Tensor, noise: Tensor | None = None) -> Batch:
        """The rows at `index` (B,), with `noise` (B, T, K) added to valid inputs."""
        ...
