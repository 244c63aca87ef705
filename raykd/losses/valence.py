"""Valence: a signal per step in [-1, 1], its discounted future, and one saliency per sequence."""

import math

import torch
from torch import Tensor

from raykd.recipe.tables import Valence
from raykd.signals import log_softmax, masked_mean, zeroed
from raykd.targets import UNLABELLED


def prefix_confidence(logits: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """A valence for data that has none: v_t = 2 p(label | steps <= t) - 1, as (B, T).

    p is the softmax of the mean logits of steps 1..t, the decision rule of a causal classifier. It
    is NaN at invalid steps. A row without a label is judged by the class that the full sequence
    gives, so no hidden label leaks. With a label at every step, p is that step's own softmax.
    """
    if label.dim() == 2:
        target = label.clamp(min=0)
        known = mask & (label != UNLABELLED)
        log_p = log_softmax(logits).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return torch.where(known, 2 * log_p.exp() - 1, torch.nan)
    seen = mask.cumsum(1).clamp(min=1)
    prefix = zeroed(logits.float(), mask).cumsum(1) / seen.unsqueeze(-1)
    answer = prefix[:, -1].argmax(-1)
    target = torch.where(label == UNLABELLED, answer, label)
    log_p = log_softmax(prefix).gather(-1, target.view(-1, 1, 1).expand(*mask.shape, 1)).squeeze(-1)
    return torch.where(mask, 2 * log_p.exp() - 1, torch.nan)


def at_last_step(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T): values (B, 1) at each row's last valid step, NaN at the others.

    So an answer to a whole row becomes a valence: it is known when the row has been read.
    """
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(last, values, torch.nan)


def realised_future(
    valence: Tensor, mask: Tensor, discount: float, document: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The discounted mean of the valence from each step on, and where it is known, each (B, T).

        F_t = sum_k g^k v_{t+k} / sum_k g^k over the known steps from t on, with g = `discount`

    Use it as the target of a value head, and for a row's saliency. It is a normalised return, so F
    stays in [-1, 1]: g = 0 gives v itself, and g = 1 the mean of the remainder. Steps that are
    missing (NaN) or invalid enter neither sum. F is known where any later step is. In text the
    future ends with the `document` (B, T), such as `batch.document`.

    Example:
        >>> import torch
        >>> from raykd.losses import realised_future
        >>> valence = torch.tensor([[1.0, 0.0, -1.0]])
        >>> future, known = realised_future(valence, torch.ones(1, 3, dtype=torch.bool), 1.0)
        >>> future
        tensor([[ 0.0000, -0.5000, -1.0000]])
    """
    here = mask & torch.isfinite(valence)
    value = torch.where(here, valence, 0.0).float()
    carry: Tensor | float = 0.0
    backwards = []
    sum_and_weight = torch.stack([value, here.float()])  # (2, B, T)
    goes_on = None if document is None else (document[:, 1:] == document[:, :-1]).unbind(1)
    for place, step in reversed(list(enumerate(sum_and_weight.unbind(-1)))):
        if goes_on and backwards:
            carry = torch.where(goes_on[place], carry, 0.0)
        carry = step + discount * carry
        backwards.append(carry)
    total, weight = torch.stack(backwards[::-1], -1)
    known = mask & (weight > 0)
    return torch.where(known, total / torch.where(known, weight, 1.0), 0.0), known


def coherence(logits: Tensor, mask: Tensor, certainty: str = "normalised") -> Tensor:
    """How certain a model is: 1 - H / ln C in [0, 1], or -H in nats, as (B,).

    H is the entropy at temperature 1, mean over valid steps.
    """
    entropy = torch.special.entr(log_softmax(logits).exp()).sum(-1)
    mean = masked_mean(entropy, mask)
    if certainty == "nats":
        return -mean
    return (1 - mean / math.log(max(logits.shape[-1], 2))).clamp(0, 1)


def saliency(trajectory: Tensor, known: Tensor, certainty: Tensor, settings: Valence) -> Tensor:
    """How much is to be learnt from a row, as (B,); NaN for a row without a known step.

    s = mean * mean_t F_t + min * min_t F_t + coherence * C over the known steps.
    """
    count = known.sum(1)
    mean = torch.where(known, trajectory, 0.0).sum(1) / count.clamp(min=1)
    least = torch.where(known, trajectory, torch.inf).amin(1)
    score = settings.mean * mean + settings.min * least + settings.coherence * certainty
    return torch.where(count > 0, score, torch.nan)
