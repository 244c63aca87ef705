"""Drafts that a teacher verifies, as batches: one round of speculative sampling a row (Leviathan et
al. 2023).

A drafted token x is accepted with probability min(1, p(x) / q(x)); the first that is not is
corrected by a draw from (p - q)+, and those after it are discarded (arXiv 2211.17192, algorithm 1).
Here they are kept: they are what the student writes after its own mistakes.
"""

import torch
from torch import Tensor, nn

from raykd.generation.sampling import (
    DrawnText,
    LaterBatch,
    Teacher,
    after_prompt,
    inverse_cdf,
    log_probabilities,
    sample,
    score_text,
)
from raykd.signals import Batch, Rollout, Signals


def draft_rows(
    student: nn.Module,
    teacher: Teacher,
    prompt: Tensor,
    *,
    row_id: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    eos: int | None = None,
    vocab: int | None = None,
) -> LaterBatch:
    """Prompts (B, P, 2) with the n tokens that the student drafted after each, tested; T = P + n -
    1.

    `uniforms` (B, 2 n + 1) fp64 in [0, 1) draw the tokens, test them, and draw the correction. A
    draft ends with `eos`. It is drawn now, and tested when the batch is asked for.
    """
    count = uniforms.shape[1] // 2
    how = {"temperature": temperature, "eos": eos, "vocab": vocab}
    drawn = sample(student, prompt, uniforms=uniforms[:, :count], keep=True, **how)
    scoring, first = score_text(teacher, prompt, drawn, vocab), prompt.shape[1] - 1

    def batch() -> Batch:
        inputs, label, answer = scoring()
        log_p = log_probabilities(answer[:, first:], answer.shape[-1], temperature)
        fields = verify(drawn, log_p, uniforms[:, count:].to(log_p.device))
        log_q, mask = (
            after_prompt(prompt, drawn.log_q.float(), 0.0),
            after_prompt(prompt, drawn.mask, False),
        )
        found = {name: after_prompt(prompt, value, 0) for name, value in fields.items()}
        rollout = Rollout(log_q, torch.ones_like(log_q), 0, temperature, **found)
        return Batch(row_id, inputs, mask, label, teacher=Signals(answer, mask), rollout=rollout)

    return batch


def verify(drawn: DrawnText, log_p: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
    """A Rollout's fields of a draft (B, n), given the teacher's log probabilities (B, n, V) and
    uniforms (B, n + 1).

    Where p = q there is nothing to reject; should rounding do so, the correction is drawn from p.
    """
    assert drawn.student is not None
    token = drawn.inputs[..., 0].long()
    ratio = (log_p.gather(-1, token[..., None])[..., 0] - drawn.log_q).exp()
    passed = (uniforms[:, :-1] < ratio) | ~drawn.mask
    until = passed.long().cumprod(1) > 0  # all tests up to this one
    before = torch.cat([torch.ones_like(until[:, :1]), until[:, :-1]], 1)
    rejected, after = drawn.mask & before & ~until, drawn.mask & ~before
    row, at = torch.arange(len(token), device=token.device), rejected.long().argmax(1)
    p, q = log_p[row, at].exp(), drawn.student[row, at].exp()
    residual = (p - q).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    correction = torch.where(rejected, inverse_cdf(residual, uniforms[:, -1])[:, None], 0)
    accepted = drawn.mask & until
    return {
        "accepted": accepted,
        "rejected": rejected,
        "correction": correction,
        "tail": after.cumsum(1) * after,
    }
