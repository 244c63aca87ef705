"""A quantised drafter: int8 rounding, then distillation on what the rounded student drafts.

L = KL(p || q) on the data's rows throughout, in full precision first. Under int8 rounding, at 0.3
of the learning rate, -log sum min(p, q) joins on text that the rounded student wrote (DistillSpec,
arXiv 2310.08461): q is what the device will draft with, not what its float32 weights would.
Activations are rounded token by token, so that q does not depend on the size of a call.
"""

RECIPE = {
    "source": {"kind": "on_policy", "share": 0.5},
    "terms": {
        "kd": {"weight": 0.5, "temperature": 1.0},
        "distilspec": {"weight": 0.5, "divergence": "lk", "since": 0.6},
    },
    "phases": [
        {"until": 0.6},
        {"until": 1.0, "rate": 0.3, "quant": {"weights": "int8", "activations": "int8_token"}},
    ],
}
