"""The parts of a training: which quantisation a step has, how far it is faded in, and at what
learning rate.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from raykd.quant import other_parameters, swap
from raykd.recipe.quant import Quant
from raykd.recipe.tables import Optim, Phase, ends_of

WHOLE = Phase(until=1.0)


@dataclass(frozen=True)
class Span:
    """The steps [first, last) of one phase."""

    phase: Phase
    first: int
    last: int

    def learning_rate(self, optim: Optim, step: int) -> float:
        """Linear warm-up over the first `warmup` share of the phase, then what `schedule` says:
        decay to zero at its end in a line or a half wave, or none.
        """
        steps = self.last - self.first
        number = step - self.first
        warm = optim.warmup * steps
        rise = (number + 1) / warm if number + 1 < warm else 1.0
        left = (steps - number) / max(steps - warm, 1.0)
        if optim.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * min(left, 1.0))
        elif optim.schedule == "constant":
            left = 1.0
        return self.phase.rate * optim.learning_rate * min(rise, left)

    def blend(self, step: int) -> float:
        """How far rounding is faded in: from near 0 to 1 over the phase's first `blend` share."""
        fading = self.phase.blend * (self.last - self.first)
        return min(1.0, (step - self.first + 1) / fading) if fading else 1.0


def spans(phases: Sequence[Phase], steps: int) -> list[Span]:
    """The phases as steps; one whole phase in full precision where there are none."""
    ends = ends_of(phases or [WHOLE], steps)
    return [Span(p, a, b) for p, a, b in zip(phases or [WHOLE], [0, *ends[:-1]], ends, strict=True)]


def prepare(module: nn.Module, phases: Iterable[Phase]) -> None:
    """Swap in layers that can be rounded, wherever some phase quantises."""
    quants = [phase.quant for phase in phases if phase.quant]
    for quant in quants:
        swap.prepare(module, quant)
    if any(quant.rest == "int8" for quant in quants):
        other_parameters.prepare(module, {layer for _, layer in swap.quantised(module)})


def enter(module: nn.Module, phase: Phase) -> None:
    """Give every prepared layer the phase's Quant, or full precision where it is skipped.

    A stored parameter takes every Quant: `rest` says how it is stored, and `skip` names layers.
    """
    for name, part in swap.roundable(module):
        quant = phase.quant
        is_skipped = isinstance(part, swap.QuantLayer) and quant is not None and quant.skips(name)
        part.set(None if is_skipped else quant)


def round_as(module: nn.Module, quant: Quant) -> None:
    """Let a module in full precision compute as a Quant says, its scales from the weights as they
    are.
    """
    phase = Phase(until=1.0, quant=quant)
    prepare(module, [phase])
    enter(module, phase)
