"""What a loss term is, and all that are registered.

A term is a function `(student: Signals, batch: Batch, *, settings) -> TermValues`, or an nn.Module
class built as `(student: Signals, batch: Batch, *, settings)` from an example of what it will be
called with: its parameters join the optimiser and never the student. Its name is its key under
`[terms]`; its annotated keyword arguments are what a recipe may set, and nothing is said twice.
Terms never reduce over rows: the objective alone does, with denominators that are global over
micro-batches and workers, so neither changes the loss.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import ConfigDict, Field, create_model
from torch import Tensor

from raykd.errors import Problem
from raykd.recipe.recipe import Pair, TermSpec
from raykd.recipe.validation import suggestion, validate
from raykd.signals import masked_mean

Pairs = Annotated[
    list[Pair[str]], Field(min_length=1)
]  # of (student's submodule, teacher's submodule)


class TermValues(NamedTuple):
    """A term's value at each place, (B,) or (B, T), and where it counts.

    Values elsewhere are ignored.
    """

    value: Tensor
    mask: Tensor


def mean_over_pairs(values: list[Tensor], mask: Tensor) -> TermValues:
    """The mean of a term's values for several pairs of layers: each at every step of `mask` (B, T),
    or (B, 1).

    One value a row counts the row once, and then so do the others, with their mean over valid
    steps.
    """
    if all(value.shape == mask.shape for value in values):
        return TermValues(torch.stack(values).mean(0), mask)
    rows = [masked_mean(v, mask) if v.shape == mask.shape else v[:, 0] for v in values]
    return TermValues(torch.stack(rows).mean(0), mask.any(1))


class Term(NamedTuple):
    """A registered term: its function or module class, the teacher's columns it reads, and the kind
    of its layers.

    `divergence`: what it computes from the logits, "any" where it needs every class. `whole_batch`:
    it compares the rows of the global batch with each other, so that its value is not a sum over
    them. `own`: it counts in text that the student wrote, with the logits of a teacher that is
    there, and not in the data's rows.
    """

    make: Callable[..., Any]
    needs: frozenset[str]
    layers: Callable[[Mapping[str, Any]], str] | None
    divergence: str
    whole_batch: bool
    own: bool = False

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting: what a recipe gives over the signature's own."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | dict(given)

    def pairs(self, given: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(student's signal, teacher's signal) of every pair of layers that these settings name."""
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
    whole_batch: bool = False,
    own: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function or nn.Module class as a loss term that reads the named teacher signals.

    With `layers`, a kind of Signals.layers or a function from the settings to one, its setting
    `pairs: Pairs` names submodules of the student and of the teacher. `divergence = "forward"` lets
    sparse stores serve it: it must then read `batch.targets`. `own` terms read a live teacher's
    logits and `batch.rollout`, and nothing of a store.
    """
    assert not (own and needs), "text that the student wrote is in no store"

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        name = make.__name__
        known = TERMS.get(name)
        if known and known.make.__module__ != make.__module__:
            raise ValueError(
                f"two terms are called {name!r}: in {known.make.__module__} and {make.__module__}"
            )
        kind = (lambda _settings, fixed=layers: fixed) if isinstance(layers, str) else layers
        TERMS[name] = Term(make, frozenset(needs), kind, divergence, whole_batch, own)
        return make

    return register


def needs_of(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """The teacher signals that a recipe's terms read: what scoring must store."""
    return frozenset().union(
        *(TERMS[n].needs | {theirs for _, theirs in pairs} for n, pairs in _layers(terms))
    )


def wants_of(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """The inner layers of the student that a recipe's terms read."""
    return frozenset(mine for _, pairs in _layers(terms) for mine, _ in pairs)


def term_problems(terms: Mapping[str, TermSpec]) -> list[Problem]:
    """Every unknown term and every setting that a term's signature does not accept."""
    problems = []
    for name, spec in terms.items():
        if name not in TERMS:
            problems.append(Problem(f"terms.{name}", "no such term." + suggestion(name, TERMS)))
        else:
            problems += validate(
                _settings_model(TERMS[name].make), spec.settings, key=f"terms.{name}"
            )[1]
    return problems


def _layers(terms: Mapping[str, TermSpec]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    return (
        (name, TERMS[name].pairs(spec.settings)) for name, spec in terms.items() if spec.weight > 0
    )


def _settings_model(make: Callable[..., Any]) -> Any:
    parameters = inspect.signature(make).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model("Settings", __config__=ConfigDict(extra="forbid"), **fields)
