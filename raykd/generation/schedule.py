"""When the student's text is drawn and when it is used: a pure function of the step, so that a
resume repeats it.

A group drawn at step s serves `passes` steps in a row, from s + `ahead` on. Nothing is carried over
a report's boundary, for a training resumes at those, or over the begin of a phase, which changes
the student: the groups of an interval's first steps are all drawn at its begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A step's group: the first step that uses it, which names it, and the step at which it is
    drawn.
    """

    first: int
    drawn: int


@dataclass(frozen=True)
class Schedule:
    """`every` is optim.evaluate_every, `begins` are the first steps of the phases."""

    passes: int = 1
    ahead: int = 0
    every: int = 1
    begins: Sequence[int] = (0,)

    def begin(self, step: int) -> int:
        """The first step of the interval that a step lies in."""
        return max(step - step % self.every, *(b for b in self.begins if b <= step))

    def slot(self, step: int) -> Slot:
        """The group that a step uses. Its lag there is step - drawn, at most ahead + passes - 1."""
        begin = self.begin(step)
        first = step - (step - begin) % self.passes
        return Slot(first, max(begin, first - self.ahead))

    def due(self, step: int) -> list[int]:
        """The first steps of the groups to draw at a step, before its update."""
        begin = self.begin(step)
        ahead = range(step, step + self.ahead + 1)
        return [f for f in ahead if self.begin(f) == begin and self.slot(f) == Slot(f, step)]
