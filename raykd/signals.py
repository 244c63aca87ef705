"""What models answer and what losses read, as tensors.

Shape letters used everywhere: B rows, T steps, C classes, K input channels, D width, H heads, N
rows of a split, P valid steps of a batch in order.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.targets import SparseTargets

LANES = 8  # floats in a CPU vector register


@dataclass(frozen=True)
class Headed:
    """A model's last hidden states and the linear head that makes its logits of them.

    Losses walk them in chunks (`raykd.losses.fused`), so that (B, T, C) is never in memory.
    """

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)

    @property
    def columns(self) -> int:
        return len(self.weight)

    def detached(self) -> "Headed":
        """The same, through which no gradient flows."""
        bias = None if self.bias is None else self.bias.detach()
        return Headed(self.hidden.detach(), self.weight.detach(), bias)

    def first_columns(self, count: int) -> "Headed":
        """The same with a head of the first `count` classes."""
        bias = None if self.bias is None else self.bias[:count]
        return Headed(self.hidden, self.weight[:count], bias)

    def logits(self, mask: Tensor) -> Tensor:
        """(B, T, C) in fp32 at least: all of them, 0 where `mask` (B, T) is False."""
        product = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        return zeroed(product.to(torch.promote_types(product.dtype, torch.float32)), mask)


@dataclass(frozen=True)
class Signals:
    """One model's outputs for a batch. `mask` marks the valid steps of the outputs.

    A model that answers once a sequence has T = 1, but its valence has the steps of the inputs, and
    `valence_mask` marks those at which it is known. Inner layers have the key "<kind>.<submodule>":

        hidden     (B, T, D)     the submodule's output
        attention  (B, T, H, T)  the softmax over keys at each step
        scores     (B, T, H, T)  its logits, 0 where a key is hidden from the step
        embedding  (B, 1, D)     the mean of the output over valid steps

    Where `headed` is there, `logits` are made when they are first read.

    Example:
        >>> import torch
        >>> from raykd import Signals
        >>> signals = Signals(torch.zeros(1, 2, 4), torch.tensor([[True, False]]))
        >>> signals.log_q.exp()[0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        >>> signals.sequence_logits().shape
        torch.Size([1, 4])
    """

    logits: Tensor  # (B, T, C)
    mask: Tensor  # (B, T) bool
    valence: Tensor | None = None  # (B, T) future valence in [-1, 1]
    layers: dict[str, Tensor] = field(default_factory=dict)
    valence_mask: Tensor | None = None  # (B, T) bool where valence is known; without it `mask`
    headed: Headed | None = None  # of a student with a linear head over many classes

    @classmethod
    def of_head(cls, headed: Headed, mask: Tensor, **others: Any) -> "Signals":
        """Signals without logits as yet; `others` are the further fields."""
        signals = cls(torch.empty(0), mask, **others, headed=headed)
        del signals.__dict__["logits"]
        return signals

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            headed = self.__dict__.get("headed")
            if name != "logits" or headed is None:
                raise AttributeError(name)
            object.__setattr__(self, "logits", headed.logits(self.mask))
            return self.logits

    @property
    def columns(self) -> int:
        """C, the number of classes; it makes no logits."""
        if "logits" in self.__dict__ or self.headed is None:
            return self.logits.shape[-1]
        return self.headed.columns

    def first_columns(self, count: int) -> "Signals":
        """The same with the first `count` classes alone, as of a head that is padded."""
        if count == self.columns:
            return self
        if "logits" in self.__dict__ or self.headed is None:
            return self.changed(logits=self.logits[..., :count])
        return self.changed(headed=self.headed.first_columns(count))

    def changed(self, **fields: Any) -> "Signals":
        """The same with other fields; logits that are not there stay unmade."""
        if "logits" in self.__dict__ or "logits" in fields:
            return replace(self, **{"headed": None, **fields})
        others = {k: v for k, v in vars(self).items() if k not in fields}
        return Signals.of_head(**others, **fields)

    @property
    def valence_steps(self) -> Tensor:
        """(B, T): where the valence is known."""
        return self.mask if self.valence_mask is None else self.valence_mask

    @cached_property
    def log_q(self) -> Tensor:
        """Log softmax of the logits, (B, T, C), computed once for all terms that read it."""
        return log_softmax(self.logits)

    def sequence_logits(self) -> Tensor:
        """The mean of the logits over valid steps, (B, C) in fp32."""
        return masked_mean(self.logits.float(), self.mask)

    def rows(self, at: slice) -> "Signals":
        """The rows at `at` alone."""
        fields: dict[str, Any] = {
            "mask": self.mask[at],
            "valence": None if self.valence is None else self.valence[at],
            "layers": {name: layer[at] for name, layer in self.layers.items()},
            "valence_mask": None if self.valence_mask is None else self.valence_mask[at],
        }
        if "logits" in self.__dict__:
            fields["logits"] = self.logits[at]
        elif self.headed is not None:
            fields["headed"] = replace(self.headed, hidden=self.headed.hidden[at])
        return self.changed(**fields)

    def double(self) -> "Signals":
        """The same in float64."""
        return self.changed(
            logits=self.logits.double(),
            valence=None if self.valence is None else self.valence.double(),
            layers={name: layer.double() for name, layer in self.layers.items()},
        )

    def valid(self, steps: Tensor) -> "Signals":
        """The same with zeros at invalid steps, so that padding reaches no value and no gradient.

        `steps` (B, T) are the valid steps of the inputs. They are those of an inner layer, too,
        even where the answer has other steps.
        """
        # On a GPU, asking would wait for its queue.
        everywhere = steps.device.type == "cpu" and self.mask.all() and steps.all()
        if everywhere and self.valence_steps.all():
            return self
        masks = {steps.shape[1]: steps, 1: steps.any(1, True)}
        layers = {}
        for name, layer in self.layers.items():
            mask = masks.get(layer.shape[1])
            layers[name] = layer if mask is None else zeroed(layer, mask)
        fields: dict[str, Any] = {"layers": layers}
        if self.valence is not None:
            fields["valence"] = zeroed(self.valence, self.valence_steps)
        if "logits" in self.__dict__:
            fields["logits"] = zeroed(self.logits, self.mask)
        return self.changed(**fields)


class Split(Protocol):
    """What a term may read of rows beyond its batch, all (N, ...) in the split's order."""

    @property
    def row_id(self) -> Tensor: ...
    @property
    def label(self) -> Tensor: ...
    @property
    def answer(self) -> Tensor | None: ...
    @property
    def teacher(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Rollout:
    """What was known of each position when its token was drawn, all (B, T).

    Position t is about the token after it. The positions of a draft are tested one after the other
    until the teacher rejects one and corrects it; those after it are its tail. Text that was only
    sampled has none of the fields of a draft. p and q are the softmax of logits / `temperature`.
    """

    log_q: Tensor  # the student's log probability of the token, when it was drawn
    # q / (share p + (1 - share) q) of teacher-mixed sampling, at most 1 / (1 - share); 1 without
    weight: Tensor
    lag: int  # steps of the optimiser between drawing and now
    temperature: float = 1.0
    accepted: Tensor | None = None  # bool
    rejected: Tensor | None = None  # bool: at most one a draft
    correction: Tensor | None = None  # int64: the teacher's token where `rejected`
    tail: Tensor | None = None  # int64: k at the k-th position after a rejection, 0 elsewhere

    def rows(self, at: slice) -> "Rollout":
        """The rows at `at` alone."""
        return replace(self, **{k: v[at] for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Batch:
    """Rows as a loss sees them. `label` is UNLABELLED where the label is hidden or missing.

    Rows of text have inputs (B, T, 2), each a token and its place in its document, and a label at
    every position: the token after it. For text, `mask` is True where a loss applies: False on the
    prompt. Sentences have inputs (B, T, 1), their tokens, and otherwise are like series.

    A batch is wholly the data's, or wholly text that the student wrote, which has a `rollout`. A
    term counts in one of the two kinds and adds nothing in the other. A step with both is two
    batches, whose sums and counts add.

    Example:
        >>> import torch
        >>> from raykd import Batch
        >>> batch = Batch(
        ...     row_id=torch.tensor([7, 8]),
        ...     inputs=torch.zeros(2, 3, 1),
        ...     mask=torch.ones(2, 3, dtype=torch.bool),
        ...     label=torch.tensor([0, 1]),
        ... )
        >>> len(batch.row_id), batch.teacher
        (2, None)
    """

    row_id: Tensor  # (B,) int64
    inputs: Tensor  # (B, T, K); int32 where they are tokens
    mask: Tensor  # (B, T) bool
    label: Tensor  # (B,) int64, or (B, T) of text
    valence: Tensor | None = None  # (B, T), NaN where missing
    teacher: Signals | None = None  # its logits are (B, T, 0) where `targets` stands for them
    # Of all valid steps in order, at a temperature.
    targets: Callable[[float], SparseTargets] | None = None
    saliency: Tensor | None = None  # (B,), NaN where unknown
    answer: Tensor | None = None  # (B,) int64, the teacher's class of the whole row
    weight: Tensor | None = None  # (B,): how much a row counts; without it every step counts alike
    rollout: Rollout | None = None  # of text that the student wrote; None: the data's
    split: "Split | None" = None  # of all rows, for terms that draw others from it

    def rows(self, at: slice) -> "Batch":
        """The rows at `at` alone, as a batch of their own."""
        parts: dict[str, Any] = {
            name: value[at] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.teacher is not None:
            parts["teacher"] = self.teacher.rows(at)
        if self.rollout is not None:
            parts["rollout"] = self.rollout.rows(at)
        targets = self.targets
        if targets is not None:
            steps = self.mask if self.teacher is None else self.teacher.mask
            places = places_of(steps, at)
            parts["targets"] = lambda temperature: targets(temperature).take(places)
        return replace(self, **parts)

    @property
    def document(self) -> Tensor | None:
        """(B, T): of text, which document of its row a step belongs to; None of other rows."""
        return documents_of(self.inputs)


def places_of(steps: Tensor, at: slice) -> Tensor:
    """(Q,) int64: which of the valid `steps` (B, T), counted in order, lie in the rows at `at`."""
    ends = [0, *steps.sum(1).cumsum(0).tolist()]
    first, last, _ = at.indices(len(steps))
    return torch.arange(ends[first], ends[last], device=steps.device)


def documents_of(inputs: Tensor) -> Tensor | None:
    """(B, T): the number of each step's document in its row of text, whose inputs are (B, T, 2).

    None of series and of sentences. A document begins at place 0, and so does every step of
    padding.
    """
    return (inputs[..., 1] == 0).cumsum(1) if has_places(inputs) else None


def has_places(inputs: Tensor) -> bool:
    """Whether inputs (B, T, K) are tokens with their places in their documents, so that every step
    has a label; tokens of sentences (B, T, 1) have none.
    """
    return not inputs.is_floating_point() and inputs.shape[-1] > 1


def as_tensor(values: NDArray[Any]) -> Tensor:
    """The array as a tensor over the same memory; it may be read-only, as nothing writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def zeroed(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (B, T, ...) with zeros where `mask` is False: (B, T), or (B, 1) for whole rows."""
    return torch.where(mask.reshape(*mask.shape, *(1,) * (values.dim() - 2)), values, 0.0)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log probabilities (..., T, C) of logits / temperature, in fp32 at least."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if temperature == 1 else z / temperature
    # With fewer classes than LANES the steps are the vector: PyTorch's CPU kernel for the last axis
    # goes scalar there, which is five times slower and gives the same bits.
    return z.mT.log_softmax(-2).mT if z.shape[-1] < LANES else z.log_softmax(-1)


def flatten_valid(values: Tensor, mask: Tensor) -> Tensor:
    """The values (B, T, ...) at the valid steps of `mask` (B, T) in order, as (P, ...).

    It makes no copy where every step is valid. `raykd.losses.unflatten_valid` is its inverse.
    """
    # On a GPU, asking would wait for its queue.
    everywhere = mask.device.type == "cpu" and bool(mask.all())
    return values.flatten(0, 1) if everywhere else values[mask]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` (B, T, ...) over the valid steps, as (B, ...); 0 for a row with none."""
    count = mask.sum(1).clamp(min=1).reshape(-1, *(1,) * (values.dim() - 2))
    return zeroed(values, mask).sum(1) / count


def same_length(mine: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers (B, T, D) with the number of steps of the shorter one.

    The longer is averaged over equal parts of each row. A layer with the steps of `mask` (B, T) is
    valid there, any other everywhere.
    """
    if mine.shape[1] == theirs.shape[1]:
        return mine, theirs
    steps = min(mine.shape[1], theirs.shape[1])
    resampled_layers = []
    for layer in (mine, theirs):
        has_steps = layer.shape[1] == mask.shape[1]
        valid = mask if has_steps else mask.new_ones(layer.shape[:2])
        resampled_layers.append(resampled(layer, valid, steps))
    return resampled_layers[0], resampled_layers[1]


def resampled(values: Tensor, mask: Tensor, steps: int) -> Tensor:
    """`values` (B, T, D) averaged over equal parts of each row's valid steps, as (B, steps, D).

    The n-th of a row's N valid steps covers [n / N, (n + 1) / N) of it, and each part weighs what
    it overlaps. So nothing is cropped, and where N = steps nothing changes. A row without a valid
    step is 0.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    start = (mask.cumsum(1) - 1) / count  # (B, T)
    part = torch.arange(steps, device=mask.device)[:, None] / steps  # (steps, 1)
    end = torch.minimum((start + 1 / count)[:, None], part + 1 / steps)
    overlap = end - torch.maximum(start[:, None], part)
    weight = torch.where(mask[:, None], overlap.clamp(min=0), 0.0)  # (B, steps, T)
    return steps * weight @ zeroed(values, mask)
