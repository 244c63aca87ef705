"""Reverse KL over whole texts, by policy gradient (MiniLLM, Gu et al. 2024, arXiv 2306.08543).

min KL(q || p) over what the student writes, besides the data: L = KL_t + PG_t on its own rows, and
on the data's (1 - k) CE + k KL(p || q), k = 0.5. With r_t = log p(y_t) - log q(y_t) (sections 2.2
and 2.3):

    grad = E[sum_t grad KL(q_t || p_t)] - E[sum_t R_{t+1} grad log q(y_t)],    R_{t+1} = sum_{i > t}
    r_i

A part of the text may be drawn from 0.2 p + 0.8 q, which keeps a weak student on its feet. The
student should have learnt the data first: start from its weights.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from raykd.losses.divergences import both_log_probs, divergence, token_log_probs, unflatten_valid
from raykd.losses.returns import returns_to_go, running_products, whitened
from raykd.losses.terms import TermValues, term
from raykd.signals import Batch, Signals

RECIPE = {
    "source": {"kind": "on_policy", "share": 0.5, "mixed": 0.2, "passes": 4},
    "terms": {
        "ce": {"weight": 0.5},
        "kd": {"weight": 0.5, "temperature": 1.0},
        "minillm": {"weight": 1.0},
    },
}


@term(own=True)
def minillm(
    student: Signals,
    batch: Batch,
    *,
    discount: Annotated[float, Field(ge=0, le=1)] = 0.95,
    normalise: bool = True,
    whiten: bool = False,
    include_current_reward: bool = False,
    reward_clip: Annotated[float, Field(gt=0)] = 100.0,
    clip: Annotated[float, Field(gt=0)] = 0.2,
    weights: Literal["token", "prefix"] = "token",
) -> TermValues:
    """KL(q_t || p_t) + max(-A s, -A clip(s, 1 - clip, 1 + clip)), s = w q_t(y_t) / q_old(y_t), at
    every written token.

    A = sum_{i > t} discount^{i - t} r_i, r = log p - log q_old within +-reward_clip, over the
    number of these i where `normalise`; less the mean and over the deviation of all written tokens
    of the global batch where `whiten`. With `include_current_reward` A begins at i = t, as in the
    reference code: that counts the first part twice. A clip of 1e9 is none. `weights` of
    teacher-mixed text: "token" has w = q / (share p + (1 - share) q) of the token alone, as in the
    paper, which is biased in proportion to the share; "prefix" the products over all tokens up to
    each reward, which are exact and may vanish or grow. Unlike the paper's, the first part is not
    weighted by w_t, which averages to 1 there.
    """
    rollout = batch.rollout
    mask = batch.mask
    assert rollout is not None
    log_q, log_p = both_log_probs(student, batch, rollout.temperature)
    now, theirs = (
        unflatten_valid(token_log_probs(log, batch.label[mask]), mask) for log in (log_q, log_p)
    )
    then, weight = (
        torch.where(mask, known, fill)
        for known, fill in ((rollout.log_q, 0.0), (rollout.weight, 1.0))
    )
    reward = (theirs - then).clamp(-reward_clip, reward_clip)
    before = torch.ones_like(weight)
    if weights == "prefix":
        before, until = running_products(weight, mask)
        reward = reward * until
        weight = before.new_ones(())
    advantage = returns_to_go(reward, mask, discount=discount, current=include_current_reward)
    if normalise:
        advantage = advantage / returns_to_go(
            mask.to(reward.dtype), mask, current=include_current_reward
        ).clamp(min=1)
    if whiten:
        advantage = whitened(advantage, mask)
    ratio = weight * (now - then).exp()
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return TermValues(
        unflatten_valid(divergence(log_q, log_p, "reverse"), mask) * before + policy, mask
    )
