"""What models say and what losses read, as tensors.

Shape letters used everywhere: B rows, T steps, C classes, K input channels, D width, H heads, N rows of a split.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

UNLABELLED = -100


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
        """(B, C): the mean of the logits over valid steps."""
        return masked_mean(self.logits, self.mask)


@dataclass(frozen=True)
class Batch:
    """Rows as a loss sees them. `label` is UNLABELLED where the label is hidden or missing."""

    row_id: Tensor  # (B,) int64
    inputs: Tensor  # (B, T, K)
    mask: Tensor  # (B, T) bool
    label: Tensor  # (B,) int64
    valence: Tensor | None = None  # (B, T), NaN where missing
    teacher: Signals | None = None


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, ...): the mean of `values` (B, T, ...) over the steps where `mask` (B, T); 0 for a row with none."""
    weight = mask.to(values.dtype).reshape(*mask.shape, *(1,) * (values.dim() - 2))
    kept = torch.where(weight > 0, values, torch.zeros_like(values))
    return kept.sum(1) / weight.sum(1).clamp(min=1)
