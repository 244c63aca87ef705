"""Attention distillation: how a model relates the steps of a sequence (Wang et al. 2021, MiniLMv2).

L = w_ce CE + w_kd T^2 KL + w_attention A, with A one of three named modes:

    relation    KL between softmax rows of x x^T / sqrt(d), x a projection cut into heads (arXiv
                2012.15828, eq. 3-4): any widths and head counts, as long as `heads` divides the
                widths
    scores      squared difference of attention's logits, summed over keys (TinyBERT, arXiv
                1909.10351, eq. 7)
    activation  squared difference of Q / |Q|, Q = mean over channels of |x|^2 at a step (arXiv
                1612.03928, eq. 1-2)

Means over all entries of attention maps vanish with their length. Between random projections of 16
and of 1,024 steps the mean squared difference falls from 1.9e-2 to 5.2e-4, while relation rises
from 2.3 to 9.6. So sums run over keys, means over steps, and relation is the default.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses import Answered, Pairs, TermValues, mean_over_pairs, term
from raykd.signals import Batch, Signals, same_length

RECIPE = {
    "terms": {
        "ce": {"weight": 0.2},
        "kd": {"weight": 0.8, "temperature": 2.0},
        "attention": {
            "weight": 1.0,
            "pairs": [["blocks.0.attention.qkv", "blocks.2.attention.qkv"]],
            "parts": 3,
        },
    }
}
Count = Annotated[int, Field(ge=1)]


def _kind(settings: Any) -> str:
    """The kind of layers that a mode reads."""
    return "scores" if settings["mode"] == "scores" else "hidden"


def _counts(answered: Answered, batch: Batch, *, mode: str, **_settings: Any) -> Tensor:
    """The steps, or the rows that an activation is compared over."""
    return batch.mask.any(1) if mode == "activation" else batch.mask


@term(layers=_kind, counts=_counts)
def attention(
    student: Signals,
    batch: Batch,
    *,
    pairs: Pairs,
    mode: Literal["relation", "scores", "activation"] = "relation",
    heads: Count = 1,
    parts: Count = 1,
) -> TermValues:
    """The mode's divergence of teacher and student, mean over pairs of layers.

    RecipeError where the layers cannot be compared in this mode.

    pairs  pairs of a submodule of the student and one of the teacher
    mode   what of them is compared: how steps relate, attention's own scores, or the sizes of
           activations
    heads  for relation: the number of heads of each projection
    parts  for relation: the number of projections in the layer's output, 3 for fused queries, keys
           and values
    """
    assert batch.teacher is not None
    kind = _kind({"mode": mode})
    keys = _keys(batch)
    values = []
    for mine, theirs in pairs:
        x = student.layers[f"{kind}.{mine}"].float()
        y = batch.teacher.layers[f"{kind}.{theirs}"].float()
        if mode == "activation":
            values.append(_activation(x, y, batch.mask))
        elif x.shape[1] != y.shape[1]:
            raise RecipeError(
                f"terms.attention: {mine} has {x.shape[1]} steps, {theirs} {y.shape[1]}; "
                'use mode = "activation"'
            )
        elif mode == "scores":
            values.append(_scores(x, y, keys))
        else:
            x = _cut(x, parts, heads, name=mine)
            y = _cut(y, parts, heads, name=theirs)
            values.append(_relation(x, y, keys))
    return mean_over_pairs(values, batch.mask)


def _keys(batch: Batch) -> Tensor:
    """(B, T, T) or (B, 1, T): the steps that each step is related to, of text in its document."""
    valid = batch.mask[:, None]
    if batch.document is None:
        return valid
    return valid & (batch.document[:, :, None] == batch.document[:, None])


def _cut(x: Tensor, parts: int, heads: int, name: str) -> Tensor:
    """(B, parts heads, T, d) of x (B, T, D)."""
    if x.shape[-1] % (parts * heads):
        raise RecipeError(
            f"terms.attention: {name} is {x.shape[-1]} wide, not a multiple of {parts} parts x "
            f"{heads} heads"
        )
    # Contiguous, because small matrix products are 5 times faster so.
    return x.unflatten(-1, (parts * heads, -1)).transpose(1, 2).contiguous()


def _relation(x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    """KL(softmax(y y^T / sqrt(d_y)) || softmax(x x^T / sqrt(d_x))) at each step, mean over heads.

    x is (B, H, T, d_x), y is (B, H, T, d_y), `keys` (B, T or 1, T) and the result (B, T).
    """
    hidden = ~keys[:, None]
    log_q = _log_relation(x, hidden)
    log_p = _log_relation(y, hidden)
    p = log_p.exp()
    return torch.where(hidden, 0.0, p * (log_p - log_q)).sum(-1).mean(1)


def _log_relation(x: Tensor, hidden: Tensor) -> Tensor:
    """(B, H, T, T): log softmax of x x^T / sqrt(d) over the keys that are not hidden."""
    scores = x @ x.mT * x.shape[-1] ** -0.5
    return scores.masked_fill(hidden, torch.finfo(x.dtype).min).log_softmax(-1)


def _scores(x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    """(B, T): squared difference of scores (B, T, H, T), sum over its keys, mean over heads."""
    if x.shape[2] != y.shape[2]:
        raise RecipeError(
            f"terms.attention: scores need equal head counts, found {x.shape[2]} and {y.shape[2]}; "
            'use mode = "relation"'
        )
    seen = keys[:, :, None]
    difference = torch.where(seen, x, 0.0) - torch.where(seen, y, 0.0)
    return difference.square().sum(-1).mean(-1)


def _activation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """(B, 1): |Q_S / |Q_S| - Q_T / |Q_T||^2 over the steps, Q the mean square over channels."""
    q, p = same_length(x.square().mean(-1, keepdim=True), y.square().mean(-1, keepdim=True), mask)
    difference = F.normalize(q, dim=1) - F.normalize(p, dim=1)
    return difference.square().sum((1, 2))[:, None]
