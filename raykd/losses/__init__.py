"""Loss terms: what one is, the ones that techniques share, and how terms become one number.

A technique needs `term`, `TermValues` and, for terms of layers, `Pairs` and `mean_over_pairs`. The
other names are the losses and helpers from which the terms of this package are built.
"""

from raykd.losses.all_rows import gather_rows
from raykd.losses.divergences import (
    DivergenceKind,
    DrawnTokens,
    both_log_probs,
    divergence,
    drawn_tokens,
    student_log_probs,
    teacher_divergence,
    token_log_probs,
    unflatten_valid,
)
from raykd.losses.fused import dense_kl, sparse_kl
from raykd.losses.returns import returns_to_go, running_products, whitened
from raykd.losses.terms import (
    Answered,
    Pairs,
    TermValues,
    at_steps,
    mean_over_pairs,
    term,
)
from raykd.losses.valence import realised_future

__all__ = [
    "Answered",
    "DivergenceKind",
    "DrawnTokens",
    "Pairs",
    "TermValues",
    "at_steps",
    "both_log_probs",
    "dense_kl",
    "divergence",
    "drawn_tokens",
    "gather_rows",
    "mean_over_pairs",
    "realised_future",
    "returns_to_go",
    "running_products",
    "sparse_kl",
    "student_log_probs",
    "teacher_divergence",
    "term",
    "token_log_probs",
    "unflatten_valid",
    "whitened",
]
