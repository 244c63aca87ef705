"""Losses of a student whose logits are not made: its hidden states and its head, walked in chunks.

Each gives (P,) values at the places that a mask marks, with the gradient of the plain formula.
"""

import torch
from torch import Tensor

from raykd.losses.fused import Head, dense_kl, shared_vocab, sparse_kl
from raykd.losses.fused_chunks import Divergence
from raykd.signals import Batch, Headed, Signals, flatten_valid
from raykd.targets import SparseTargets


def label_loss(
    headed: Headed,
    mask: Tensor,
    label: Tensor,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    place_weight: Tensor | None = None,
) -> Tensor:
    """(P,): -log q of the labels (P,), over the first `vocab` columns or all."""
    start = torch.arange(len(label) + 1, device=label.device)
    one = torch.ones(len(label), device=label.device)
    vocab = shared_vocab(vocab or headed.columns, headed.columns, vocab)
    targets = SparseTargets(label, start, one, vocab)
    return sparse_kl(
        headed.hidden[mask],
        headed.weight,
        headed.bias,
        targets,
        temperature=temperature,
        place_weight=place_weight,
    )


def target_loss(
    headed: Headed,
    mask: Tensor,
    targets: SparseTargets,
    temperature: float,
    place_weight: Tensor | None = None,
) -> Tensor:
    """(P,): KL of sparse targets, one a place of the mask, over their classes."""
    hidden = flatten_valid(headed.hidden, mask)
    return sparse_kl(
        hidden,
        headed.weight,
        headed.bias,
        targets,
        temperature=temperature,
        place_weight=place_weight,
    )


def dense_loss(
    headed: Headed,
    mask: Tensor,
    teacher: Signals,
    temperature: float,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    place_weight: Tensor | None = None,
) -> Tensor:
    """(P,): a divergence from a teacher at the places of a mask (B, T).

    A teacher with a head is walked beside the student.
    """
    return dense_kl(
        flatten_valid(headed.hidden, mask),
        headed.weight,
        headed.bias,
        _distribution(teacher, mask),
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        vocab=teacher.columns,
        place_weight=place_weight,
    )


def _distribution(teacher: Signals, mask: Tensor) -> Tensor | Head:
    """A teacher's logits (P, V) at the places of a mask, or what they are made of."""
    if teacher.headed is None:
        return flatten_valid(teacher.logits.detach(), mask)
    headed = teacher.headed.detached()
    return Head(flatten_valid(headed.hidden, mask), headed.weight, headed.bias)


def shares(batch: Batch, mask: Tensor) -> Tensor | None:
    """(P,): what each place of a mask counts in proportion; None where all count alike."""
    if batch.weight is None:
        return None
    share = batch.weight / mask.sum(1).clamp(min=1)
    return share[:, None].expand(mask.shape)[mask]
