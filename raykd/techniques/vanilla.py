"""Vanilla distillation: labels and the teacher's softened classes (Hinton et al. 2015).

L = w_ce CE(y, q) + w_kd T^2 KL(p_T || q_T) (arXiv 1503.02531).
"""

RECIPE = {"terms": {"ce": {"weight": 0.2}, "kd": {"weight": 0.8, "temperature": 2.0}}}
