"""Speculative decoding: text of the teacher's law in fewer of its calls, one text at a time.

A drafter draws some tokens, and the teacher reads them all in one call (arXiv 2211.17192,
2302.01318). Let p be the teacher's probabilities at a position and q the drafter's. The drafted x
is accepted with probability min(1, p(x) / q(x)). The first rejected token is replaced by a draw
from max(0, p - q) / sum max(0, p - q), and the drafted tokens after it are dropped. If all are
accepted, the teacher's last row gives one token more. So each token follows p, whatever the drafter
is.

At temperature 0 both laws put everything on the likeliest token, and the text is that of
`generate`. The exception is where the teacher's two best logits are nearer than its own rounding:
reading many tokens in one call and reading them one by one differ in the last bits.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from raykd.errors import DataError, RecipeError
from raykd.generation.reader import Reader

# Why a text ended.
COUNT = "count"
EOS = "eos"
CONTEXT = "context"


@dataclass(frozen=True)
class Round:
    """One call of the teacher: a draft, how much of it was accepted, and the token added.

    The tested tokens are those up to the first rejection, and the rejected one.
    """

    drafted: tuple[int, ...]
    accepted: int
    tested: int
    token: int | None  # the correction, or the bonus after a whole draft; None: the text ended
    overlap: tuple[float, ...]  # sum min(p, q) at each tested token
    p: tuple[float, ...]  # the teacher's probability of each tested token
    q: tuple[float, ...]  # the drafter's

    @property
    def tokens(self) -> list[int]:
        """What the round adds to the text."""
        return [*self.drafted[: self.accepted], *([] if self.token is None else [self.token])]


@dataclass(frozen=True)
class WrittenText:
    """New tokens, why they ended, and the calls that they took."""

    tokens: list[int]
    ended: str  # "count", "eos", or "context": no room is left
    teacher_calls: int
    drafter_calls: int
    rounds: tuple[Round, ...]

    @property
    def acceptance(self) -> float:
        """The mean of sum min(p, q) = 1 - TV(p, q) over tested positions; nan if there are none.

        `accepted_share` is an estimate of it. Positions after a rejection are left out, and those
        where nothing was drafted.
        """
        overlaps = [value for done in self.rounds for value in done.overlap]
        return sum(overlaps) / len(overlaps) if overlaps else nan

    @property
    def accepted_share(self) -> float:
        """The share of the tested tokens that were accepted; nan if there are none."""
        tested = sum(done.tested for done in self.rounds)
        return sum(done.accepted for done in self.rounds) / tested if tested else nan

    @property
    def block_efficiency(self) -> float:
        """Tokens per call of the teacher; 1 without a drafter."""
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
    """Up to `count` tokens after the prompt, one per call: what `speculate` is measured against.

    The arguments are those of `speculate`.
    """
    _check(teacher, prompt, vocab, temperature)
    draws = random.Random(seed)
    text = list(prompt)
    last = min(len(text) + count, teacher.steps + 1)
    teacher.rollback(0)
    while len(text) < last and (len(text) == len(prompt) or text[-1] != eos):
        p = law(teacher.step(text[teacher.length :])[-1:], temperature, vocab)
        text.append(draw(p[0], draws.random()))
    tokens = text[len(prompt) :]
    return WrittenText(
        tokens=tokens,
        ended=_ended(tokens, count, eos),
        teacher_calls=len(tokens),
        drafter_calls=0,
        rounds=(),
    )


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
    """Up to `count` tokens after the prompt, by the law of `generate`, with `gamma` drafted a call.

    Both sides draw at `temperature` over the ids below `vocab`: by default all, and
    `vocabulary.shared_tokens` gives it for two tokenisers. The text ends after `eos`, or when it is
    one token longer than the teacher's context. Beyond the drafter's context it goes on without
    drafts. Whatever the readers have read before is forgotten.

    DataError for an empty prompt, one longer than the teacher's context, and ids or columns beyond
    `vocab`; RecipeError for gamma below 0.
    """
    _check(teacher, prompt, vocab, temperature)
    if gamma < 0:
        raise RecipeError(
            f"gamma is {gamma}; give how many tokens to draft for each call of the teacher, "
            "0 or more"
        )
    draws = random.Random(seed)
    text = list(prompt)
    rounds: list[Round] = []
    drafter_calls = 0
    last = min(len(text) + count, teacher.steps + 1)
    teacher.rollback(0)
    drafter.rollback(0)
    while len(text) < last and (not rounds or text[-1] != eos):
        # The call adds a token of its own, and the drafter does not read the last one.
        room = max(0, min(gamma, last - len(text) - 1, drafter.steps - len(text) + 1))
        drafted, q = draft(
            drafter, text, room, temperature=temperature, vocab=vocab, eos=eos, draws=draws
        )
        logits = teacher.step(text[teacher.length :] + drafted)[-len(drafted) - 1 :]
        done = judge(drafted, law(logits, temperature, vocab), q, eos=eos, draws=draws)
        text += done.tokens
        rounds.append(done)
        drafter_calls += len(drafted)
        for reader in (teacher, drafter):
            reader.rollback(min(reader.length, len(text) - 1))
    tokens = text[len(prompt) :]
    return WrittenText(
        tokens=tokens,
        ended=_ended(tokens, count, eos),
        teacher_calls=len(rounds),
        drafter_calls=drafter_calls,
        rounds=tuple(rounds),
    )


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

    The drafter first reads what it has not read yet: the last token, and the one before it after a
    draft that was accepted whole.
    """
    drafted: list[int] = []
    laws: list[Tensor] = []
    unread = list(text[drafter.length :])
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
    """Which of S drafted tokens are accepted.

    `p` (S + 1, V) are the teacher's laws, `q` the S laws (V,) that the tokens were drawn from.
    DataError if p and q are over different numbers of tokens.
    """
    count = len(drafted)
    if not count:
        return Round((), 0, 0, draw(p[0], draws.random()), (), (), ())
    if p.shape[-1] != q[0].shape[-1]:
        raise DataError(
            f"the teacher's logits are {p.shape[-1]} columns and the drafter's {q[0].shape[-1]}: "
            "give vocab=vocabulary.shared_tokens(teacher's table, drafter's table)"
        )
    laws = torch.stack(tuple(q)).to(p)
    ids = torch.tensor(drafted, device=p.device)[:, None]
    of_teacher = p[:count].gather(1, ids)[:, 0].tolist()
    of_drafter = laws.gather(1, ids)[:, 0].tolist()
    accepted = 0
    while accepted < count and draws.random() * of_drafter[accepted] < of_teacher[accepted]:
        accepted += 1
    tested = min(accepted + 1, count)
    overlap = torch.minimum(p[:tested], laws[:tested]).sum(1).tolist()
    if accepted < count:
        token = draw(residual(p[accepted], laws[accepted]), draws.random())
    else:
        token = None if drafted[-1] == eos else draw(p[count], draws.random())
    return Round(
        drafted=tuple(drafted),
        accepted=accepted,
        tested=tested,
        token=token,
        overlap=tuple(overlap),
        p=tuple(of_teacher[:tested]),
        q=tuple(of_drafter[:tested]),
    )


def law(logits: Tensor, temperature: float = 1.0, vocab: int | None = None) -> Tensor:
    """(S, V) logits -> (S, vocab) probabilities: softmax(logits / temperature).

    At temperature 0 the first of the largest has probability 1. Columns from `vocab` on count as
    -inf. DataError if there are fewer than `vocab`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if vocab is not None:
        if vocab > logits.shape[-1]:
            raise DataError(
                f"vocab is {vocab}, but the logits are {logits.shape[-1]} columns; "
                f"give {logits.shape[-1]}"
            )
        logits = logits[..., :vocab]
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    return (logits if temperature == 1 else logits / temperature).softmax(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q) / sum max(0, p - q), of (V,) each; p itself if nothing is left."""
    left = (p - q).clamp_(min=0)
    total = left.sum()
    return left / total if total > 0 else p


def draw(weights: Tensor, u: float) -> int:
    """The index where the running sum of weights (V,) passes u of their sum, u in [0, 1).

    One of weight 0 is never drawn. Probabilities are exact to the last bit of the sum, 6e-8 of it
    in float32. DataError for weights that are not finite or all 0.
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
    """The speed-up over plain decoding, if every position accepts alike.

    (1 - a^(g + 1)) / ((1 - a) (g c + v)), with c = `draft_cost` the time of the drafter's call for
    a token and v = `verify_cost` that of the teacher's for gamma + 1 tokens, both over the
    teacher's for one token (arXiv 2211.17192, theorem 3.8, which takes v = 1).
    """
    expected = sum(acceptance**i for i in range(gamma + 1))  # tokens per call of the teacher
    return expected / (gamma * draft_cost + verify_cost)


def _check(teacher: Reader, prompt: Sequence[int], vocab: int | None, temperature: float) -> None:
    if temperature < 0:
        raise RecipeError(f"temperature is {temperature}; give 0 for the likeliest token, or more")
    if not len(prompt):
        raise DataError("prompt: no token in it; give at least the one that texts start with")
    if len(prompt) > teacher.steps:
        raise DataError(
            f"prompt: {len(prompt)} tokens, but the teacher reads {teacher.steps} in all; "
            "give fewer"
        )
    if vocab is not None and not 0 <= min(prompt) <= max(prompt) < vocab:
        raise DataError(
            f"prompt: ids {min(prompt)} to {max(prompt)}, but vocab is {vocab}; give ids below it"
        )


def _ended(tokens: Sequence[int], count: int, eos: int | None) -> str:
    if tokens and tokens[-1] == eos:
        return EOS
    return COUNT if len(tokens) >= count else CONTEXT
