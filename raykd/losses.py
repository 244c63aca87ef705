"""Loss terms and how they become one loss.

A term is a function `(student: Signals, batch: Batch, *, settings) -> Places`, or an nn.Module class whose
keyword-only constructor arguments are the settings (its parameters join the optimiser and never the student).
Its name is its key under `[terms]`; its annotated keyword arguments are what a recipe may set, and nothing is said
twice. Terms never reduce over rows: the objective alone does, with denominators that are global over micro-batches
and workers, so neither changes the loss.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, create_model
from torch import Tensor, nn

from raykd.errors import Problem, RecipeError
from raykd.recipe import TermSpec, suggestion, validate
from raykd.signals import UNLABELLED, Batch, Signals, log_softmax
from raykd.targets import SparseTargets, cross_entropy
from raykd.valence import future_valence as realised_future
from raykd.valence import prefix_confidence

Temperature = Annotated[float, Field(gt=0)]
Where = Literal["steps", "sequence"]


class Places(NamedTuple):
    """A term's value at each place, (B,) or (B, T), and where it counts. Values elsewhere are ignored."""

    value: Tensor
    mask: Tensor


class Term(NamedTuple):
    """A registered term: the teacher columns it reads, and its function or module class."""

    make: Callable[..., Any]
    needs: frozenset[str]


TERMS: dict[str, Term] = {}


def term(*needs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function or nn.Module class as a loss term that reads the named teacher signals."""

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        name = make.__name__
        known = TERMS.get(name)
        if known and known.make.__module__ != make.__module__:
            raise ValueError(f"two terms are called {name!r}: in {known.make.__module__} and {make.__module__}")
        TERMS[name] = Term(make, frozenset(needs))
        return make

    return register


@term()
def ce(student: Signals, batch: Batch, *, on: Where = "steps") -> Places:
    """-log q(label), at every valid step or on the sequence's mean logits; rows without a label count nothing."""
    logits, mask = _places(student, on)
    target = batch.label.reshape(-1, *(1,) * (mask.dim() - 1)).expand(mask.shape)
    mask = mask & (target != UNLABELLED)
    log_q = log_softmax(logits).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return Places(-log_q, mask)


@term("logits")
def kd(
    student: Signals, batch: Batch, *, temperature: Temperature = 2.0, on: Where = "steps", t_squared: bool = True
) -> Places:
    """T^2 KL(p_T || q_T), p and q the teacher's and student's softmax(z / T) (Hinton et al. 2015, section 2).

    The gradient with respect to the student's logits is T (q_T - p_T); t_squared = false drops the factor T^2.
    """
    assert batch.teacher is not None
    scale = temperature**2 if t_squared else 1.0
    if batch.targets is not None:
        return _sparse_kd(student, batch.targets(temperature), temperature, scale, on)
    if student.logits.shape[1] != batch.teacher.logits.shape[1]:
        on = "sequence"
    z_s, mask = _places(student, on)
    z_t, _ = _places(batch.teacher, on)
    log_q = log_softmax(z_s.float() / temperature)
    log_p = log_softmax(z_t.float() / temperature)
    value = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return Places(value * scale, mask)


def _sparse_kd(student: Signals, targets: SparseTargets, temperature: float, scale: float, on: Where) -> Places:
    """kd against sparse targets: what they leave of the KL, -entropy - sum_i w_i log q_i, at every valid step."""
    if on == "sequence" or len(targets) != student.mask.sum():
        raise RecipeError(
            "terms.kd: a sparse store holds one target a step, so the student must answer at every step, with "
            'on = "steps"; or score with store.codec = "dense"'
        )
    log_q = log_softmax(student.logits[student.mask] / temperature)  # (P, C)
    value = student.logits.new_zeros(student.mask.shape, dtype=torch.float32)
    return Places(value.masked_scatter(student.mask, scale * cross_entropy(log_q, targets)), student.mask)


@term()
def future_valence(student: Signals, batch: Batch, *, discount: Annotated[float, Field(ge=0, le=1)] = 0.95) -> Places:
    """(F_hat - F)^2 of the value head against the realised future valence, a Monte-Carlo fit.

    The valence is the data's column where there is one, else the model's own prefix confidence in the true label.
    """
    if student.valence is None:
        raise ValueError("term future_valence: the model has no value head; return 'valence' (B, T) beside 'logits'")
    own = prefix_confidence(student.logits.detach(), student.mask, batch.label)
    target, known = realised_future(own if batch.valence is None else batch.valence, student.mask, discount)
    return Places((student.valence.float() - target).square(), known)


def _places(signals: Signals, on: Where) -> tuple[Tensor, Tensor]:
    if on == "steps":
        return signals.logits, signals.mask
    return signals.sequence_logits(), signals.mask.any(1)


class Objective(nn.Module):
    """The weighted sum of a recipe's terms, kept as additive sums and counts until the very end."""

    def __init__(self, terms: Mapping[str, TermSpec]):
        super().__init__()
        self.weights = {name: spec.weight for name, spec in terms.items() if spec.weight > 0}
        self.needs = needs_of(terms)
        self.settings = {n: terms[n].settings for n in self.weights}
        learned = [n for n in self.weights if inspect.isclass(TERMS[n].make)]
        self.modules_by_term = nn.ModuleDict({n: TERMS[n].make(**self.settings[n]) for n in learned})

    def forward(self, student: Signals, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sums, counts), each (terms,) in the order of `weights`; both add over any split of the rows.

        Terms see zeros at invalid steps, and a teacher that takes no gradient.
        """
        student = student.valid()
        if batch.teacher:
            with torch.no_grad():
                batch = replace(batch, teacher=batch.teacher.valid())
        sums, counts = [], []
        for name in self.weights:
            value, mask = self._evaluate(name, student, batch)
            sums.append(torch.where(mask, value, 0.0).sum())
            counts.append(mask.sum())
        return torch.stack(sums), torch.stack(counts).to(sums[0].dtype)

    def _evaluate(self, name: str, student: Signals, batch: Batch) -> Places:
        if name in self.modules_by_term:
            return self.modules_by_term[name](student, batch)
        return TERMS[name].make(student, batch, **self.settings[name])

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss: sum over terms of weight * sum / count, a term without any place counting 0."""
        weight = torch.tensor(list(self.weights.values()), dtype=sums.dtype, device=sums.device)
        return (weight * sums / counts.clamp(min=1)).sum()


def needs_of(terms: Mapping[str, TermSpec]) -> frozenset[str]:
    """The teacher signals that a recipe's terms read: what scoring must store."""
    return frozenset().union(*(TERMS[n].needs for n, spec in terms.items() if spec.weight > 0))


def term_problems(terms: Mapping[str, TermSpec]) -> list[Problem]:
    """Every unknown term and every setting that a term's signature does not accept."""
    problems = []
    for name, spec in terms.items():
        if name not in TERMS:
            problems.append(Problem(f"terms.{name}", "no such term." + suggestion(name, TERMS)))
        else:
            problems += validate(_settings_model(TERMS[name].make), spec.settings, key=f"terms.{name}")[1]
    return problems


def _settings_model(make: Callable[..., Any]) -> Any:
    parameters = inspect.signature(make).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model("Settings", __config__=ConfigDict(extra="forbid"), **fields)
