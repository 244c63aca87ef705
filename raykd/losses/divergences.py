"""How far a student's next-token distribution q is from the teacher's p, a place at a time, over
the whole vocabulary.

    forward   KL(p || q) reverse   KL(q || p) js        beta KL(p || m) + (1 - beta) KL(q || m), m =
    beta p + (1 - beta) q; its ends 0 and 1 are forward and
              reverse (Agarwal et al. 2024, arXiv 2306.13649, eq. 1)
    tvd       sum |p - q| / 2 = 1 - a, with a = sum min(p, q) the share of a student's drafts that p
    accepts lk        -log a: the gradient of tvd over a, which does not stall where p and q hardly
    meet (arXiv 2602.23881) hybrid    k KL(p || q) + (1 - k)(1 - a), k = exp(-a) constant (the same)

tvd, lk and hybrid have a kink where p = q: their gradient is 0 there and jumps beside it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses.fused import shared_vocab
from raykd.signals import Batch, Signals, flatten_valid, log_softmax
from raykd.targets import cross_entropy

DivergenceKind = Literal["forward", "reverse", "js", "tvd", "lk", "hybrid"]


def divergence(log_q: Tensor, log_p: Tensor, kind: DivergenceKind, beta: float = 0.5) -> Tensor:
    """(P,): the divergence of log probabilities (P, V). `beta` is js's."""
    kind = _end(kind, beta)
    if kind == "forward":
        return _kl(log_p, log_q)
    if kind == "reverse":
        return _kl(log_q, log_p)
    if kind == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if kind == "js":
        b = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device)
        log_m = torch.logaddexp(log_p + b.log(), log_q + (1 - b).log())
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    log_a = torch.minimum(log_p, log_q).logsumexp(-1)
    if kind == "lk":
        return -log_a
    k = (-log_a.detach().exp()).exp()
    return k * _kl(log_p, log_q) + (1 - k) * (1 - log_a.exp())


def teacher_divergence(
    student: Signals,
    batch: Batch,
    kind: DivergenceKind,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """(P,): the divergence from the teacher at the valid places in turn.

    A log whose codec keeps a part of the teacher's distribution tells the forward one: RecipeError
    for any other.
    """
    if batch.targets is not None and _end(kind, beta) == "forward":
        return cross_entropy(
            student_log_probs(student, batch, temperature), batch.targets(temperature)
        )
    return divergence(*both_log_probs(student, batch, temperature), kind, beta)


def student_log_probs(student: Signals, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log q (P, V), fp32 at least, at the valid places in turn. The teacher's columns are the
    vocabulary.

    Further columns of the student's are padding, outside its softmax. RecipeError where it has
    fewer.
    """
    assert batch.teacher is not None
    mine = flatten_valid(student.logits, batch.mask)
    vocab = (
        batch.teacher.logits.shape[-1]
        if batch.targets is None
        else batch.targets(temperature).vocab
    )
    return log_softmax(mine[:, : shared_vocab(vocab, mine.shape[-1], vocab)], temperature)


def both_log_probs(
    student: Signals, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log q, log p), each (P, V) fp32 at least, at the valid places in turn; log q as in `student_log_probs`.

    RecipeError where a log keeps but a part of the teacher's distribution.
    """
    assert batch.teacher is not None
    if batch.targets is not None:
        raise RecipeError(
            "source.log: only a forward divergence can be told from a part of the teacher's distribution, which is all "
            'that this log keeps; ask for that, or write the log with store.codec = "dense"'
        )
    theirs = flatten_valid(batch.teacher.logits.detach(), batch.mask)
    return student_log_probs(student, batch, temperature), log_softmax(theirs, temperature)


def unflatten_valid(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T): values (P,) at the valid places in turn, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_log_probs(log: Tensor, tokens: Tensor) -> Tensor:
    """(P,): the log probabilities (P, V) of tokens (P,)."""
    return log.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _end(kind: DivergenceKind, beta: float) -> DivergenceKind:
    """js as what it is at its ends."""
    if kind == "js" and beta in (0, 1):
        return "reverse" if beta else "forward"
    return kind


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) (P,), 0 where a is 0 (0 log 0 = 0)."""
    if not log_a.requires_grad:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).nan_to_num(0.0).sum(-1)
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)
