"""Valence-weighted distillation: rows whose future goes well count more.

L = (1 / N) sum_i w_i [w_ce CE_i + w_kd T^2 KL_i + w_attention A_i + w_value (F_S - F_T)^2_i], each
the mean over a row's steps. w_i = n softmax(boost z_i), with z the standardised saliency of the
teacher's future-valence trajectory F_T. boost is lowered until the effective sample size is half
the rows (Kish 1965). raykd/losses/weighting.py has the other modes. Exponential weights of
standardised returns are Peng et al. 2019, arXiv 1910.00177.
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
}
