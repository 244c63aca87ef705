"""Distillation under int4 rounding, a scale for every 32 inputs (LLM-QAT, Liu et al. 2023).

L = w_ce CE + w_kd T^2 KL throughout (arXiv 2305.17888): in full precision first, then with weights
rounded to int4. A phase with weights = "int8" and per = "channel" is the eight-bit form.
"""

RECIPE = {
    "terms": {"ce": {"weight": 0.2}, "kd": {"weight": 0.8, "temperature": 2.0}},
    "phases": [
        {"until": 0.6},
        {
            "until": 1.0,
            "quant": {"weights": "int4", "per": "group", "group": 32, "activations": "none"},
        },
    ],
}
