"""Vanilla distillation: labels and the teacher's softened classes (Hinton, Vinyals, Dean 2015,
arXiv 1503.02531).

L = w_ce CE(y, q) + w_kd T^2 KL(p_T || q_T).
"""

RECIPE = {"terms": {"ce": {"weight": 0.2}, "kd": {"weight": 0.8, "temperature": 2.0}}}
