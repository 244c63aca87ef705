"""Distillation down to ternary weights in steps, int8 and int4 before (BitNet b1.58, 2024).

L = w_ce CE + w_kd T^2 KL throughout (arXiv 2402.17764). 30 % of the steps are in full precision,
then 15, 25 and 60 % of the others under int8, int4 and ternary rounding. Each phase begins with new
scales and warms the learning rate up again. Ternary scales are learned (LSQ, arXiv 1902.08153).
"""

RECIPE = {
    "terms": {"ce": {"weight": 0.2}, "kd": {"weight": 0.8, "temperature": 2.0}},
    "phases": [
        {"until": 0.3},
        {"until": 0.405, "quant": {"weights": "int8"}},
        {"until": 0.58, "quant": {"weights": "int4", "per": "group", "activations": "none"}},
        {"until": 1.0, "quant": {"weights": "ternary", "scale": "learned", "activations": "none"}},
    ],
}
