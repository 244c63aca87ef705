"""Text that the student writes while it trains: sampled token by token, scored in one teacher pass.

A token is drawn by inverting the cumulative distribution, in float64, at a given uniform number. A
global batch draws its uniforms at once, so it comes out alike however its rows are shared among
workers. The exception is a uniform so near an edge of the distribution that the rounding of float32
logits decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from raykd.errors import DataError, RecipeError
from raykd.losses.fused import shared_vocab
from raykd.models.adapter import Adapter, at_rest
from raykd.signals import Batch, Rollout, Signals

LaterBatch = Callable[[], Batch]
# Tokens (B, n, 2) that follow all that was read before -> logits (B, n, V).
_Read = Callable[[Tensor], Tensor]


class Teacher(Protocol):
    """What scores a text: a module in this process, or a server elsewhere."""

    def ask(self, inputs: Tensor) -> Callable[[], Signals]:
        """Start scoring rows (B, T, 2) of tokens and their places.

        Calling the result waits for what it says of the token after each, at every step. A teacher
        elsewhere works in between.
        """
        ...


class FrozenTeacher:
    """A teacher in this process: any module from tokens to logits, in evaluation mode.

    A large head is left to the losses, which walk it.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.adapter = Adapter(module)
        self.is_known = not self.adapter.heads()  # whether its head has been looked for

    @torch.no_grad()
    def signals(self, inputs: Tensor) -> Signals:
        """What it says of rows (B, T, 2), logits in fp32 at least."""
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        with at_rest(self.module):
            if not self.is_known:
                self.adapter.find_head(inputs[:1], mask[:1])
                self.is_known = True
            said = self.adapter(inputs, mask)
        if said.headed is not None:
            return Signals.of_head(said.headed.detached(), mask)
        logits = said.logits
        return Signals(logits.to(torch.promote_types(logits.dtype, torch.float32)), mask)

    def ask(self, inputs: Tensor) -> Callable[[], Signals]:
        answer = self.signals(inputs)
        return lambda: answer


class TeacherMix(NamedTuple):
    """Teacher-mixed sampling: tokens come from share p + (1 - share) q."""

    share: float
    teacher: Teacher


@dataclass(frozen=True)
class DrawnText:
    """What followed B prompts: n tokens each, drawn from `vocab` of them.

    Entries after the end-of-text token are padding.
    """

    inputs: Tensor  # (B, n, 2) integers, as rows of text are
    mask: Tensor  # (B, n) bool: up to the end-of-text token, which counts
    log_q: Tensor  # (B, n) fp64: the student's, at the temperature
    weight: Tensor  # (B, n) fp64: q over what was drawn from
    vocab: int
    student: Tensor | None = None  # (B, n, vocab) fp64: all its log probabilities, if kept


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

    The student is read through its cache, without dropout, rounded where its layers are. Its modes
    are restored afterwards. `vocab` is the number of real columns, where heads are padded. Without
    `eos` every row takes all n tokens. `keep` all log probabilities, not only the drawn tokens'.

    DataError if prompt and tokens are more than the student was built for; RecipeError if it has no
    cache.
    """
    rows, count = uniforms.shape
    places = prompt[:, -1:, 1] + 1 + _steps(prompt, count)
    inputs = torch.stack([torch.full_like(places, eos or 0), places], -1)
    mask = torch.zeros_like(places, dtype=torch.bool)
    log_q = torch.zeros_like(mask, dtype=torch.double)
    weight = torch.ones_like(mask, dtype=torch.double)
    going = places.new_ones(rows, dtype=torch.bool)  # rows whose text has not ended
    distributions: list[Tensor] = []
    with at_rest(student):
        read = _reader(student, prompt, count)
        ask = _asker(mixed.teacher, prompt, count) if mixed else None
        for t in range(count):
            new = inputs[:, t - 1 : t] if t else prompt
            z = read(new)[:, -1]
            y = ask(new)[:, -1] if ask else None
            vocab = shared_vocab((z if y is None else y).shape[-1], z.shape[-1], vocab)
            q = log_probabilities(z, vocab, temperature)
            policy = q
            if y is not None and mixed is not None:
                policy = _mixture(log_probabilities(y, vocab, temperature), q, mixed)
            drawn = inverse_cdf(policy.exp(), uniforms[:, t].to(q.device))
            token = torch.where(going, drawn, inputs[:, t, 0])
            inputs[:, t, 0] = token
            mask[:, t] = going
            log_q[:, t] = q.gather(1, token[:, None])[:, 0]
            weight[:, t] = (log_q[:, t] - policy.gather(1, token[:, None])[:, 0]).exp()
            if keep:
                distributions.append(q)
            if eos is not None:
                going = going & (token != eos)
    assert vocab is not None, "nothing was to be drawn"
    return DrawnText(
        inputs=inputs,
        mask=mask,
        log_q=log_q,
        weight=weight,
        vocab=vocab,
        student=torch.stack(distributions, 1) if keep else None,
    )


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
    """Prompts (B, P, 2) with the n tokens that the student wrote after each; T = P + n - 1.

    Arguments are those of `sample`; `mixed` is the teacher's share of the sampling. The text is
    drawn now, and scored when the batch is asked for.
    """
    drawn = sample(
        student,
        prompt,
        uniforms=uniforms,
        temperature=temperature,
        eos=eos,
        vocab=vocab,
        mixed=TeacherMix(mixed, teacher) if mixed else None,
    )
    scoring = score_text(teacher, prompt, drawn, vocab)
    log_q = after_prompt(prompt, drawn.log_q.float(), 0.0)
    weight = after_prompt(prompt, drawn.weight.float(), 1.0)
    mask = after_prompt(prompt, drawn.mask, False)

    def batch() -> Batch:
        inputs, label, said = scoring()
        rollout = Rollout(log_q, weight, lag=0, temperature=temperature)
        return Batch(row_id, inputs, mask, label, teacher=said.changed(mask=mask), rollout=rollout)

    return batch


def score_text(
    teacher: Teacher, prompt: Tensor, drawn: DrawnText, vocab: int | None
) -> Callable[[], tuple[Tensor, Tensor, Signals]]:
    """Inputs (B, T, 2), the token after each (B, T), and what the teacher says of `vocab` tokens.

    One pass of the teacher begins now; calling the result waits for it. Position j - 1 is about
    token j, so the first drawn token belongs to the last position of the prompt.
    """
    text = torch.cat([prompt, drawn.inputs], 1)
    answer = teacher.ask(text[:, :-1])

    def scored() -> tuple[Tensor, Tensor, Signals]:
        said = answer()
        real = shared_vocab(said.columns, drawn.vocab, vocab)
        return text[:, :-1], text[:, 1:, 0].long(), said.first_columns(real)

    return scored


def after_prompt(prompt: Tensor, values: Tensor, fill: Any) -> Tensor:
    """(B, T): values of drawn tokens (B, n) at the positions about them, `fill` before those."""
    return torch.cat([values.new_full((len(values), prompt.shape[1] - 1), fill), values], 1)


def cut_prompts(inputs: Tensor, mask: Tensor, cut: int, most: int) -> Tensor:
    """(B, P, 2): the tokens that rows of text (B, T, 2) are continued from, aligned to the right.

    A row that has a prompt, which `mask` (B, T) leaves out, is continued from it. Any other is
    continued from its first `cut` tokens. A row ends at its last position in the mask, and of a
    prompt the last `most` tokens are used. Padding on the left has place 0: that starts a document,
    so nothing to its left is read.
    """
    length = torch.where(mask, _steps(inputs, mask.shape[1]) + 1, 0).amax(1)
    wanted = torch.where(mask[:, 0], cut, mask.int().argmax(1) + 1)
    wanted = wanted.minimum(length).clamp(min=1)[:, None]
    taken = wanted.clamp(max=most)
    dropped = wanted - taken
    at = _steps(inputs, int(taken.max())) - (taken.max() - wanted)
    prompt = inputs.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, 2))
    prompt[..., 1] = torch.where(at >= dropped, prompt[..., 1] - dropped, 0)
    return prompt


def log_probabilities(logits: Tensor, vocab: int, temperature: float) -> Tensor:
    """(..., vocab) fp64: log softmax of logits / temperature over the real columns."""
    return (logits[..., :vocab].double() / temperature).log_softmax(-1)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B,) int64: the first class whose cumulative probability is above a uniform in [0, 1).

    `probabilities` are (B, V) fp64 and need not sum to 1, `uniform` (B,). A class of probability 0
    is never drawn.
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
            f"source: {type(module).__name__} keeps no cache of keys and values, so it cannot "
            'write text; use student.model = "llama"'
        )
    need = prompt.shape[1] + count - 1
    room = getattr(module, "settings", {}).get("steps")
    if room is not None and need > room:
        raise DataError(
            f"source: {prompt.shape[1]} tokens of prompt and {count} new ones make {need} "
            f"positions, but the model was built for {room}; lower source.length, or raise its "
            "steps"
        )
    with torch.device(prompt.device):
        cache = module.cache(len(prompt))
    return lambda inputs: module(inputs, cache)["logits"]


def _asker(teacher: Teacher, prompt: Tensor, count: int) -> _Read:
    """A teacher read token by token: through its cache if it has one, else from the start again."""
    if isinstance(teacher, FrozenTeacher) and hasattr(teacher.module, "cache"):
        read = _reader(teacher.module, prompt, count)

        def ask(inputs: Tensor) -> Tensor:
            with at_rest(teacher.module):
                return read(inputs)

        return ask
    text: list[Tensor] = []

    def ask_again(inputs: Tensor) -> Tensor:
        text.append(inputs)
        return teacher.ask(torch.cat(text, 1))().logits

    return ask_again


def _steps(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)
