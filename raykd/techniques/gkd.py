"""On-policy distillation: the teacher corrects what the student wrote (GKD, Agarwal et al. 2024,
arXiv 2306.13649).

L = (1 - l) KL(p || q) on the data's rows + l JS_beta(p, q) on the student's own, at temperature 1,
with l = 0.5 of the rows its own. The paper has one divergence for both kinds; on the data's rows it
is here what every store serves. No gradient flows through the sampling. The student should have
learnt the data first: start from its weights.
"""

from typing import Annotated

from pydantic import Field

from raykd.losses.divergences import teacher_divergence, unflatten_valid
from raykd.losses.terms import TermValues, term
from raykd.signals import Batch, Signals

RECIPE = {
    "source": {"kind": "on_policy", "share": 0.5},
    "terms": {"kd": {"weight": 0.5, "temperature": 1.0}, "gkd": {"weight": 0.5, "beta": 0.5}},
}


@term(own=True)
def gkd(
    student: Signals, batch: Batch, *, beta: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> TermValues:
    """JS_beta(p, q) at temperature 1 at every written token; beta = 0 is KL(p || q), 1 is KL(q ||
    p) (eq. 1).
    """
    return TermValues(
        unflatten_valid(teacher_divergence(student, batch, "js", beta), batch.mask), batch.mask
    )
