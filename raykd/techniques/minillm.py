"""Reverse KL over whole texts, by policy gradient (MiniLLM, Gu et al. 2024, arXiv 2306.08543).

min KL(q || p) over what the student writes, besides the data: L = KL_t + PG_t on its own rows, and
on the data's (1 - k) CE + k KL(p || q), with k = 0.5. With r_t = log p(y_t) - log q(y_t) (sections
2.2 and 2.3):

    grad = E[sum_t grad KL(q_t || p_t)] - E[sum_t R_{t+1} grad log q(y_t)],
    R_{t+1} = sum_{i > t} r_i

A part of the text may be drawn from 0.2 p + 0.8 q, which helps a weak student. The student should
have learnt the data first: start from its weights.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from raykd.losses import (
    TermValues,
    at_steps,
    drawn_tokens,
    returns_to_go,
    running_products,
    term,
    unflatten_valid,
    whitened,
)
from raykd.signals import Batch, Signals

RECIPE = {
    "source": {"kind": "on_policy", "share": 0.5, "mixed": 0.2, "passes": 4},
    "terms": {
        "ce": {"weight": 0.5},
        "kd": {"weight": 0.5, "temperature": 1.0},
        "minillm": {"weight": 1.0},
    },
}


def _whitens(settings: Mapping[str, Any]) -> bool:
    """Whether an advantage is held against those of the other rows."""
    return settings["whiten"]


@term(own=True, whole_batch=_whitens, counts=at_steps)
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
    """KL(q_t || p_t) + max(-A s, -A clip(s, 1 - clip, 1 + clip)) at every written token.

    s = w q_t(y_t) / q_old(y_t), and A = sum_{i > t} discount^{i - t} r_i with the reward
    r = log p - log q_old within +-reward_clip.

    discount                the factor of A from each later reward to the next
    reward_clip             the largest |r|
    normalise               divides A by the number of rewards in it
    whiten                  takes A less its mean and over its deviation, of all written tokens of
                            the global batch
    include_current_reward  begins A at i = t, as in the reference code, which counts the first
                            part twice
    clip                    how far from 1 s counts; 1e9 is no limit
    weights                 those of teacher-mixed text: "token" has
                            w = q / (share p + (1 - share) q) of the token alone, as in the paper,
                            which is biased in proportion to the share; "prefix" has the products
                            over all tokens up to each reward, which are exact and may vanish or
                            grow

    Unlike the paper's, the first part is not weighted by w_t, which averages to 1 there.
    """
    rollout = batch.rollout
    mask = batch.mask
    assert rollout is not None
    drawn = drawn_tokens(student, batch, batch.label[mask], rollout.temperature)
    log_q_now = unflatten_valid(drawn.log_q, mask)
    log_p_of_token = unflatten_valid(drawn.log_p, mask)
    log_q_then = torch.where(mask, rollout.log_q, 0.0)
    weight = torch.where(mask, rollout.weight, 1.0)
    reward = (log_p_of_token - log_q_then).clamp(-reward_clip, reward_clip)
    before = torch.ones_like(weight)
    if weights == "prefix":
        before, through = running_products(weight, mask)
        reward = reward * through
        weight = before.new_ones(())
    advantage = returns_to_go(reward, mask, discount=discount, current=include_current_reward)
    if normalise:
        ones = mask.to(reward.dtype)
        count = returns_to_go(ones, mask, current=include_current_reward)
        advantage = advantage / count.clamp(min=1)
    if whiten:
        advantage = whitened(advantage, mask)
    ratio = weight * (log_q_now - log_q_then).exp()
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    single_step = unflatten_valid(drawn.reverse, mask)
    return TermValues(single_step * before + policy, mask)
