"""Drafts that a teacher verifies, as batches: one round of speculative sampling a row.

A drafted token x is accepted with probability min(1, p(x) / q(x)). The first rejected token is
corrected by a draw from (p - q)+ (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).
Speculative decoding discards the tokens after it. Here they are kept: they are what the student
writes after its own mistakes.
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
from raykd.signals import Batch, Rollout


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
    """Prompts (B, P, 2) with the n tokens that the student drafted after each; T = P + n - 1.

    `uniforms` (B, 2 n + 1) fp64 in [0, 1) draw the tokens, test them, and draw the correction. A
    draft ends with `eos`. It is drawn now, and verified when the batch is asked for.
    """
    count = uniforms.shape[1] // 2
    drawn = sample(
        student,
        prompt,
        uniforms=uniforms[:, :count],
        temperature=temperature,
        eos=eos,
        vocab=vocab,
        keep=True,
    )
    scoring = score_text(teacher, prompt, drawn, vocab)
    first = prompt.shape[1] - 1  # the position about the first drafted token

    def batch() -> Batch:
        inputs, label, said = scoring()
        log_p = log_probabilities(said.logits[:, first:], said.columns, temperature)
        verified = verify(drawn, log_p, uniforms[:, count:].to(log_p.device))
        log_q = after_prompt(prompt, drawn.log_q.float(), 0.0)
        mask = after_prompt(prompt, drawn.mask, False)
        rollout = Rollout(
            log_q=log_q,
            weight=torch.ones_like(log_q),
            lag=0,
            temperature=temperature,
            **{name: after_prompt(prompt, value, 0) for name, value in verified.items()},
        )
        return Batch(row_id, inputs, mask, label, teacher=said.changed(mask=mask), rollout=rollout)

    return batch


def verify(drawn: DrawnText, log_p: Tensor, uniforms: Tensor) -> dict[str, Tensor]:
    """A Rollout's fields of drafts (B, n): accepted, rejected, correction, tail.

    `log_p` (B, n, V) are the teacher's log probabilities, `uniforms` (B, n + 1). Where p = q
    nothing is rejected. Should rounding reject there, the correction is drawn from p.
    """
    assert drawn.student is not None
    token = drawn.inputs[..., 0].long()
    ratio = (log_p.gather(-1, token[..., None])[..., 0] - drawn.log_q).exp()
    passed = (uniforms[:, :-1] < ratio) | ~drawn.mask
    until = passed.long().cumprod(1) > 0  # all tests up to this one
    before = torch.cat([torch.ones_like(until[:, :1]), until[:, :-1]], 1)
    rejected = drawn.mask & before & ~until
    after = drawn.mask & ~before
    row = torch.arange(len(token), device=token.device)
    at = rejected.long().argmax(1)
    p = log_p[row, at].exp()
    q = drawn.student[row, at].exp()
    residual = (p - q).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    correction = torch.where(rejected, inverse_cdf(residual, uniforms[:, -1])[:, None], 0)
    return {
        "accepted": drawn.mask & until,
        "rejected": rejected,
        "correction": correction,
        "tail": after.cumsum(1) * after,
    }
