"""What models say and what losses read, as tensors.

Shape letters used everywhere: B rows, T steps, C classes, K input channels, D width, H heads, N
rows of a split.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.targets import SparseTargets

LANES = 8  # floats in a CPU vector register


@dataclass(frozen=True)
class Signals:
    """One model's outputs for a batch. `mask` marks the valid steps of the *outputs*.

    A model that answers once per sequence has T = 1. Inner layers stand under "<kind>.<submodule>":

        hidden     (B, T, D)     the submodule's output
        attention  (B, T, H, T)  each step's softmax rows over keys
        scores     (B, T, H, T)  their logits, 0 where a key is hidden from the step
        embedding  (B, 1, D)     the mean of the output over valid steps
    """

    logits: Tensor  # (B, T, C)
    mask: Tensor  # (B, T) bool
    valence: Tensor | None = None  # (B, T) future valence in [-1, 1]
    layers: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def log_q(self) -> Tensor:
        """(B, T, C): log softmax of the logits, once for all terms that read it."""
        return log_softmax(self.logits)

    def sequence_logits(self) -> Tensor:
        """(B, C) fp32: the mean of the logits over valid steps."""
        return masked_mean(self.logits.float(), self.mask)

    def valid(self, steps: Tensor) -> "Signals":
        """The same with zeros at invalid steps, so that whatever stands there reaches neither value
        nor gradient.

        `steps` (B, T) are the valid steps of the inputs: an inner layer has them too, whatever the
        answer has.
        """
        if (
            steps.device.type == "cpu" and self.mask.all() and steps.all()
        ):  # on a GPU, asking would wait for its queue
            return self
        masks = {steps.shape[1]: steps, 1: steps.any(1, True)}
        return Signals(
            zeroed(self.logits, self.mask),
            self.mask,
            None if self.valence is None else zeroed(self.valence, self.mask),
            {
                k: zeroed(v, masks[v.shape[1]]) if v.shape[1] in masks else v
                for k, v in self.layers.items()
            },
        )


class Split(Protocol):
    """What a term may read of rows beyond its batch, all (N, ...) in the split's order."""

    @property
    def row_id(self) -> Tensor: ...
    @property
    def label(self) -> Tensor: ...
    @property
    def answer(self) -> Tensor | None: ...
    @property
    def teacher(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Rollout:
    """What was known of each position when its token was drawn, all (B, T): position t is about the
    token after it.

    A draft's positions are tested one after the other until the teacher rejects one and corrects
    it; those after it are its tail. Text that was only sampled has no draft's fields. p and q are
    the softmax of logits / `temperature`.
    """

    log_q: Tensor  # the student's log probability of the token, when it was drawn
    # q / (share p + (1 - share) q) of teacher-mixed sampling, at most 1 / (1 - share); 1 without
    weight: Tensor
    lag: int  # steps of the optimiser between drawing and now
    temperature: float = 1.0
    accepted: Tensor | None = None  # bool
    rejected: Tensor | None = None  # bool: at most one a draft
    correction: Tensor | None = None  # int64: the teacher's token where `rejected`
    tail: Tensor | None = None  # int64: k at the k-th position after a rejection, 0 elsewhere


@dataclass(frozen=True)
class Batch:
    """Rows as a loss sees them. `label` is UNLABELLED where the label is hidden or missing.

    Rows of text have inputs (B, T, 2), each a token and its place in its document, and a label at
    every position: the token after it. `mask` is then where one is to be told, which a prompt's
    positions are not.

    A batch is wholly the data's or wholly the student's own text, which has a `rollout`: a term
    counts in one of the two kinds and nothing in the other. A step with both is two batches, whose
    sums and counts add.
    """

    row_id: Tensor  # (B,) int64
    inputs: Tensor  # (B, T, K); int32 where they are tokens
    mask: Tensor  # (B, T) bool
    label: Tensor  # (B,) int64, or (B, T) of text
    valence: Tensor | None = None  # (B, T), NaN where missing
    teacher: Signals | None = None  # its logits are (B, T, 0) where `targets` stands for them
    targets: Callable[[float], SparseTargets] | None = (
        None  # of all valid steps in turn, at a temperature
    )
    saliency: Tensor | None = None  # (B,), NaN where unknown
    answer: Tensor | None = None  # (B,) int64, the teacher's class of the whole row
    weight: Tensor | None = (
        None  # (B,) how much each row counts; without it every step counts alike
    )
    rollout: Rollout | None = None  # of text that the student wrote; None: the data's
    split: "Split | None" = (
        None  # what all rows of the split have, for terms that draw others from it
    )


def as_tensor(values: NDArray[Any]) -> Tensor:
    """The array as a tensor over the same memory, a read-only map too: nothing here writes into
    inputs.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def zeroed(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T, ...): `values` with zeros where `mask` (B, T), or (B, 1) for whole rows, is False."""
    return torch.where(mask.reshape(*mask.shape, *(1,) * (values.dim() - 2)), values, 0.0)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., T, C) fp32 at least: log probabilities. Fewer classes than LANES are walked with steps
    as the vector.

    PyTorch's CPU kernel for the last axis goes scalar there, which is five times slower and gives
    the same bits.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if temperature == 1 else z / temperature
    return z.mT.log_softmax(-2).mT if z.shape[-1] < LANES else z.log_softmax(-1)


def flatten_valid(values: Tensor, mask: Tensor) -> Tensor:
    """(P, ...):

    `values` (B, T, ...) where `mask` (B, T), in turn; without a copy where that is everywhere.
    """
    everywhere = mask.device.type == "cpu" and bool(
        mask.all()
    )  # on a GPU, asking would wait for its queue
    return values.flatten(0, 1) if everywhere else values[mask]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, ...): the mean of `values` (B, T, ...) over the steps where `mask` (B, T); 0 for a row
    with none.
    """
    count = mask.sum(1).clamp(min=1).reshape(-1, *(1,) * (values.dim() - 2))
    return zeroed(values, mask).sum(1) / count


def same_length(mine: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers (B, T, D) with the number of steps of the shorter, each averaged over parts of its
    own row.

    A layer with the steps of `mask` (B, T) is valid there, any other everywhere.
    """
    if mine.shape[1] == theirs.shape[1]:
        return mine, theirs
    steps = min(mine.shape[1], theirs.shape[1])
    every = {mask.shape[1]: mask}
    masks = [every.get(x.shape[1], mask.new_ones(x.shape[:2])) for x in (mine, theirs)]
    return resampled(mine, masks[0], steps), resampled(theirs, masks[1], steps)


def resampled(values: Tensor, mask: Tensor, steps: int) -> Tensor:
    """(B, steps, D): `values` (B, T, D) averaged over equal parts of each row's valid steps; 0 for
    a row with none.

    The n-th of a row's N valid steps covers [n / N, (n + 1) / N) of it, and each part weighs what
    it overlaps, so nothing is cropped; where N = steps it changes nothing.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    start = (mask.cumsum(1) - 1) / count  # (B, T)
    part = torch.arange(steps, device=mask.device)[:, None] / steps  # (steps, 1)
    overlap = torch.minimum((start + 1 / count)[:, None], part + 1 / steps) - torch.maximum(
        start[:, None], part
    )
    weight = torch.where(mask[:, None], overlap.clamp(min=0), 0.0)  # (B, steps, T)
    return steps * weight @ zeroed(values, mask)
