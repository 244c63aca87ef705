"""What models say and what losses read, as tensors.

Shape letters used everywhere: B rows, T steps, C classes, K input channels, D width, H heads, N rows of a split.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.targets import SparseTargets

UNLABELLED = -100
LANES = 8  # floats in a CPU vector register


@dataclass(frozen=True)
class Signals:
    """One model's outputs for a batch. `mask` marks the valid steps of the *outputs*.

    A model that answers once per sequence has T = 1. Attention is softmax rows over keys.
    """

    logits: Tensor  # (B, T, C)
    mask: Tensor  # (B, T) bool
    valence: Tensor | None = None  # (B, T) future valence in [-1, 1]
    hidden: dict[str, Tensor] = field(default_factory=dict)  # name -> (B, T, D)
    attention: dict[str, Tensor] = field(default_factory=dict)  # name -> (B, H, T, T)

    def sequence_logits(self) -> Tensor:
        """(B, C) fp32: the mean of the logits over valid steps."""
        return masked_mean(self.logits.float(), self.mask)

    def valid(self) -> "Signals":
        """The same with zeros at invalid steps, so that whatever stands there reaches neither value nor gradient."""
        if self.mask.device.type == "cpu" and self.mask.all():  # on a GPU, asking would wait for its queue
            return self
        return Signals(
            zeroed(self.logits, self.mask),
            self.mask,
            None if self.valence is None else zeroed(self.valence, self.mask),
            {k: zeroed(v, self.mask) for k, v in self.hidden.items()},
            {k: zeroed(v.transpose(1, 2), self.mask).transpose(1, 2) for k, v in self.attention.items()},
        )


@dataclass(frozen=True)
class Batch:
    """Rows as a loss sees them. `label` is UNLABELLED where the label is hidden or missing."""

    row_id: Tensor  # (B,) int64
    inputs: Tensor  # (B, T, K)
    mask: Tensor  # (B, T) bool
    label: Tensor  # (B,) int64
    valence: Tensor | None = None  # (B, T), NaN where missing
    teacher: Signals | None = None  # its logits are (B, T, 0) where `targets` stands for them
    targets: Callable[[float], SparseTargets] | None = None  # of all valid steps in turn, at a temperature


def tensor(values: NDArray[Any]) -> Tensor:
    """The array as a tensor over the same memory, a read-only map too: nothing here writes into inputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def zeroed(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T, ...): `values` with zeros where `mask` (B, T), or (B, 1) for whole rows, is False."""
    return torch.where(mask.reshape(*mask.shape, *(1,) * (values.dim() - 2)), values, 0.0)


def log_softmax(logits: Tensor) -> Tensor:
    """(..., T, C) fp32: log probabilities. Fewer classes than LANES are walked with steps as the vector.

    PyTorch's CPU kernel for the last axis goes scalar there, which is five times slower and gives the same bits.
    """
    z = logits.float()
    return z.mT.log_softmax(-2).mT if z.shape[-1] < LANES else z.log_softmax(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, ...): the mean of `values` (B, T, ...) over the steps where `mask` (B, T); 0 for a row with none."""
    count = mask.sum(1).clamp(min=1).reshape(-1, *(1,) * (values.dim() - 2))
    return zeroed(values, mask).sum(1) / count
