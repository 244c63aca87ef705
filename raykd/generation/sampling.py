"""Text that the student writes while it trains, as batches: drawn token by token, scored by the
teacher in one pass.

A token is drawn by inverting the cumulative distribution, in float64, at a uniform that is given.
So a global batch whose uniforms are drawn at once comes out alike however its rows are shared out,
but for a token whose uniform lies within the rounding of the model's float32 logits of an edge.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from raykd.errors import DataError, RecipeError
from raykd.losses.fused import shared_vocab
from raykd.signals import Batch, Rollout, Signals

LaterBatch = Callable[[], Batch]
_Read = Callable[
    [Tensor], Tensor
]  # (B, n, 2), which follow all that was read before -> logits (B, n, V)


class Teacher(Protocol):
    """Whoever scores a text: rows (B, T, 2) of tokens and their places -> logits (B, T, V) of the
    tokens after them.

    They are asked for at once, and given when what `ask` gives is called: a teacher elsewhere works
    in between.
    """

    def ask(self, inputs: Tensor) -> Callable[[], Tensor]: ...


@dataclass(frozen=True)
class FrozenTeacher:
    """A teacher in this process: any module from tokens to logits, at rest."""

    module: nn.Module

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        with _at_rest(self.module):
            return self.module(inputs)["logits"]

    def ask(self, inputs: Tensor) -> Callable[[], Tensor]:
        answer = self.logits(inputs)
        return lambda: answer


class TeacherMix(NamedTuple):
    """Teacher-mixed sampling: tokens come from share p + (1 - share) q."""

    share: float
    teacher: Teacher


@dataclass(frozen=True)
class DrawnText:
    """What followed B prompts, n tokens each, of `vocab` that could be drawn."""

    inputs: Tensor  # (B, n, 2) integers, as rows of text are; what stands after the end of a text is no token of it
    mask: Tensor  # (B, n) bool: up to the end-of-text token, which counts
    log_q: Tensor  # (B, n) fp64: the student's, at the temperature
    weight: Tensor  # (B, n) fp64: q over what was drawn from
    vocab: int
    student: Tensor | None = (
        None  # (B, n, vocab) fp64: all its log probabilities, where they were to be kept
    )


@torch.no_grad()
def sample(
    student: nn.Module,
    prompt: Tensor,
    *,
    uniforms: Tensor,
    temperature: float = 1.0,
    eos: int | None = None,
    vocab: int | None = None,
    mixed: TeacherMix | None = None,
    keep: bool = False,
) -> DrawnText:
    """Continue prompts (B, P, 2) by as many tokens as there are uniforms (B, n) fp64 in [0, 1).

    The student is read through its cache as it stands, rounded where it is rounded, without
    dropout; its modes are as before afterwards. `vocab` real columns, where heads are padded.
    Without `eos` every row takes all n tokens. DataError where prompt and tokens are more than the
    student was built for; RecipeError for one without a cache.
    """
    (rows, count), places = (
        uniforms.shape,
        prompt[:, -1:, 1] + 1 + _steps(prompt, uniforms.shape[1]),
    )
    inputs = torch.stack([torch.full_like(places, eos or 0), places], -1)
    mask, going = (
        torch.zeros_like(places, dtype=torch.bool),
        places.new_ones(rows, dtype=torch.bool),
    )
    log_q, weight, kept = (
        torch.zeros_like(mask, dtype=torch.double),
        torch.ones_like(mask, dtype=torch.double),
        [],
    )
    with _at_rest(student):
        read, ask = (
            _reader(student, prompt, count),
            _asker(mixed.teacher, prompt, count) if mixed else None,
        )
        for t in range(count):
            new = inputs[:, t - 1 : t] if t else prompt
            z, y = read(new)[:, -1], ask(new)[:, -1] if ask else None
            vocab = shared_vocab((z if y is None else y).shape[-1], z.shape[-1], vocab)
            q = log_probabilities(z, vocab, temperature)
            policy = (
                q
                if y is None or mixed is None
                else _mixture(log_probabilities(y, vocab, temperature), q, mixed)
            )
            token = torch.where(
                going, inverse_cdf(policy.exp(), uniforms[:, t].to(q.device)), inputs[:, t, 0]
            )
            inputs[:, t, 0], mask[:, t] = token, going
            log_q[:, t] = q.gather(1, token[:, None])[:, 0]
            weight[:, t] = (log_q[:, t] - policy.gather(1, token[:, None])[:, 0]).exp()
            kept += [q] if keep else []
            going = going if eos is None else going & (token != eos)
    assert vocab is not None, "nothing was to be drawn"
    return DrawnText(inputs, mask, log_q, weight, vocab, torch.stack(kept, 1) if keep else None)


def on_policy(
    student: nn.Module,
    teacher: Teacher,
    prompt: Tensor,
    *,
    row_id: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    eos: int | None = None,
    vocab: int | None = None,
    mixed: float = 0.0,
) -> LaterBatch:
    """Prompts (B, P, 2) with what the student wrote after them, n tokens as in `sample`, T = P + n
    - 1.

    `mixed` is the teacher's share of the sampling. The text is drawn now, and scored when the batch
    is asked for.
    """
    how = {"temperature": temperature, "eos": eos, "vocab": vocab}
    drawn = sample(
        student,
        prompt,
        uniforms=uniforms,
        mixed=TeacherMix(mixed, teacher) if mixed else None,
        **how,
    )
    scoring = score_text(teacher, prompt, drawn, vocab)
    log_q, weight = (
        after_prompt(prompt, x.float(), fill)
        for x, fill in ((drawn.log_q, 0.0), (drawn.weight, 1.0))
    )
    mask = after_prompt(prompt, drawn.mask, False)

    def batch() -> Batch:
        inputs, label, answer = scoring()
        rollout = Rollout(log_q, weight, 0, temperature)
        return Batch(row_id, inputs, mask, label, teacher=Signals(answer, mask), rollout=rollout)

    return batch


def score_text(
    teacher: Teacher, prompt: Tensor, drawn: DrawnText, vocab: int | None
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """(inputs (B, T, 2), the token after each (B, T), the teacher's logits (B, T, vocab)), in one
    pass of the teacher.

    It is begun now. Position j - 1 is about token j: the first token that was drawn is told at the
    prompt's last position.
    """
    text = torch.cat([prompt, drawn.inputs], 1)
    answer = teacher.ask(text[:, :-1])

    def given() -> tuple[Tensor, Tensor, Tensor]:
        logits = answer()
        real = shared_vocab(logits.shape[-1], drawn.vocab, vocab)
        return text[:, :-1], text[:, 1:, 0].long(), logits[..., :real]

    return given


def after_prompt(prompt: Tensor, values: Tensor, fill: Any) -> Tensor:
    """(B, T): what belongs to drawn tokens (B, n), at the positions that are about them; `fill`
    within the prompt.
    """
    return torch.cat([values.new_full((len(values), prompt.shape[1] - 1), fill), values], 1)


def cut_prompts(inputs: Tensor, mask: Tensor, cut: int, most: int) -> Tensor:
    """(B, P, 2): the tokens that rows of text (B, T, 2) are continued from; fewer have places of 0
    on their left.

    A row that begins with a prompt, whose first step `mask` (B, T) does not tell, is continued from
    its own; any other from its first `cut` tokens. A row reaches to its last position in the mask,
    and of a prompt the last `most` tokens are kept. A place of 0 starts a document, so that nothing
    to its left is read.
    """
    length = torch.where(mask, _steps(inputs, mask.shape[1]) + 1, 0).amax(1)
    asked = (
        torch.where(mask[:, 0], cut, mask.int().argmax(1) + 1).minimum(length).clamp(min=1)[:, None]
    )
    kept = asked.clamp(max=most)
    at = _steps(inputs, int(kept.max())) - (kept.max() - asked)
    found = inputs.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, 2))
    found[..., 1] = torch.where(at >= asked - kept, found[..., 1] - (asked - kept), 0)
    return found


def log_probabilities(logits: Tensor, vocab: int, temperature: float) -> Tensor:
    """(..., vocab) fp64: log softmax of logits / temperature over the real columns."""
    return (logits[..., :vocab].double() / temperature).log_softmax(-1)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B,) int64: the first class where the cumulative distribution (B, V) fp64 is above uniforms
    (B,) in [0, 1).

    One of probability 0 is never drawn; the probabilities need not sum to 1.
    """
    cumulative = probabilities.cumsum(-1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, mixed: TeacherMix) -> Tensor:
    """log(share p + (1 - share) q)."""
    share = log_q.new_tensor(mixed.share)
    return torch.logaddexp(log_p + share.log(), log_q + (-share).log1p())


def _reader(module: Any, prompt: Tensor, count: int) -> _Read:
    """A module read through a cache of its own."""
    if not hasattr(module, "cache"):
        raise RecipeError(
            f"source: {type(module).__name__} keeps no cache of keys and values, and so can not write; "
            'use student.model = "llama"'
        )
    need, room = prompt.shape[1] + count - 1, getattr(module, "settings", {}).get("steps")
    if room is not None and need > room:
        raise DataError(
            f"source: {prompt.shape[1]} tokens of prompt and {count} new ones make {need} positions, but the model "
            f"was built for {room}; lower source.length, or raise its steps"
        )
    with torch.device(prompt.device):
        cache = module.cache(len(prompt))
    return lambda inputs: module(inputs, cache)["logits"]


def _asker(teacher: Teacher, prompt: Tensor, count: int) -> _Read:
    """A teacher read token by token: through a cache where it has one here, else all again each
    time.
    """
    if isinstance(teacher, FrozenTeacher) and hasattr(teacher.module, "cache"):
        read = _reader(teacher.module, prompt, count)

        def ask(inputs: Tensor) -> Tensor:
            with _at_rest(teacher.module):
                return read(inputs)

        return ask
    held: list[Tensor] = []

    def ask_again(inputs: Tensor) -> Tensor:
        held.append(inputs)
        return teacher.ask(torch.cat(held, 1))()

    return ask_again


def _steps(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Evaluation, and every submodule in its own mode again afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
