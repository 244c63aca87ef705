"""Learning from rejected drafts: the position that the teacher rejects, and the tail after it.

A definition of this project, not a published method. Near to it are Online Speculative Decoding
(Liu et al. 2024, arXiv 2310.07177), which learns where drafts were corrected, and DistillSpec
(arXiv 2310.08461). It aims at accepted drafts. For a student's own quality the opposite is
reported: SpecKD (arXiv 2510.24021) leaves rejected tokens out.

L = 0.5 G + 0.5 KL(p || q) over all drafted tokens, p and q at the temperature of the drafts. A
draft's rejection and tail cost the teacher no more than verifying it does.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses import (
    Answered,
    DivergenceKind,
    TermValues,
    both_log_probs,
    returns_to_go,
    running_products,
    student_log_probs,
    teacher_divergence,
    term,
    token_log_probs,
    unflatten_valid,
)
from raykd.signals import Batch, Signals

RECIPE = {
    "source": {"kind": "drafts", "share": 1.0, "length": 6},
    "terms": {
        "ghost": {"weight": 0.5, "form": "soft", "tail": 0.7},
        "distilspec": {"weight": 0.5, "divergence": "forward"},
    },
}
LEAST = -15.0  # of the log probability of a rejected token: pushing it down has no bottom


def _counts(answered: Answered, batch: Batch, *, form: str, **_settings: Any) -> Tensor:
    """All drafted tokens, or the tested ones."""
    rollout = batch.rollout
    if form == "soft" or not rollout or rollout.accepted is None or rollout.rejected is None:
        return batch.mask
    return (rollout.accepted | rollout.rejected) & batch.mask


@term(own=True, counts=_counts)
def ghost(
    student: Signals,
    batch: Batch,
    *,
    form: Literal["soft", "correction", "pair"] = "soft",
    divergence: DivergenceKind = "forward",
    rejections: Literal["drawn", "expected"] = "drawn",
    tail: Annotated[float, Field(ge=0, le=1)] = 0.7,
) -> TermValues:
    """What a draft's rejection teaches; nothing where there was none.

    soft: rho D(p, q) at every drafted token, with rho = 1 at the rejection and tail^k k tokens
    after it. With "expected" rejections rho is the mean of that over the tests, given the draft:
    prod_{i < j} a_i (1 - a_j) for a rejection at j, with a = min(1, p / q) when it was drawn. No
    gradient flows into rho.

    The other two forms read token numbers alone, and count over the tested tokens. correction is
    -log q(y) at the rejection, y ~ (p - q)+ the teacher's token. Its mean gradient by the logits is
    (1 - a) q - (p - q)+, with a = sum min(p, q). pair is that + log q(x), x the rejected token. Its
    mean gradient is that of KL(p || q), since (p - q)+ - (q - p)+ = p - q.

    form        soft: a divergence after each rejection; correction, pair: its tokens alone
    divergence  for soft: which D
    rejections  for soft: the rejection that was drawn, or what is expected of all
    tail        for soft: the factor of rho from each token to the next
    """
    rollout = batch.rollout
    mask = batch.mask
    assert rollout is not None
    if (
        rollout.accepted is None
        or rollout.rejected is None
        or rollout.correction is None
        or rollout.tail is None
    ):
        raise RecipeError(
            'terms.ghost: this text was not drafted and verified; write source.kind = "drafts"'
        )
    rejected = rollout.rejected & mask
    if form != "soft":
        log_q = student_log_probs(student, batch, temperature=rollout.temperature)
        value = -token_log_probs(log_q, torch.where(rejected, rollout.correction, 0)[mask])
        if form == "pair":
            value = value + token_log_probs(log_q, batch.label[mask]).clamp(min=LEAST)
        tested = (rollout.accepted | rollout.rejected) & mask
        return TermValues(torch.where(rejected, unflatten_valid(value, mask), 0.0), tested)
    value = teacher_divergence(student, batch, divergence, temperature=rollout.temperature)
    value = unflatten_valid(value, mask)
    if rejections == "drawn":
        after = rollout.tail.to(value.dtype)
        rho = torch.where(after > 0, tail**after, 0.0) + rejected
    else:
        _, log_p = both_log_probs(student, batch, rollout.temperature)
        log_p_of_token = unflatten_valid(token_log_probs(log_p, batch.label[mask]), mask)
        acceptance = (log_p_of_token - rollout.log_q).exp().clamp(max=1)
        before, through = running_products(acceptance, mask)
        rho = before - through
        rho = rho + returns_to_go(rho.flip(1), mask.flip(1), discount=tail).flip(1)
    return TermValues(rho * value, mask)
