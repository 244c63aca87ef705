"""Distillation losses fused with the student's output head: logits exist for one chunk at a time.

    z = hidden weight^T + bias        q = softmax(z / T)        value (P,)

The logits (P, V) are never in memory as a whole. Each chunk's gradient takes the place of its
logits during the forward pass (the idea of Liger-Kernel's fused linear cross-entropy,
linkedin/Liger-Kernel chunked_loss), so memory is one chunk and the gradients of the inputs,
whatever P is.

That needs the upstream gradient beforehand. It is taken as proportional to `place_weight`, ones
unless given; masks, row weights and any mean are of this form. A backward pass that meets another
upstream gradient computes the chunks once more with it, so the result is exact always, and cheaper
when `place_weight` is right. Values carry no factor T^2; the caller multiplies.

Columns of `weight` beyond the real vocabulary are padding: outside the softmax, with zero gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raykd.errors import RecipeError
from raykd.losses.fused_chunks import Divergence, compiled_chunk, dense_chunk, sparse_chunk
from raykd.targets import SparseTargets

CHUNK_BYTES = 16 << 20  # of logits, which then stay in cache
CHUNK_ROWS = 64  # at least: fewer rows starve the matrix products


class Head(NamedTuple):
    """A frozen output head over its own hidden states: logits = hidden weight^T + bias."""

    hidden: Tensor  # (P, D_t)
    weight: Tensor  # (V_t, D_t)
    bias: Tensor | None = None  # (V_t,)


# Of z, scale and places, as in raykd.losses.fused_chunks.
Chunk = Callable[[Tensor, Tensor, slice], Tensor]


def sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    *,
    temperature: float = 1.0,
    place_weight: Tensor | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The forward KL of sparse targets from the student's softmax, without its logits in memory.

    Use it to distil a large vocabulary from a stored sparse teacher, where (P, V) logits would not
    fit. Returns (P,): KL(p || softmax((hidden weight^T + bias) / temperature)).

    hidden is (P, D), weight (V, D), bias (V,) or None, and V at least `targets.vocab`. `chunk` is
    the number of places at a time; by default it takes 16 MiB of logits, but 64 places at least.
    `compiled` runs each chunk through torch.compile, which is faster after a first call of many
    seconds. RecipeError where the head has fewer columns than the targets have classes.

    Example:
        >>> import torch
        >>> from raykd.losses import sparse_kl
        >>> from raykd.targets import SparseTargets
        >>> targets = SparseTargets(
        ...     ids=torch.tensor([0, 1]),
        ...     start=torch.tensor([0, 2]),
        ...     weight=torch.tensor([0.5, 0.5]),
        ...     vocab=2,
        ... )
        >>> round(sparse_kl(torch.zeros(1, 3), torch.zeros(2, 3), None, targets).item(), 4)
        0.6931
    """
    if weight.shape[0] < targets.vocab:
        raise RecipeError(
            f"the store's targets name {targets.vocab} classes, the student's head has "
            f"{weight.shape[0]}; give the student a head of at least as many"
        )
    assert len(hidden) == len(targets)
    row = targets.rows()
    start = targets.start.tolist()
    kernel = compiled_chunk() if compiled else sparse_chunk

    def apply(z: Tensor, scale: Tensor, at: slice) -> Tensor:
        entries = slice(start[at.start], start[at.stop])
        tail = None if targets.tail is None else targets.tail[at].to(z.dtype)
        ids = targets.ids[entries]
        w = targets.weight[entries].to(z.dtype)
        value = kernel(z, scale, row[entries] - at.start, ids, w, tail)
        return value if targets.entropy is None else value - targets.entropy[at]

    return _fused(hidden, weight, bias, apply, targets.vocab, temperature, place_weight, chunk)


def dense_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | Head,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    vocab: int | None = None,
    place_weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """A divergence of the student from a dense teacher, without the student's logits in memory.

    Use it where teacher and student both run on the same rows and the vocabulary is large. Returns
    (P,), over all classes and at one temperature. The student's arguments are those of `sparse_kl`.

    `teacher` is its logits (P, V_t), or a `Head`: its hidden states with their frozen head.
    `vocab` is the number of real columns, where the heads are padded.

        forward   KL(p || q)
        reverse   KL(q || p)
        js        beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; its ends
                  beta = 0 and 1 are forward and reverse (Agarwal et al. 2024, arXiv 2306.13649,
                  eq. 1)

    Example:
        >>> import torch
        >>> from raykd.losses import dense_kl
        >>> teacher = torch.tensor([[0.9, 0.1]]).log()
        >>> value = dense_kl(torch.zeros(1, 3), torch.zeros(2, 3), None, teacher)
        >>> round(value.item(), 4)
        0.3681
    """
    width = teacher.weight.shape[0] if isinstance(teacher, Head) else teacher.shape[1]
    vocab = shared_vocab(width, weight.shape[0], vocab)
    if divergence == "js" and beta in (0, 1):
        divergence = "reverse" if beta else "forward"
    assert len(hidden) == len(teacher.hidden if isinstance(teacher, Head) else teacher)

    def apply(z: Tensor, scale: Tensor, at: slice) -> Tensor:
        if isinstance(teacher, Head):
            room = _Room(at.stop - at.start, vocab, teacher.hidden, teacher.weight)
            y = room.fill(teacher.hidden[at], teacher.bias, temperature)
        else:
            y = teacher[at, :vocab].to(z.dtype) / temperature
        return dense_chunk(z, y.log_softmax(1), scale, divergence, beta)

    return _fused(hidden, weight, bias, apply, vocab, temperature, place_weight, chunk)


def shared_vocab(teacher: int, student: int, vocab: int | None) -> int:
    """The number of real columns of two heads, given their widths.

    RecipeError where the widths differ and `vocab` is not given, or where `vocab` is above either.
    """
    if vocab is None and teacher != student:
        raise RecipeError(
            f"the teacher's head has {teacher} columns and the student's {student}; if the extra "
            "ones are padding of one tokeniser, give vocab = its number of tokens "
            f"(at most {min(teacher, student)})"
        )
    if vocab is not None and not 0 < vocab <= min(teacher, student):
        raise RecipeError(
            f"vocab = {vocab}, but the teacher's head has {teacher} columns and the student's "
            f"{student}; give 1 to {min(teacher, student)}"
        )
    return teacher if vocab is None else vocab


class _Room:
    """Memory for a chunk's logits, which all chunks of a walk share.

    Memory that is asked for anew is zeroed by the system, page by page, which at 150,000 classes
    takes as long as the product itself.
    """

    def __init__(self, places: int, vocab: int, hidden: Tensor, weight: Tensor):
        self.product = hidden.new_empty(places, vocab)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        self.logits = self.product.to(exact)  # itself, where nothing is to be widened
        self.columns = weight[:vocab].T

    def fill(self, hidden: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
        """(c, vocab): logits / T in fp32 at least, until the next call."""
        places = len(hidden)
        product = torch.mm(hidden, self.columns, out=self.product[:places])
        z = self.logits[:places]
        if self.logits is not self.product:
            z.copy_(product)
        if bias is not None:
            z += bias[: z.shape[1]]
        return z if temperature == 1 else z.div_(temperature)


def _fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    apply: Chunk,
    vocab: int,
    temperature: float,
    place_weight: Tensor | None,
    chunk: int | None,
) -> Tensor:
    assert place_weight is None or place_weight.shape == hidden.shape[:1]
    size = chunk or max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab))
    value: Any = _Fused.apply(hidden, weight, bias, place_weight, apply, vocab, temperature, size)
    return value


class _Fused(torch.autograd.Function):
    """Chunks of logits, each overwritten by its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, place_weight, apply, vocab, temperature, size):  # type: ignore[override]
        scale = hidden.new_ones(len(hidden)) if place_weight is None else place_weight.detach()
        wanted = ctx.needs_input_grad[:3]
        value, gradients = _walk(
            hidden, weight, bias, scale, apply, vocab, temperature, size, wanted
        )
        ctx.save_for_backward(hidden, weight, bias, scale, *gradients)
        ctx.settings = (apply, vocab, temperature, size, wanted)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors
        hidden, weight, bias = saved[:3]
        scale = saved[3]
        gradients = saved[4:]
        scale = scale.to(upstream.dtype)
        factor = (upstream * scale).sum() / scale.square().sum().clamp(
            min=torch.finfo(scale.dtype).tiny
        )
        if not torch.allclose(
            upstream, factor * scale, rtol=16 * torch.finfo(scale.dtype).eps, atol=0.0
        ):
            _, gradients = _walk(hidden, weight, bias, upstream, *ctx.settings)
            factor = torch.ones_like(factor)
        scaled = [None if g is None else g.mul(factor.to(g.dtype)) for g in gradients]
        return *scaled, *(None,) * 5


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    apply: Chunk,
    vocab: int,
    temperature: float,
    size: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Values (P,), and the wanted gradients of sum(scale * value) by hidden, weight and bias."""
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        exact = torch.promote_types(hidden.dtype, torch.float32)
        inputs = (hidden, weight, bias)
        gradients = [
            torch.zeros_like(x, dtype=exact) if w and x is not None else None
            for x, w in zip(inputs, wanted, strict=True)
        ]
        by_hidden, by_weight, by_bias = gradients
        value = hidden.new_empty(len(hidden), dtype=exact)
        step = scale.to(exact) / temperature
        room = _Room(min(size, len(hidden)), vocab, hidden, weight)
        for first in range(0, len(hidden), size):
            at = slice(first, min(first + size, len(hidden)))
            z = room.fill(hidden[at], bias, temperature)
            value[at] = apply(z, step[at], at)
            by_logits = z.to(weight.dtype)
            if by_hidden is not None:
                by_hidden[at] = by_logits @ weight[:vocab]
            if by_weight is not None:
                by_weight[:vocab].addmm_(by_logits.T.to(exact), hidden[at].to(exact))
            if by_bias is not None:
                by_bias[:vocab] += z.sum(0)
        return value, [
            None if g is None or x is None else g.to(x.dtype)
            for g, x in zip(gradients, inputs, strict=True)
        ]
