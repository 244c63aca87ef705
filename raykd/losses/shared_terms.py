"""The loss terms that techniques share: labels, the teacher's classes, the value head.

Shapes: B rows, T steps, C classes, P valid steps. Each term returns values (B, T), or (B,) where it
counts once a sequence, and where they count.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses import from_head
from raykd.losses.divergences import unflatten_valid
from raykd.losses.terms import Answered, TermValues, term
from raykd.losses.valence import at_last_step, prefix_confidence, realised_future
from raykd.signals import Batch, Signals, flatten_valid, log_softmax
from raykd.targets import UNLABELLED, SparseTargets, cross_entropy

Temperature = Annotated[float, Field(gt=0)]
Where = Literal["steps", "sequence"]


def _labelled(mask: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B,) or (B, T) laid over `mask`, and where there is one."""
    target = label.reshape(*label.shape, *(1,) * (mask.dim() - label.dim())).expand(mask.shape)
    return target, mask & (target != UNLABELLED)


def _ce_counts(answered: Answered, batch: Batch, *, on: Where) -> Tensor:
    mask = answered.mask if on == "steps" else answered.mask.any(1)
    return _labelled(mask, batch.label)[1] if batch.label.dim() <= mask.dim() else mask


@term(counts=_ce_counts)
def ce(student: Signals, batch: Batch, *, on: Where = "steps") -> TermValues:
    """Cross-entropy with the labels, -log q(label).

    Use it wherever there are labels; alone it is training without a teacher. Rows without a label
    count nothing.

    on  "steps": it counts at every valid step; "sequence": once a row, on the mean logits
    """
    mask = student.mask if on == "steps" else student.mask.any(1)
    if batch.label.dim() == 2 and mask.dim() == 1:
        raise RecipeError('terms.ce: text has a label at every step, so write on = "steps"')
    target, mask = _labelled(mask, batch.label)
    if student.headed is not None and on == "steps":
        share = from_head.shares(batch, mask)
        value = from_head.label_loss(student.headed, mask, target[mask], place_weight=share)
        return TermValues(unflatten_valid(value, mask), mask)
    log_q = student.log_q if on == "steps" else log_softmax(student.sequence_logits())
    log_q_of_label = log_q.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return TermValues(-log_q_of_label, mask)


def _kd_counts(answered: Answered, batch: Batch, *, on: Where, **_settings: Any) -> Tensor:
    assert batch.teacher is not None
    if batch.targets is None and answered.mask.shape[1] != batch.teacher.mask.shape[1]:
        on = "sequence"
    return answered.mask if on == "steps" else answered.mask.any(1)


@term("logits", divergence="forward", counts=_kd_counts)
def kd(
    student: Signals,
    batch: Batch,
    *,
    temperature: Temperature = 2.0,
    on: Where = "steps",
    t_squared: bool = True,
) -> TermValues:
    """Knowledge distillation, T^2 KL(p_T || q_T) of the softened classes softmax(z / T).

    Use it to learn from the teacher's classes, on labelled and unlabelled rows alike (Hinton et al.
    2015, arXiv 1503.02531, section 2). The gradient by the student's logits is T (q_T - p_T). A
    teacher or a student that answers once a sequence makes it on = "sequence".

    temperature  T, which both sets of logits are divided by
    on           "steps": it counts at every valid step; "sequence": once a row, on the mean logits
    t_squared    whether the factor T^2 is there
    """
    assert batch.teacher is not None
    if batch.document is not None and on == "sequence":
        raise RecipeError('terms.kd: text is answered at every step, so write on = "steps"')
    scale = temperature**2 if t_squared else 1.0
    if batch.targets is not None:
        share = from_head.shares(batch, student.mask)
        targets = batch.targets(temperature)
        return _sparse_kd(student, targets, temperature, scale=scale, on=on, share=share)
    if student.mask.shape[1] != batch.teacher.mask.shape[1]:
        on = "sequence"
    if student.headed is not None and on == "steps":
        share = from_head.shares(batch, student.mask)
        value = from_head.dense_loss(
            student.headed, student.mask, batch.teacher, temperature, place_weight=share
        )
        return TermValues(unflatten_valid(value * scale, student.mask), student.mask)
    z_s, mask = _logits(student, on)
    z_t, _ = _logits(batch.teacher, on)
    log_q = log_softmax(z_s.float() / temperature)
    log_p = log_softmax(z_t.float() / temperature)
    value = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return TermValues(value * scale, mask)


def _sparse_kd(
    student: Signals,
    targets: SparseTargets,
    temperature: float,
    *,
    scale: float,
    on: Where,
    share: Tensor | None,
) -> TermValues:
    """kd against sparse targets, -entropy - sum_i w_i log q_i at every valid step."""
    if on == "sequence" or len(targets) != student.mask.sum():
        raise RecipeError(
            "terms.kd: a sparse store holds one target a step, so the student must answer at every "
            'step, with on = "steps"; or score with store.codec = "dense"'
        )
    if student.headed is not None:
        columns = replace(targets, vocab=student.headed.columns)
        value = from_head.target_loss(student.headed, student.mask, columns, temperature, share)
        return TermValues(unflatten_valid(scale * value, student.mask), student.mask)
    if temperature == 1:
        log_q = flatten_valid(student.log_q, student.mask)  # (P, C)
    else:
        log_q = log_softmax(flatten_valid(student.logits, student.mask), temperature)
    zeros = student.mask.new_zeros(student.mask.shape, dtype=torch.float32)
    value = zeros.masked_scatter(student.mask, scale * cross_entropy(log_q, targets))
    return TermValues(value, student.mask)


def _future_counts(answered: Answered, batch: Batch, *, discount: float) -> Tensor:
    valence = batch.valence
    if valence is None:  # a confidence in the label, known wherever there is an answer
        known = answered.mask
        if batch.label.dim() == 2:
            known = known & (batch.label != UNLABELLED)
        valence = torch.where(known, 0.0, torch.nan)
        if valence.shape != batch.mask.shape:
            valence = at_last_step(valence, batch.mask)
    return realised_future(valence, batch.mask, discount, batch.document)[1]


@term(counts=_future_counts)
def future_valence(
    student: Signals, batch: Batch, *, discount: Annotated[float, Field(ge=0, le=1)] = 0.95
) -> TermValues:
    """The squared error of the value head against the realised future valence, (F_hat - F)^2.

    Use it to train a value head from data, without a teacher: a Monte-Carlo fit. The valence is the
    data's column where there is one, and the model's own prefix confidence in the label elsewhere.
    Of a model that answers once a row, that is its confidence after the last step. RecipeError
    where the student has no value head.

    discount  the factor of later steps in the future valence
    """
    if student.valence is None:
        raise RecipeError(
            "terms.future_valence: the student has no value head; return 'valence' (B, T) beside "
            "'logits'"
        )
    steps = student.valence_steps
    valence = batch.valence
    if valence is None:
        valence = prefix_confidence(student.logits.detach(), student.mask, batch.label)
        if valence.shape != steps.shape:
            valence = at_last_step(valence, steps)
    target, known = realised_future(valence, steps, discount, batch.document)
    return TermValues((student.valence.float() - target).square(), known)


def _value_counts(answered: Answered, batch: Batch) -> Tensor:
    assert batch.teacher is not None
    return batch.mask & batch.teacher.valence_steps


@term("trajectory", counts=_value_counts)
def value(student: Signals, batch: Batch) -> TermValues:
    """The squared difference of the student's and the teacher's future valence, (F_S - F_T)^2.

    Use it to pass on a teacher's value head, or its realised trajectory. It counts at every valid
    step at which the teacher's is known. RecipeError where the student has no value head or another
    number of steps.
    """
    assert batch.teacher is not None
    if student.valence is None:
        raise RecipeError(
            "terms.value: the student has no value head; return 'valence' (B, T) beside 'logits'"
        )
    trajectory = batch.teacher.valence
    assert trajectory is not None
    if trajectory.shape != student.valence.shape:
        raise RecipeError(
            f"terms.value: the student answers at {student.valence.shape[1]} steps, the teacher's "
            f"trajectory has {trajectory.shape[1]}; leave the term out: weight = 0"
        )
    known = student.valence_steps & batch.teacher.valence_steps
    return TermValues((student.valence.float() - trajectory.float()).square(), known)


def _logits(signals: Signals, on: Where) -> tuple[Tensor, Tensor]:
    """The logits that count and where: (B, T, C) at the steps, or (B, C) of the sequence."""
    if on == "steps":
        return signals.logits, signals.mask
    return signals.sequence_logits(), signals.mask.any(1)
