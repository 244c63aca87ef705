"""Distillation under int8 rounding, one scale a layer (Jacob et al. 2018, arXiv 1712.05877).

L = w_ce CE + w_kd T^2 KL throughout: in full precision first, then with weights and activations
rounded to int8 (see also LLM-QAT, arXiv 2305.17888).
"""

RECIPE = {
    "terms": {"ce": {"weight": 0.2}, "kd": {"weight": 0.8, "temperature": 2.0}},
    "phases": [{"until": 0.7}, {"until": 1.0, "quant": {"weights": "int8", "per": "tensor"}}],
}
