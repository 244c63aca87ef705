"""Speculative decoding: text of the teacher's law in fewer of its calls (arXiv 2211.17192,
2302.01318), one at a time.

A drafter draws some tokens, and the teacher reads them all in one call. With p the teacher's
probabilities at a position and q the drafter's, the drafted x stays with probability min(1, p(x) /
q(x)). The first that does not is replaced by a draw from max(0, p - q) / sum max(0, p - q), and
what was drafted behind it is dropped; if all stay, the teacher's last row gives one token more. So
each token is kept or made with probability p, whatever the drafter is.

At temperature 0 both laws are one on the likeliest token. The text is then the one of `generate`,
but where the teacher's two best logits are nearer than its own rounding: many tokens in one call
and one by one differ in last bits.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from raykd.errors import DataError, RecipeError
from raykd.generation.reader import Reader

COUNT, EOS, CONTEXT = "count", "eos", "context"  # why a text ended


@dataclass(frozen=True)
class Round:
    """One call of the teacher: what was drafted, how much of it stayed, and the token that the
    teacher added.

    Tested are the drafted tokens up to the first that did not stay, and that one; `overlap` (sum
    min(p, q)), `p` and `q` (of the drafted token) are theirs. `token` is the correction, or the
    bonus where all stayed; None where the draft ended the text.
    """

    drafted: tuple[int, ...]
    accepted: int
    tested: int
    token: int | None
    overlap: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]

    @property
    def tokens(self) -> list[int]:
        """What the round adds to the text."""
        return [*self.drafted[: self.accepted], *([] if self.token is None else [self.token])]


@dataclass(frozen=True)
class WrittenText:
    """New tokens, why they ended ("count", "eos", or "context": no room is left), and what they
    took.
    """

    tokens: list[int]
    ended: str
    teacher_calls: int
    drafter_calls: int
    rounds: tuple[Round, ...]

    @property
    def acceptance(self) -> float:
        """The mean of sum min(p, q) = 1 - TV(p, q) over tested positions: what `accepted_share`
        estimates.

        Positions behind the first rejection are not in it, nor any where nothing was drafted; nan
        without a test.
        """
        found = [value for done in self.rounds for value in done.overlap]
        return sum(found) / len(found) if found else nan

    @property
    def accepted_share(self) -> float:
        """How many of the tested tokens stayed; nan without a test."""
        tested = sum(done.tested for done in self.rounds)
        return sum(done.accepted for done in self.rounds) / tested if tested else nan

    @property
    def block_efficiency(self) -> float:
        """Tokens a call of the teacher; 1 without a drafter."""
        return len(self.tokens) / self.teacher_calls if self.teacher_calls else nan


@torch.inference_mode()
def generate(
    teacher: Reader,
    prompt: Sequence[int],
    count: int,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    eos: int | None = None,
    seed: int = 0,
) -> WrittenText:
    """Up to `count` tokens after the prompt, one a call: what `speculate` is measured against.

    Arguments as there.
    """
    _check(teacher, prompt, vocab, temperature)
    draws, text = random.Random(seed), list(prompt)
    last = min(len(text) + count, teacher.steps + 1)
    teacher.rollback(0)
    while len(text) < last and (len(text) == len(prompt) or text[-1] != eos):
        p = law(teacher.step(text[teacher.length :])[-1:], temperature, vocab)
        text.append(draw(p[0], draws.random()))
    tokens = text[len(prompt) :]
    return WrittenText(tokens, _ended(tokens, count, eos), len(tokens), 0, ())


@torch.inference_mode()
def speculate(
    teacher: Reader,
    drafter: Reader,
    prompt: Sequence[int],
    count: int,
    *,
    gamma: int = 4,
    temperature: float = 1.0,
    vocab: int | None = None,
    eos: int | None = None,
    seed: int = 0,
) -> WrittenText:
    """Up to `count` tokens after the prompt, of the law of `generate`, with at most `gamma` drafted
    for each call.

    Both sides draw at `temperature` over the ids below `vocab` (default: all;
    `vocabulary.shared_tokens` tells it), and the text ends behind `eos`. It ends, too, when it is
    one token longer than the teacher's context; beyond the drafter's it goes on without drafts.
    What the readers have read before is forgotten. DataError for an empty prompt, one longer than
    the teacher's context, ids or columns beyond `vocab`; RecipeError for gamma below 0.
    """
    _check(teacher, prompt, vocab, temperature)
    if gamma < 0:
        raise RecipeError(
            f"gamma is {gamma}; give how many tokens to draft for each call of the teacher, 0 or more"
        )
    draws, text, rounds, drafts = random.Random(seed), list(prompt), [], 0
    last = min(len(text) + count, teacher.steps + 1)
    teacher.rollback(0)
    drafter.rollback(0)
    while len(text) < last and (not rounds or text[-1] != eos):
        # the call adds a token of its own, and the drafter does not read its last one
        room = max(0, min(gamma, last - len(text) - 1, drafter.steps - len(text) + 1))
        drafted, q = draft(
            drafter, text, room, temperature=temperature, vocab=vocab, eos=eos, draws=draws
        )
        said = teacher.step(text[teacher.length :] + drafted)[-len(drafted) - 1 :]
        done = judge(drafted, law(said, temperature, vocab), q, eos=eos, draws=draws)
        text += done.tokens
        rounds.append(done)
        drafts += len(drafted)
        for reader in (teacher, drafter):
            reader.rollback(min(reader.length, len(text) - 1))
    tokens = text[len(prompt) :]
    return WrittenText(tokens, _ended(tokens, count, eos), len(rounds), drafts, tuple(rounds))


def draft(
    drafter: Reader,
    text: Sequence[int],
    count: int,
    *,
    temperature: float,
    vocab: int | None,
    eos: int | None,
    draws: random.Random,
) -> tuple[list[int], list[Tensor]]:
    """`count` tokens after the text, fewer if one is `eos`, and the law (V,) each was drawn from.

    The drafter first reads what it has not: the last token, and the one before it where all of a
    draft had stayed.
    """
    drafted, laws, unread = [], [], list(text[drafter.length :])
    while len(drafted) < count and eos not in drafted[-1:]:
        laws.append(law(drafter.step(unread)[-1:], temperature, vocab)[0])
        unread = [draw(laws[-1], draws.random())]
        drafted += unread
    return drafted, laws


def judge(
    drafted: Sequence[int],
    p: Tensor,
    q: Sequence[Tensor],
    *,
    eos: int | None = None,
    draws: random.Random,
) -> Round:
    """Which of S drafted tokens stay, by the teacher's laws p (S + 1, V) and the S laws q (V,) they
    were drawn from.

    DataError where p and q are over other numbers of tokens.
    """
    count, accepted = len(drafted), 0
    if not count:
        return Round((), 0, 0, draw(p[0], draws.random()), (), (), ())
    if p.shape[-1] != q[0].shape[-1]:
        raise DataError(
            f"the teacher's logits are {p.shape[-1]} columns and the drafter's {q[0].shape[-1]}: give "
            "vocab=vocabulary.shared_tokens(teacher's table, drafter's table)"
        )
    laws, ids = torch.stack(tuple(q)).to(p), torch.tensor(drafted, device=p.device)[:, None]
    ours, theirs = p[:count].gather(1, ids)[:, 0].tolist(), laws.gather(1, ids)[:, 0].tolist()
    while accepted < count and draws.random() * theirs[accepted] < ours[accepted]:
        accepted += 1
    tested = min(accepted + 1, count)
    overlap = torch.minimum(p[:tested], laws[:tested]).sum(1).tolist()
    if accepted < count:
        token = draw(residual(p[accepted], laws[accepted]), draws.random())
    else:
        token = None if drafted[-1] == eos else draw(p[count], draws.random())
    return Round(
        tuple(drafted),
        accepted,
        tested,
        token,
        tuple(overlap),
        tuple(ours[:tested]),
        tuple(theirs[:tested]),
    )


def law(logits: Tensor, temperature: float = 1.0, vocab: int | None = None) -> Tensor:
    """(S, V) logits -> (S, vocab) probabilities: softmax(logits / temperature), at 0 one for the
    first of the largest.

    Columns from `vocab` on count as -inf. DataError if there are fewer than `vocab`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if vocab is not None:
        if vocab > logits.shape[-1]:
            raise DataError(
                f"vocab is {vocab}, but the logits are {logits.shape[-1]} columns; give {logits.shape[-1]}"
            )
        logits = logits[..., :vocab]
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    return (logits if temperature == 1 else logits / temperature).softmax(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q) / sum max(0, p - q), of (V,) each; p itself where nothing is left."""
    left = (p - q).clamp_(min=0)
    total = left.sum()
    return left / total if total > 0 else p


def draw(weights: Tensor, u: float) -> int:
    """The index where the running sum of (V,) weights passes u of their sum, u in [0, 1); never one
    of weight 0.

    Probabilities are kept to the last bit of that sum, 6e-8 of it in float32. DataError for weights
    that are not finite or all 0.
    """
    sums = weights.cumsum(0)
    total = sums[-1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u times the sum may round up to it
    index = int(torch.searchsorted(sums, torch.minimum(total * u, below), right=True))
    if index == len(weights):
        raise DataError(
            "probabilities: they are not finite or all 0; check the model's weights for nan"
        )
    return index


def predicted_speedup(
    acceptance: float, gamma: int, draft_cost: float, verify_cost: float
) -> float:
    """The speed-up over plain decoding: (1 - a^(g + 1)) / ((1 - a) (g c + v)), if every position
    accepts alike.

    `draft_cost` is the drafter's call for a token, `verify_cost` the teacher's for gamma + 1
    tokens, both over the teacher's for one (arXiv 2211.17192, theorem 3.8, which takes v = 1).
    """
    return sum(acceptance**i for i in range(gamma + 1)) / (gamma * draft_cost + verify_cost)


def _check(teacher: Reader, prompt: Sequence[int], vocab: int | None, temperature: float) -> None:
    if temperature < 0:
        raise RecipeError(f"temperature is {temperature}; give 0 for the likeliest token, or more")
    if not len(prompt):
        raise DataError("prompt: no token in it; give at least the one that texts start with")
    if len(prompt) > teacher.steps:
        raise DataError(
            f"prompt: {len(prompt)} tokens, but the teacher reads {teacher.steps} in all; give fewer"
        )
    if vocab is not None and not 0 <= min(prompt) <= max(prompt) < vocab:
        raise DataError(
            f"prompt: ids {min(prompt)} to {max(prompt)}, but vocab is {vocab}; give ids below it"
        )


def _ended(tokens: Sequence[int], count: int, eos: int | None) -> str:
    if tokens and tokens[-1] == eos:
        return EOS
    return COUNT if len(tokens) >= count else CONTEXT
