"""How a recipe's terms become one loss: additive sums and counts until the very end."""

import inspect
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from raykd.losses import shared_terms  # noqa: F401 - registers the terms that all techniques share
from raykd.losses.terms import TERMS, TermValues, needs_of
from raykd.recipe.recipe import TermSpec
from raykd.signals import Batch, Signals


def learned_terms(terms: Mapping[str, TermSpec]) -> list[str]:
    """The terms that count and have parameters of their own."""
    return [
        name
        for name, spec in terms.items()
        if spec.weight > 0 and inspect.isclass(TERMS[name].make)
    ]


class Objective(nn.Module):
    """The weighted sum of a recipe's terms. `example`, a student's signals and their batch, builds
    terms that learn.

    Each term is the mean over its places; where the batch has row weights, the mean over rows of
    weight times the mean over a row's places. `progress` is the share of the steps that are done:
    it says which terms count. Terms of the student's own text count in batches of that, all others
    in the data's.
    """

    def __init__(
        self, terms: Mapping[str, TermSpec], example: tuple[Signals, Batch] | tuple[()] = ()
    ):
        super().__init__()
        self.specs = {name: spec for name, spec in terms.items() if spec.weight > 0}
        self.needs = needs_of(self.specs)
        self.progress = 0.0
        makes = {n: TERMS[n].make for n in learned_terms(terms)}
        assert example or not makes, f"{', '.join(makes)} learn, and need an example"
        self.modules_by_term = nn.ModuleDict(
            {n: make(*example, **terms[n].settings) for n, make in makes.items()}
        )

    @property
    def weights(self) -> dict[str, float]:
        return {name: spec.weight for name, spec in self.specs.items()}

    def forward(self, student: Signals, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sums, counts), each (terms,) in the order of `weights`; both add over any split of the
        rows.

        Terms see zeros at invalid steps, and a teacher that takes no gradient.
        """
        student = student.valid(batch.mask)
        if batch.teacher:
            with torch.no_grad():
                batch = replace(batch, teacher=batch.teacher.valid(batch.mask))
        found = [self._sum(name, spec, student, batch) for name, spec in self.specs.items()]
        return torch.stack([s for s, _ in found]), torch.stack([c for _, c in found]).to(
            found[0][0].dtype
        )

    def _sum(
        self, name: str, spec: TermSpec, student: Signals, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """A term's sum and count."""
        counts = TERMS[name].own == (batch.rollout is not None)
        if not counts or not spec.since <= self.progress < spec.until:
            return student.logits.new_zeros((), dtype=torch.float32), student.mask.new_zeros(
                (), dtype=torch.int64
            )
        value, mask = self._places(name, spec, student, batch)
        value = torch.where(mask, value, 0.0)
        if batch.weight is None:
            return value.sum(), mask.sum()
        count = mask.reshape(len(mask), -1).sum(1)
        mean = value.reshape(len(mask), -1).sum(1) / count.clamp(min=1)
        return (mean * batch.weight if spec.weighted else mean).sum(), (count > 0).sum()

    def _places(self, name: str, spec: TermSpec, student: Signals, batch: Batch) -> TermValues:
        if name in self.modules_by_term:
            return self.modules_by_term[name](student, batch)
        return TERMS[name].make(student, batch, **spec.settings)

    def total(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss: sum over terms of weight * sum / count, a term without any place counting 0."""
        weight = torch.tensor(list(self.weights.values()), dtype=sums.dtype, device=sums.device)
        return (weight * sums / counts.clamp(min=1)).sum()
