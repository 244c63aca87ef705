"""Sparse teacher targets: for each place, some classes and their weights, as flat arrays.

A place is one valid step of one sequence. With weights w_i on the classes i of a place and q the
student's softmax(z / T), the forward divergence and its gradient are

    KL = sum_i w_i log p_i - sum_i w_i log q_i = -entropy - sum_i w_i log q_i
    dKL/dz = (W q - w) / T,  W = sum_i w_i

With a tail bucket, one more outcome stands for every class that is not listed: p_tail = `tail`,
q_tail = 1 - sum q_i.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNLABELLED = -100  # the label of a row or step whose label is hidden or missing


@dataclass(frozen=True)
class SparseTargets:
    """CSR over P places: the entries of place p are [start[p], start[p + 1]).

    No class twice in a place.
    """

    ids: Tensor  # (M,) int64, below `vocab`
    start: Tensor  # (P + 1,) int64, start[0] = 0
    # (M,) fp32, the estimator's weights: sampled shares, or probabilities of the top classes
    weight: Tensor
    vocab: int  # number of real classes; columns beyond it are padding
    # (P,) fp32, -sum_i w_i log p_i (tail included); None: the KL's value is cross-entropy
    entropy: Tensor | None = None
    # (P,) fp32, the mass of all other classes; None: there is no tail bucket
    tail: Tensor | None = None

    def __len__(self) -> int:
        return len(self.start) - 1

    def counts(self) -> Tensor:
        """(P,) int64: entries of each place."""
        return self.start.diff()

    def rows(self) -> Tensor:
        """(M,) int64: the place of each entry."""
        places = torch.arange(len(self), device=self.start.device)
        return places.repeat_interleave(self.counts(), output_size=len(self.ids))

    def take(self, places: Tensor) -> "SparseTargets":
        """The places at `places` (Q,) int64, in that order, or where `places` (P,) bool is True."""
        if places.dtype == torch.bool:
            places = places.nonzero().squeeze(1)
        counts = self.counts()[places]
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = (self.start[places] - start[:-1]).repeat_interleave(counts)
        entries = shift + torch.arange(len(shift), device=shift.device)
        return replace(
            self,
            ids=self.ids[entries],
            start=start,
            weight=self.weight[entries],
            entropy=None if self.entropy is None else self.entropy[places],
            tail=None if self.tail is None else self.tail[places],
        )

    def to(self, device: torch.device | str) -> "SparseTargets":
        """The same on another device."""
        moved = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def dense(self) -> Tensor:
        """(P, vocab) fp32: the weights as a matrix, with zeros elsewhere.

        For tests and small vocabularies.
        """
        out = torch.zeros(len(self), self.vocab, dtype=self.weight.dtype, device=self.weight.device)
        return out.index_put_((self.rows(), self.ids), self.weight, accumulate=True)


def cross_entropy(log_q: Tensor, targets: SparseTargets) -> Tensor:
    """(P,): -sum_i w_i log q_i of log_q (P, V), with the tail bucket, less the stored entropy."""
    rows = targets.rows()
    picked = log_q[rows, targets.ids]
    value = log_q.new_zeros(len(targets)).index_add(0, rows, -targets.weight * picked)
    if targets.tail is not None:
        head = log_q.new_zeros(len(targets)).index_add(0, rows, picked.exp())
        value = value - targets.tail * torch.log1p(-head.clamp(max=1 - 1e-6))
    return value if targets.entropy is None else value - targets.entropy
