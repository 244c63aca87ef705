"""What one chunk of logits becomes: a divergence per place, and its gradient where the logits were.

Each function takes z (c, V) = logits / T and scale (c,), returns value (c,), and leaves
d(scale value)/dz in z.
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "js"]


def sparse_chunk(
    z: Tensor, scale: Tensor, row: Tensor, ids: Tensor, w: Tensor, tail: Tensor | None
) -> Tensor:
    """-sum w log q (c,) of z (c, V).

    The entries of the targets are (row, ids, w), each (m,). `tail` (c,) is the weight of all other
    classes together.
    """
    flat = z.view(-1)
    at = row * z.shape[1] + ids
    z.sub_(z.amax(1, keepdim=True))
    picked = flat[at]
    z.exp_()
    mass = w.new_zeros(len(z)).index_add_(0, row, w)
    if tail is None:
        total = z.sum(1)
        value = mass * total.log() - w.new_zeros(len(z)).index_add_(0, row, w * picked)
        factor = mass * scale / total
        z.mul_(factor.unsqueeze(1))
        flat.index_add_(0, at, -w * scale[row])
        return value
    head = picked.exp()
    flat[at] = 0.0  # the rest is summed by itself: 1 - sum q_i would lose it to rounding
    rest = z.sum(1).clamp(min=torch.finfo(z.dtype).tiny)
    total = rest + w.new_zeros(len(z)).index_add_(0, row, head)
    mass = mass + tail
    value = (
        mass * total.log() - tail * rest.log() - w.new_zeros(len(z)).index_add_(0, row, w * picked)
    )
    z.mul_((scale * (mass / total - tail / rest)).unsqueeze(1))
    flat[at] = scale[row] * (mass / total)[row] * head - scale[row] * w
    return value


def dense_chunk(
    z: Tensor, log_p: Tensor, scale: Tensor, divergence: Divergence, beta: float
) -> Tensor:
    """The divergence (c,) of z (c, V) from log_p (c, V).

    With u = d value / dq, the gradient is dz = q (u - sum q u).
    """
    log_q = z.log_softmax(1)
    if divergence == "forward":
        p = log_p.exp()
        value = _dot(p, log_p) - _dot(p, log_q)
        torch.exp(log_q, out=z)
        z.sub_(p).mul_(scale.unsqueeze(1))
        return value
    q = log_q.exp()
    if divergence == "reverse":
        u = log_q - log_p
        inner = _dot(q, u)
        value = inner
    else:
        b = torch.tensor(beta, dtype=z.dtype, device=z.device)
        log_m = torch.logaddexp(log_p + b.log(), log_q + (1 - b).log())
        u = (1 - b) * (log_q - log_m)
        inner = _dot(q, u)
        value = b * _dot(log_p.exp(), log_p - log_m) + inner
    torch.mul(q, u.sub_(inner.unsqueeze(1)), out=z)
    z.mul_(scale.unsqueeze(1))
    return value


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over classes (c,), 0 where p is 0 whatever x (0 log 0 = 0)."""
    return torch.where(p > 0, p * x, 0.0).sum(1)


@lru_cache(maxsize=1)
def compiled_chunk() -> Any:
    """`sparse_chunk` through torch.compile, once a process."""
    return torch.compile(sparse_chunk, dynamic=True)
