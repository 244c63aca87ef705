"""Valence-weighted distillation down to ternary weights by way of int8.

L is that of raykd/techniques/valence.py throughout: rows whose future goes well count more. 30 % of
the steps are in full precision, then weights are int8, then ternary with learned scales (LSQ, arXiv
1902.08153). Everything else is stored as int8. To see what the weighting does, compare with the
same recipe and weighting.mode = "uniform".
"""

RECIPE = {
    "terms": {
        "ce": {"weight": 0.2},
        "kd": {"weight": 0.8, "temperature": 2.0},
        "attention": {
            "weight": 0.4,
            "pairs": [["blocks.0.attention.qkv", "blocks.2.attention.qkv"]],
            "parts": 3,
        },
        "value": {"weight": 0.55},
    },
    "weighting": {"mode": "ess", "boost": 6.0, "fraction": 0.5},
    "phases": [
        {"until": 0.3},
        {"until": 0.5, "quant": {"weights": "int8"}},
        {"until": 1.0, "quant": {"weights": "ternary", "scale": "learned", "activations": "none"}},
    ],
}
