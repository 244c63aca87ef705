"""A better drafter for speculative decoding, trained on text that it wrote (DistillSpec, 2024).

L = (1 - l) KL(p || q) on the data's rows + l D(p, q) on the student's own, with p and q at the
temperature that it drafts with and l = 0.5 (arXiv 2310.08461). Of the divergences in
raykd/losses/divergences.py, "tvd" and "lk" are the share of accepted drafts itself. Which one
serves best depends on task and temperature (the paper's section 5), so search
`terms.distilspec.divergence`.

Text that speculative decoding puts out is distributed as p, not as q. Learning from it would be off
the student's policy.
"""

from typing import Annotated

from pydantic import Field

from raykd.losses import (
    DivergenceKind,
    TermValues,
    at_steps,
    teacher_divergence,
    term,
    unflatten_valid,
)
from raykd.signals import Batch, Signals

RECIPE = {
    "source": {"kind": "on_policy", "share": 0.5},
    "terms": {
        "kd": {"weight": 0.5, "temperature": 1.0},
        "distilspec": {"weight": 0.5, "divergence": "lk"},
    },
}


@term(own=True, counts=at_steps)
def distilspec(
    student: Signals,
    batch: Batch,
    *,
    divergence: DivergenceKind = "lk",
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> TermValues:
    """D(p, q) at every written or drafted token, at the temperature that it was drawn at.

    divergence  which D; tvd and lk are the share of accepted drafts itself
    beta        of the divergence "js": 0 is KL(p || q), and 1 is KL(q || p)
    """
    assert batch.rollout is not None
    value = teacher_divergence(student, batch, divergence, beta, batch.rollout.temperature)
    return TermValues(unflatten_valid(value, batch.mask), batch.mask)
