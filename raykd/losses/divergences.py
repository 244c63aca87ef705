"""How far a student's next-token distribution q is from the teacher's p, over the whole vocabulary.

    forward   KL(p || q)
    reverse   KL(q || p)
    js        beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; its ends beta = 0
              and beta = 1 are forward and reverse (Agarwal et al. 2024, arXiv 2306.13649, eq. 1)
    tvd       sum |p - q| / 2 = 1 - a, where a = sum min(p, q) is the share of a student's drafts
              that the teacher accepts
    lk        -log a: the gradient of tvd over a, which does not stall where p and q hardly overlap
              (arXiv 2602.23881)
    hybrid    k KL(p || q) + (1 - k)(1 - a), with k = exp(-a) held constant (the same paper)

tvd, lk and hybrid have a kink where p = q: their gradient is 0 there and jumps beside it.

Shapes: P valid steps of a batch in order, V columns of the vocabulary.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses import from_head
from raykd.losses.fused import shared_vocab
from raykd.signals import Batch, Signals, flatten_valid, log_softmax
from raykd.targets import cross_entropy

DivergenceKind = Literal["forward", "reverse", "js", "tvd", "lk", "hybrid"]


def divergence(log_q: Tensor, log_p: Tensor, kind: DivergenceKind, beta: float = 0.5) -> Tensor:
    """A divergence between two sets of log probabilities (P, V), as (P,).

    forward covers every mode of the teacher. reverse keeps the student to what the teacher finds
    likely. js lies between the two, and `beta` says where. tvd, lk and hybrid follow the acceptance
    rate of speculative decoding. The formulas and papers are in `raykd.losses.divergences`.

    Example:
        >>> import torch
        >>> from raykd.losses import divergence
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.9, 0.1]]).log()
        >>> round(divergence(student, teacher, "tvd").item(), 4)
        0.4
        >>> round(divergence(student, teacher, "forward").item(), 4)
        0.3681
    """
    kind = _at_its_end(kind, beta)
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
    """The divergence of a student from the teacher at every valid step of a batch, as (P,).

    Use it in a term that chooses its divergence by a setting. A log of drafts may keep only a part
    of the teacher's distribution: then only "forward" can be computed, and any other kind is a
    RecipeError.

    Example:
        >>> import torch
        >>> from raykd import Batch, Signals
        >>> from raykd.losses import teacher_divergence
        >>> valid = torch.tensor([[True, True, False]])
        >>> teacher = Signals(torch.zeros(1, 3, 4), valid)
        >>> batch = Batch(
        ...     row_id=torch.zeros(1, dtype=torch.int64),
        ...     inputs=torch.zeros(1, 3, 2),
        ...     mask=valid,
        ...     label=torch.zeros(1, 3, dtype=torch.int64),
        ...     teacher=teacher,
        ... )
        >>> teacher_divergence(Signals(torch.zeros(1, 3, 4), valid), batch, "reverse")
        tensor([0., 0.])
    """
    kind = _at_its_end(kind, beta)
    headed = student.headed
    if headed is not None and batch.targets is None and kind in ("forward", "reverse", "js"):
        assert batch.teacher is not None
        return from_head.dense_loss(headed, batch.mask, batch.teacher, temperature, kind, beta)
    if headed is not None and batch.targets is not None and kind == "forward":
        return from_head.target_loss(headed, batch.mask, batch.targets(temperature), temperature)
    if batch.targets is not None and kind == "forward":
        log_q = student_log_probs(student, batch, temperature)
        return cross_entropy(log_q, batch.targets(temperature))
    log_q, log_p = both_log_probs(student, batch, temperature)
    return divergence(log_q, log_p, kind, beta)


def student_log_probs(student: Signals, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The student's log probabilities log q at the valid steps, as (P, V) in fp32 at least.

    V is the number of the teacher's columns. Further columns of the student's head are padding and
    stay outside its softmax. RecipeError where the student has fewer columns than the teacher.

    Example:
        >>> import torch
        >>> from raykd import Batch, Signals
        >>> from raykd.losses import student_log_probs
        >>> valid = torch.tensor([[True, False]])
        >>> batch = Batch(
        ...     row_id=torch.zeros(1, dtype=torch.int64),
        ...     inputs=torch.zeros(1, 2, 2),
        ...     mask=valid,
        ...     label=torch.zeros(1, 2, dtype=torch.int64),
        ...     teacher=Signals(torch.zeros(1, 2, 4), valid),
        ... )
        >>> student_log_probs(Signals(torch.zeros(1, 2, 4), valid), batch).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    assert batch.teacher is not None
    logits = flatten_valid(student.logits, batch.mask)
    targets = batch.targets
    vocab = batch.teacher.columns if targets is None else targets(temperature).vocab
    width = shared_vocab(vocab, logits.shape[-1], vocab)
    return log_softmax(logits[:, :width], temperature)


def both_log_probs(
    student: Signals, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The student's log q and the teacher's log p at the valid steps, each (P, V).

    Use it where a term needs the whole of both distributions. Columns are as in
    `student_log_probs`; no gradient reaches the teacher. RecipeError where a log of drafts keeps
    only a part of the teacher's distribution.

    Example:
        >>> import torch
        >>> from raykd import Batch, Signals
        >>> from raykd.losses import both_log_probs, divergence
        >>> valid = torch.tensor([[True, False]])
        >>> batch = Batch(
        ...     row_id=torch.zeros(1, dtype=torch.int64),
        ...     inputs=torch.zeros(1, 2, 2),
        ...     mask=valid,
        ...     label=torch.zeros(1, 2, dtype=torch.int64),
        ...     teacher=Signals(torch.zeros(1, 2, 4), valid),
        ... )
        >>> log_q, log_p = both_log_probs(Signals(torch.zeros(1, 2, 4), valid), batch)
        >>> divergence(log_q, log_p, "js")
        tensor([0.])
    """
    assert batch.teacher is not None
    if batch.targets is not None:
        raise RecipeError(
            "source.log: this log keeps a part of the teacher's distribution, from which only a "
            "forward divergence can be computed; use that, or write the log with "
            'store.codec = "dense"'
        )
    logits = flatten_valid(batch.teacher.logits.detach(), batch.mask)
    log_q = student_log_probs(student, batch, temperature)
    return log_q, log_softmax(logits, temperature)


class DrawnTokens(NamedTuple):
    """Of each token that was drawn, all (P,).

    Example:
        >>> from raykd.losses import DrawnTokens
        >>> DrawnTokens._fields
        ('log_q', 'log_p', 'reverse')
    """

    log_q: Tensor  # the student's log probability of it
    log_p: Tensor  # the teacher's
    reverse: Tensor  # KL(q || p) at its step


def drawn_tokens(
    student: Signals, batch: Batch, tokens: Tensor, temperature: float = 1.0
) -> DrawnTokens:
    """What a policy gradient reads of the tokens (P,) at the valid steps of a batch.

    Use it for the likelihood of text that was drawn, where the whole distributions are not needed.
    No gradient reaches the teacher. RecipeError as of `both_log_probs`.

    Example:
        >>> import torch
        >>> from raykd import Batch, Signals
        >>> from raykd.losses import drawn_tokens
        >>> valid = torch.tensor([[True, False]])
        >>> batch = Batch(
        ...     row_id=torch.zeros(1, dtype=torch.int64),
        ...     inputs=torch.zeros(1, 2, 2),
        ...     mask=valid,
        ...     label=torch.zeros(1, 2, dtype=torch.int64),
        ...     teacher=Signals(torch.zeros(1, 2, 4), valid),
        ... )
        >>> student = Signals(torch.zeros(1, 2, 4), valid)
        >>> drawn_tokens(student, batch, batch.label[valid]).log_q.exp()
        tensor([0.2500])
    """
    if student.headed is None or batch.targets is not None:
        log_q, log_p = both_log_probs(student, batch, temperature)
        return DrawnTokens(
            token_log_probs(log_q, tokens),
            token_log_probs(log_p, tokens),
            divergence(log_q, log_p, "reverse"),
        )
    teacher = batch.teacher
    assert teacher is not None
    loss = from_head.label_loss(
        student.headed, batch.mask, tokens, temperature=temperature, vocab=teacher.columns
    )
    reverse = from_head.dense_loss(student.headed, batch.mask, teacher, temperature, "reverse")
    return DrawnTokens(-loss, _teacher_log_p(teacher, batch.mask, tokens, temperature), reverse)


@torch.no_grad()
def _teacher_log_p(teacher: Signals, mask: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """(P,): the teacher's log probability of each token."""
    if teacher.headed is not None:
        return -from_head.label_loss(teacher.headed, mask, tokens, temperature=temperature)
    log_p = log_softmax(flatten_valid(teacher.logits, mask), temperature)
    return token_log_probs(log_p, tokens)


def unflatten_valid(values: Tensor, mask: Tensor) -> Tensor:
    """Values (P,) put back at the valid steps of `mask`, as (B, T) with 0 elsewhere.

    The inverse of `raykd.signals.flatten_valid`, for terms that compute on valid steps alone.

    Example:
        >>> import torch
        >>> from raykd.losses import unflatten_valid
        >>> valid = torch.tensor([[True, False], [True, True]])
        >>> unflatten_valid(torch.tensor([1.0, 2.0, 3.0]), valid)
        tensor([[1., 0.],
                [2., 3.]])
    """
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_log_probs(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The log probability of one token at each step: (P,), of log probabilities (P, V).

    Use it for the likelihood of text that was drawn, as in a policy gradient.

    Example:
        >>> import torch
        >>> from raykd.losses import token_log_probs
        >>> token_log_probs(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([1, 0]))
        tensor([-2., -3.])
    """
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _at_its_end(kind: DivergenceKind, beta: float) -> DivergenceKind:
    """The divergence that js is at beta = 0 and beta = 1; any other as it is."""
    if kind == "js" and beta in (0, 1):
        return "reverse" if beta else "forward"
    return kind


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) (P,), 0 where a is 0 (0 log 0 = 0)."""
    if not log_a.requires_grad:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).nan_to_num(0.0).sum(-1)
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)
