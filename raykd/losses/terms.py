"""What a loss term is, and all that are registered.

A term is a function `(student: Signals, batch: Batch, *, settings) -> TermValues`. Or it is an
nn.Module class built as `(student: Signals, batch: Batch, *, settings)` from an example of what it
will be called with; its parameters join the optimiser and never the student.

Its name is its key under `[terms]`, and its annotated keyword arguments are what a recipe may set.
Its docstring explains them to `raykd keys`, in lines of the argument's name, two spaces or more,
and what it does.
Terms never reduce over rows. The objective alone does, with denominators that are global over
micro-batches and workers, so neither changes the loss.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, create_model
from torch import Tensor

from raykd.errors import Problem
from raykd.recipe.tables import Pair, TermSpec
from raykd.recipe.validation import suggestion, validate
from raykd.signals import Batch, masked_mean

# Pairs of (student's submodule, teacher's submodule).
Pairs = Annotated[list[Pair[str]], Field(min_length=1)]
EXPLAINED = re.compile(r"^(\w+) {2,}(\S.*(?:\n +\S.*)*)", re.MULTILINE)


class TermValues(NamedTuple):
    """A term's values, (B,) or (B, T), and the mask of where they count.

    Values elsewhere are ignored, whatever they are.

    Example:
        >>> import torch
        >>> from raykd.losses import TermValues
        >>> values = TermValues(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        >>> values.value[values.mask]
        tensor([1.])
    """

    value: Tensor
    mask: Tensor


class Answered(NamedTuple):
    """What is known of a student's answers to a batch before it gives them.

    mask    (B, T) as in Signals: where it answers
    layers  the number of steps of each inner layer

    Example:
        >>> from raykd.losses import Answered
        >>> Answered(torch.ones(1, 2, dtype=torch.bool), {"hidden.blocks.0": 2}).mask.sum()
        tensor(2)
    """

    mask: Tensor
    layers: Mapping[str, int]


# (answered, batch, **settings) -> the mask of a term's TermValues, whatever the student says.
Counts = Callable[..., Tensor]


def at_steps(answered: Answered, batch: Batch, **settings: Any) -> Tensor:
    """Where a term counts that counts at every valid step of the batch.

    Use it as `@term(..., counts=at_steps)`.

    Example:
        >>> from raykd import Batch
        >>> from raykd.losses import Answered, at_steps
        >>> valid = torch.tensor([[True, False]])
        >>> number = torch.zeros(1, dtype=torch.int64)
        >>> batch = Batch(number, torch.zeros(1, 2, 3), valid, number)
        >>> at_steps(Answered(valid, {}), batch)
        tensor([[ True, False]])
    """
    return batch.mask


def mean_over_pairs(values: list[Tensor], mask: Tensor) -> TermValues:
    """The mean of a term's values over several pairs of layers.

    Use it at the end of a term with a setting `pairs: Pairs`. Each value is (B, T), the shape of
    `mask`, or (B, 1). If every value is (B, T), so is the mean. Otherwise it is (B,): each row
    counts once, and values (B, T) enter with their mean over valid steps.

    Example:
        >>> import torch
        >>> from raykd.losses import mean_over_pairs
        >>> valid = torch.tensor([[True, True]])
        >>> first = torch.tensor([[1.0, 3.0]])
        >>> second = torch.tensor([[3.0, 5.0]])
        >>> mean_over_pairs([first, second], valid).value
        tensor([[2., 4.]])
        >>> mean_over_pairs([first, torch.tensor([[6.0]])], valid).value
        tensor([4.])
    """
    if all(value.shape == mask.shape for value in values):
        return TermValues(torch.stack(values).mean(0), mask)
    rows = [
        masked_mean(value, mask) if value.shape == mask.shape else value[:, 0] for value in values
    ]
    return TermValues(torch.stack(rows).mean(0), mask.any(1))


class Term(NamedTuple):
    """A registered term.

    make         its function or module class
    needs        the teacher's signals that it reads
    layers       the kind of its layers, from its settings; None where it reads no layer
    divergence   what it computes from the logits; "any" where it needs every class
    whole_batch  whether it compares the rows of the global batch with each other, so that its value
                 is not a sum over them; by its settings
    own          whether it counts in text that the student wrote, with a live teacher's logits, and
                 not in the data's rows
    dtype        the numbers in which it is given its signals
    counts       where it counts, known before the student answers; None where it does not say
    """

    make: Callable[..., Any]
    needs: frozenset[str]
    layers: Callable[[Mapping[str, Any]], str] | None
    divergence: str
    whole_batch: Callable[[Mapping[str, Any]], bool]
    own: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    counts: Counts | None = None

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting: the defaults of the signature, overridden by what a recipe gives."""
        parameters = inspect.signature(self.make).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return defaults | dict(given)

    def compares(self, given: Mapping[str, Any]) -> bool:
        """Whether it compares rows with each other under these settings."""
        return self.whole_batch(self.settings(given))

    def pairs(self, given: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The student's and the teacher's signal of every pair of layers in these settings."""
        if self.layers is None:
            return []
        settings = self.settings(given)
        kind = self.layers(settings)
        return [(f"{kind}.{mine}", f"{kind}.{theirs}") for mine, theirs in settings["pairs"]]


TERMS: dict[str, Term] = {}


def is_own(name: str) -> bool:
    """Whether a term counts in text that the student wrote."""
    return TERMS[name].own


def term(
    *needs: str,
    layers: str | Callable[[Mapping[str, Any]], str] | None = None,
    divergence: str = "any",
    whole_batch: bool | Callable[[Mapping[str, Any]], bool] = False,
    own: bool = False,
    dtype: Literal["float32", "float64"] = "float32",
    counts: Counts | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function or nn.Module class as a loss term that reads the named teacher signals.

    `needs` are columns of the store, such as "logits". With `layers` the term also reads inner
    layers: a kind of `Signals.layers`, or a function from the settings to one. Its setting
    `pairs: Pairs` then names submodules of the student and of the teacher.

    `divergence = "forward"` lets sparse stores serve the term, which must then read
    `batch.targets`. `whole_batch` is for terms that compare rows with each other, or a function
    from the settings to whether they do. `own` terms read a live teacher's logits and
    `batch.rollout`, and nothing of a store. `dtype = "float64"` gives a
    function its signals in that type; a recipe with it may have no model compute in fewer digits.

    `counts(answered, batch, **settings)` gives the mask of the term's values before the student has
    answered, so that a batch may be read in micro-batches (`scale.micro`): `at_steps` is that of
    terms that count at every valid step.

    ValueError where another module has registered a term of this name.

    Example:
        >>> from raykd import Batch, Signals
        >>> from raykd.losses import TermValues, term
        >>> @term("logits")
        ... def matched(student: Signals, batch: Batch, *, scale: float = 1.0) -> TermValues:
        ...     difference = student.logits - batch.teacher.logits
        ...     return TermValues(scale * difference.square().mean(-1), student.mask)
    """
    assert not (own and needs), "text that the student wrote is in no store"

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        assert dtype == "float32" or not inspect.isclass(make), "what a term learns is float32"
        name = make.__name__
        known = TERMS.get(name)
        if known and known.make.__module__ != make.__module__:
            raise ValueError(
                f"two terms are called {name!r}: in {known.make.__module__} and {make.__module__}"
            )
        kind = (lambda _settings, fixed=layers: fixed) if isinstance(layers, str) else layers
        compares = whole_batch if callable(whole_batch) else lambda _settings: bool(whole_batch)
        TERMS[name] = Term(make, frozenset(needs), kind, divergence, compares, own, dtype, counts)
        return make

    return register


def needs_of(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """The teacher signals that a recipe's terms read: what scoring must store."""
    signals: set[str] = set()
    for name, pairs in _layers(terms):
        signals |= TERMS[name].needs
        signals |= {theirs for _, theirs in pairs}
    return frozenset(signals)


def wants_of(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """The inner layers of the student that a recipe's terms read."""
    return frozenset(mine for _, pairs in _layers(terms) for mine, _ in pairs)


def term_problems(terms: Mapping[str, TermSpec]) -> list[Problem]:
    """Every unknown term and every setting that a term's signature does not accept."""
    problems = []
    for name, spec in terms.items():
        if name not in TERMS:
            problems.append(Problem(f"terms.{name}", "no such term." + suggestion(name, TERMS)))
            continue
        model = settings_model(TERMS[name].make)
        _, setting_problems = validate(model, spec.settings, key=f"terms.{name}")
        problems += setting_problems
    return problems


def _layers(terms: Mapping[str, TermSpec]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each term that counts, with its pairs of layers."""
    for name, spec in terms.items():
        if spec.weight > 0:
            yield name, TERMS[name].pairs(spec.settings)


def settings_model(make: Callable[..., Any]) -> Any:
    """A pydantic model of what a recipe may set of a term.

    It has the term's docstring, and each field the line that this says of it.
    """
    parameters = inspect.signature(make).parameters.values()
    lines = _explained(inspect.getdoc(make) or "")
    fields: dict[str, Any] = {
        p.name: (
            Annotated[p.annotation, Field(description=lines.get(p.name))],
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    config = ConfigDict(extra="forbid")
    return create_model("Settings", __config__=config, __doc__=make.__doc__, **fields)


def _explained(docstring: str) -> dict[str, str]:
    """What a docstring says of each argument, as sentences."""
    lines = {name: " ".join(words.split()) for name, words in EXPLAINED.findall(docstring)}
    return {name: f"{words[0].upper()}{words[1:]}." for name, words in lines.items()}
