"""The loss terms that techniques share: labels, the teacher's classes, the value head."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses.terms import TermValues, term
from raykd.losses.valence import prefix_confidence, realised_future
from raykd.signals import UNLABELLED, Batch, Signals, flatten_valid, log_softmax
from raykd.targets import SparseTargets, cross_entropy

Temperature = Annotated[float, Field(gt=0)]
Where = Literal["steps", "sequence"]


@term()
def ce(student: Signals, batch: Batch, *, on: Where = "steps") -> TermValues:
    """-log q(label), at every valid step or on the sequence's mean logits; rows without a label
    count nothing.
    """
    mask = student.mask if on == "steps" else student.mask.any(1)
    target = batch.label
    if target.dim() == 2 and mask.dim() == 1:
        raise RecipeError('terms.ce: text has a label at every step, so write on = "steps"')
    target = target.reshape(*target.shape, *(1,) * (mask.dim() - target.dim())).expand(mask.shape)
    mask = mask & (target != UNLABELLED)
    log_q = student.log_q if on == "steps" else log_softmax(student.sequence_logits())
    return TermValues(-log_q.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1), mask)


@term("logits", divergence="forward")
def kd(
    student: Signals,
    batch: Batch,
    *,
    temperature: Temperature = 2.0,
    on: Where = "steps",
    t_squared: bool = True,
) -> TermValues:
    """T^2 KL(p_T || q_T), p and q the teacher's and student's softmax(z / T) (Hinton et al. 2015,
    section 2).

    The gradient with respect to the student's logits is T (q_T - p_T); t_squared = false drops the
    factor T^2.
    """
    assert batch.teacher is not None
    scale = temperature**2 if t_squared else 1.0
    if batch.targets is not None:
        return _sparse_kd(student, batch.targets(temperature), temperature, scale, on)
    if student.logits.shape[1] != batch.teacher.logits.shape[1]:
        on = "sequence"
    z_s, mask = _places(student, on)
    z_t, _ = _places(batch.teacher, on)
    log_q = log_softmax(z_s.float() / temperature)
    log_p = log_softmax(z_t.float() / temperature)
    value = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return TermValues(value * scale, mask)


def _sparse_kd(
    student: Signals, targets: SparseTargets, temperature: float, scale: float, on: Where
) -> TermValues:
    """kd against sparse targets: what they leave of the KL, -entropy - sum_i w_i log q_i, at every
    valid step.
    """
    if on == "sequence" or len(targets) != student.mask.sum():
        raise RecipeError(
            "terms.kd: a sparse store holds one target a step, so the student must answer at every step, with "
            'on = "steps"; or score with store.codec = "dense"'
        )
    if temperature == 1:
        log_q = flatten_valid(student.log_q, student.mask)  # (P, C)
    else:
        log_q = log_softmax(flatten_valid(student.logits, student.mask), temperature)
    value = student.logits.new_zeros(student.mask.shape, dtype=torch.float32)
    return TermValues(
        value.masked_scatter(student.mask, scale * cross_entropy(log_q, targets)), student.mask
    )


@term()
def future_valence(
    student: Signals, batch: Batch, *, discount: Annotated[float, Field(ge=0, le=1)] = 0.95
) -> TermValues:
    """(F_hat - F)^2 of the value head against the realised future valence, a Monte-Carlo fit.

    The valence is the data's column where there is one, else the model's own prefix confidence in
    the true label.
    """
    if student.valence is None:
        raise ValueError(
            "term future_valence: the model has no value head; return 'valence' (B, T) beside 'logits'"
        )
    own = prefix_confidence(student.logits.detach(), student.mask, batch.label)
    target, known = realised_future(
        own if batch.valence is None else batch.valence, student.mask, discount
    )
    return TermValues((student.valence.float() - target).square(), known)


@term("trajectory")
def value(student: Signals, batch: Batch) -> TermValues:
    """(F_S - F_T)^2: the student's future valence against the teacher's trajectory of it, at every
    valid step.
    """
    assert batch.teacher is not None
    if student.valence is None:
        raise RecipeError(
            "terms.value: the student has no value head; return 'valence' (B, T) beside 'logits'"
        )
    theirs = batch.teacher.valence
    assert theirs is not None
    if theirs.shape != student.valence.shape:
        raise RecipeError(
            f"terms.value: the student answers at {student.valence.shape[1]} steps, the teacher's trajectory has "
            f"{theirs.shape[1]}; leave the term out: weight = 0"
        )
    return TermValues((student.valence.float() - theirs.float()).square(), student.mask)


def _places(signals: Signals, on: Where) -> tuple[Tensor, Tensor]:
    if on == "steps":
        return signals.logits, signals.mask
    return signals.sequence_logits(), signals.mask.any(1)
