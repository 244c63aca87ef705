"""When the student's text is drawn and when it is used: a pure function of the step.

So a resumed training repeats it. A group drawn at step s serves `passes` steps in a row, from s +
`ahead` on. No group crosses the boundary of a report, because a training resumes there, or the
begin of a phase, because that changes the student. The groups of an interval's first steps are all
drawn at its begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """The group that a step uses."""

    first: int  # the first step that uses it; this names the group
    drawn: int  # the step at which it is drawn


@dataclass(frozen=True)
class Schedule:
    """The schedule of a training's own text."""

    passes: int = 1  # steps in a row that use a group
    ahead: int = 0  # steps between drawing a group and its first use
    every: int = 1  # optim.evaluate_every
    begins: Sequence[int] = (0,)  # the first steps of the phases

    def begin(self, step: int) -> int:
        """The first step of the interval that a step lies in."""
        return max(step - step % self.every, *(first for first in self.begins if first <= step))

    def slot(self, step: int) -> Slot:
        """The group that a step uses. Its lag there is step - drawn, at most ahead + passes - 1."""
        begin = self.begin(step)
        first = step - (step - begin) % self.passes
        return Slot(first, max(begin, first - self.ahead))

    def due(self, step: int) -> list[int]:
        """The first steps of the groups to draw at a step, before its update."""
        begin = self.begin(step)
        firsts = range(step, step + self.ahead + 1)
        return [
            first
            for first in firsts
            if self.begin(first) == begin and self.slot(first) == Slot(first, step)
        ]
