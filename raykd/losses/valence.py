"""Valence: a signal per step in [-1, 1], its discounted future, and one saliency per sequence."""

import math

import torch
from torch import Tensor

from raykd.recipe.recipe import Valence
from raykd.signals import UNLABELLED, log_softmax, masked_mean, zeroed


def prefix_confidence(logits: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """(B, T): v_t = 2 p(label | steps <= t) - 1 of a causal classifier; NaN at invalid steps.

    p is the softmax of the mean logits of steps 1..t, the classifier's own decision rule. A row
    without a label is judged by the class that the full sequence gives, so no hidden label leaks.
    With a label at every step, p is that step's own softmax. A derived signal: the data holds no
    human valence.
    """
    if label.dim() == 2:
        target, known = label.clamp(min=0), mask & (label != UNLABELLED)
        log_p = log_softmax(logits).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return torch.where(known, 2 * log_p.exp() - 1, torch.nan)
    seen = mask.cumsum(1).clamp(min=1)
    prefix = zeroed(logits.float(), mask).cumsum(1) / seen.unsqueeze(-1)
    own = prefix[:, -1].argmax(-1)
    target = torch.where(label == UNLABELLED, own, label)
    log_p = log_softmax(prefix).gather(-1, target.view(-1, 1, 1).expand(*mask.shape, 1)).squeeze(-1)
    return torch.where(mask, 2 * log_p.exp() - 1, torch.nan)


def realised_future(valence: Tensor, mask: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """(F, known): F_t = sum_k g^k v_{t+k} / sum_k g^k over the known steps from t on; known where
    any is.

    Normalised return-to-go, so F stays in [-1, 1]; g = 0 gives v itself, g = 1 the mean of the
    remainder. Missing steps (NaN) and invalid ones are left out of both sums.
    """
    here = mask & torch.isfinite(valence)
    value = torch.where(here, valence, 0.0).float()
    carry: Tensor | float = 0.0
    backwards = []
    for step in reversed(
        torch.stack([value, here.float()]).unbind(-1)
    ):  # (2, B): sum and weight at once
        carry = step + discount * carry
        backwards.append(carry)
    total, weight = torch.stack(backwards[::-1], -1)
    known = mask & (weight > 0)
    return torch.where(known, total / torch.where(known, weight, 1.0), 0.0), known


def coherence(logits: Tensor, mask: Tensor, certainty: str = "normalised") -> Tensor:
    """(B,): 1 - H / ln C, with H the entropy at temperature 1, mean over valid steps, in [0, 1]; or
    -H in nats.
    """
    entropy = torch.special.entr(log_softmax(logits).exp()).sum(-1)
    mean = masked_mean(entropy, mask)
    if certainty == "nats":
        return -mean
    return (1 - mean / math.log(max(logits.shape[-1], 2))).clamp(0, 1)


def saliency(trajectory: Tensor, known: Tensor, certainty: Tensor, settings: Valence) -> Tensor:
    """(B,): s = mean * mean_t F_t + min * min_t F_t + coherence * C over the known steps; NaN with
    none.
    """
    count = known.sum(1)
    mean = torch.where(known, trajectory, 0.0).sum(1) / count.clamp(min=1)
    least = torch.where(known, trajectory, torch.inf).amin(1)
    score = settings.mean * mean + settings.min * least + settings.coherence * certainty
    return torch.where(count > 0, score, torch.nan)
