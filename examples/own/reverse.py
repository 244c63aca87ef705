"""Reverse distillation: the student keeps to what the teacher finds likely (Gu et al. 2023).

ArXiv 2306.08543, eq. 1:

L = w_ce CE + w_reverse KL(q || p), q the student's classes and p the teacher's, at temperature 1.
"""

from raykd import Batch, Signals, TermValues, term

RECIPE = {"terms": {"ce": {"weight": 0.2}, "reverse": {"weight": 0.8, "temperature": 1.0}}}


@term("logits")
def reverse(student: Signals, batch: Batch, *, temperature: float = 1.0) -> TermValues:
    """T^2 KL(q_T || p_T) at every valid step."""
    log_q = (student.logits.float() / temperature).log_softmax(-1)
    log_p = (batch.teacher.logits.float() / temperature).log_softmax(-1)
    return TermValues(temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1), student.mask)
