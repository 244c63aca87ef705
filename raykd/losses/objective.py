"""How a recipe's terms become one loss: additive sums and counts until the very end."""

import inspect
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.losses import shared_terms  # noqa: F401 - registers the terms that all techniques share
from raykd.losses.terms import TERMS, Answered, TermValues, needs_of
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals


def learned_terms(terms: Mapping[str, TermSpec]) -> list[str]:
    """The terms that count and have parameters of their own."""
    return [
        name
        for name, spec in terms.items()
        if spec.weight > 0 and inspect.isclass(TERMS[name].make)
    ]


class Objective(nn.Module):
    """The weighted sum of a recipe's terms.

    Each term is the mean over its places. Where the batch has row weights, it is the mean over rows
    of the row's weight times the mean over the row's places.

    `example`, a student's signals and their batch, builds the terms that learn. Terms of the
    student's own text count in batches of such text, all others in batches of the data.
    """

    def __init__(
        self, terms: Mapping[str, TermSpec], example: tuple[Signals, Batch] | tuple[()] = ()
    ):
        super().__init__()
        self.specs = {name: spec for name, spec in terms.items() if spec.weight > 0}
        self.needs = needs_of(self.specs)
        names = learned_terms(terms)
        assert example or not names, f"{', '.join(names)} learn, and need an example"
        self.modules_by_term = nn.ModuleDict(
            {name: TERMS[name].make(*example, **terms[name].settings) for name in names}
        )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that counts, by name."""
        return {name: spec.weight for name, spec in self.specs.items()}

    def forward(
        self, student: Signals, batch: Batch, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The sum and the count of each term, each (terms,) in the order of `weights`.

        `progress` is the share of the steps that are done: a term counts from its `since` to its
        `until`. Sums and counts add over any split of the rows into micro-batches or workers. Terms
        see zeros at invalid steps, and a teacher that takes no gradient.
        """
        student = student.valid(batch.mask)
        if batch.teacher:
            with torch.no_grad():
                batch = replace(batch, teacher=batch.teacher.valid(batch.mask))
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        for name, spec in self.specs.items():
            term_sum, count = self._sum(name, spec, student, batch, progress)
            sums.append(term_sum)
            counts.append(count)
        return torch.stack(sums), torch.stack(counts).to(sums[0].dtype)

    def counts(self, answered: Answered, batch: Batch, progress: float = 0.0) -> Tensor:
        """The count of each term, as `forward` gives it, before the student has answered.

        Every term must say where it counts.
        """
        counts: list[Tensor] = []
        for name, spec in self.specs.items():
            if not self._is_due(name, spec, batch, progress):
                counts.append(batch.mask.new_zeros((), dtype=torch.int64))
                continue
            where = TERMS[name].counts
            assert where is not None, f"terms.{name} does not say where it counts"
            mask = where(answered, batch, **TERMS[name].settings(spec.settings))
            counts.append(mask.sum() if batch.weight is None else _of_rows(mask).sum())
        return torch.stack(counts).to(torch.float32)

    def _is_due(self, name: str, spec: TermSpec, batch: Batch, progress: float) -> bool:
        """Whether a term counts in this kind of batch, at this time."""
        of_this_kind = TERMS[name].own == (batch.rollout is not None)
        return of_this_kind and spec.since <= progress < spec.until

    def _sum(
        self, name: str, spec: TermSpec, student: Signals, batch: Batch, progress: float
    ) -> tuple[Tensor, Tensor]:
        """A term's sum and count."""
        if not self._is_due(name, spec, batch, progress):
            no_sum = student.mask.new_zeros((), dtype=torch.float32)
            no_count = student.mask.new_zeros((), dtype=torch.int64)
            return no_sum, no_count
        value, mask = self._values(name, spec, student, batch)
        if value.shape != mask.shape:  # they would be laid over each other, and some count twice
            raise RecipeError(
                f"terms.{name}: gives values {tuple(value.shape)} and where they count "
                f"{tuple(mask.shape)}; give both one shape, (B,) or (B, T)"
            )
        value = torch.where(mask, value, 0.0)
        if batch.weight is None:
            return value.sum(), mask.sum()
        count = mask.reshape(len(mask), -1).sum(1)
        mean = value.reshape(len(mask), -1).sum(1) / count.clamp(min=1)
        weighted = mean * batch.weight if spec.weighted else mean
        return weighted.sum(), _of_rows(mask).sum()

    def _values(self, name: str, spec: TermSpec, student: Signals, batch: Batch) -> TermValues:
        if name in self.modules_by_term:
            return self.modules_by_term[name](student, batch)
        if TERMS[name].dtype == "float64":
            student = student.double()
            teacher = batch.teacher and batch.teacher.double()
            batch = replace(batch, teacher=teacher)
            value, mask = TERMS[name].make(student, batch, **spec.settings)
            return TermValues(value.float(), mask)
        return TERMS[name].make(student, batch, **spec.settings)

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss: the sum over terms of weight * sum / count. A term without places adds 0."""
        weight = torch.tensor(list(self.weights.values()), dtype=sums.dtype, device=sums.device)
        return (weight * sums / counts.clamp(min=1)).sum()


def _of_rows(mask: Tensor) -> Tensor:
    """(B,): whether a row has a place that counts."""
    return mask.reshape(len(mask), -1).any(1)
