"""On-policy distillation: the teacher corrects what the student wrote (GKD, Agarwal et al. 2024).

L = (1 - l) KL(p || q) on the data's rows + l JS_beta(p, q) on the student's own, at temperature 1,
with l = 0.5 of the rows its own (arXiv 2306.13649). The paper has one divergence for both kinds of
rows. Here the data's rows have the forward one, which every store serves.

No gradient flows through the sampling. The student should have learnt the data first: start from
its weights.
"""

from typing import Annotated

from pydantic import Field

from raykd.losses import TermValues, at_steps, teacher_divergence, term, unflatten_valid
from raykd.signals import Batch, Signals

RECIPE = {
    "source": {"kind": "on_policy", "share": 0.5},
    "terms": {"kd": {"weight": 0.5, "temperature": 1.0}, "gkd": {"weight": 0.5, "beta": 0.5}},
}


@term(own=True, counts=at_steps)
def gkd(
    student: Signals, batch: Batch, *, beta: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> TermValues:
    """JS_beta(p, q) at temperature 1 at every written token (eq. 1).

    beta  0 is KL(p || q), and 1 is KL(q || p)
    """
    value = teacher_divergence(student, batch, "js", beta)
    return TermValues(unflatten_valid(value, batch.mask), batch.mask)
