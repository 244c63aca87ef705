"""A recipe's `[source]`: the batches that the student writes, each a pure function of (seed, step,
its weights).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from raykd.data.order import ShuffledStream, mixed
from raykd.errors import DataError
from raykd.generation.draft_log import DraftLog
from raykd.generation.drafts import draft_rows
from raykd.generation.replay import Replay
from raykd.generation.sampling import LaterBatch, Teacher, cut_prompts, on_policy
from raykd.generation.schedule import Schedule
from raykd.recipe.source import Source
from raykd.signals import Batch

REPLAYED = 2  # the order of a log's drafts, beside those of the rows


@dataclass(frozen=True)
class TextShape:
    """What ends a text, how many real tokens there are, and how many positions the student takes."""

    steps: int
    eos: int | None = None
    vocab: int | None = None


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that scores while the student trains, and what a text is to both."""

    teacher: Teacher
    text: TextShape


def write_rows(
    source: Source,
    text: TextShape,
    group: int,
    seed: int,
    student: nn.Module,
    teacher: Teacher,
    rows: Batch,
    *,
    share: slice,
) -> LaterBatch:
    """The group of rows named `group`: this worker's rows continued by the student, from their
    prompts or one cut.

    It is written now; the batch is given once the teacher has scored it.

    `share` are this worker's rows of the global batch. Cut and uniforms are those of the global
    batch, drawn by (seed, group). DataError where a row can not be cut so that `source.length`
    tokens follow.
    """
    most = min(rows.inputs.shape[1], text.steps + 1 - source.length)
    if most < 1:
        raise DataError(
            f"source.length = {source.length} leaves no position for a prompt: the student was built for "
            f"{text.steps}; give at most {text.steps}"
        )
    draw = torch.Generator().manual_seed(mixed(seed, group))
    cut = int(torch.randint(1, most + 1, (), generator=draw))
    numbers = source.length if source.kind == "on_policy" else 2 * source.length + 1
    uniforms = torch.rand((share.stop, numbers), dtype=torch.double, generator=draw)[share]
    make = draft_rows if source.kind == "drafts" else partial(on_policy, mixed=source.mixed)
    return make(
        student,
        teacher,
        cut_prompts(rows.inputs, rows.mask, cut, most),
        row_id=rows.row_id,
        uniforms=uniforms.to(rows.inputs.device),
        temperature=source.temperature,
        eos=text.eos,
        vocab=text.vocab,
    )


def replay_rows(replay: Replay, own: int, seed: int, group: int, *, share: slice) -> LaterBatch:
    """This worker's `share` of the `own` drafts of a log that a step reads, in an order drawn by
    the seed.
    """
    index = ShuffledStream(np.arange(len(replay)), seed, REPLAYED).take(group * own, own)[share]
    return lambda: replay.batch(index)


@dataclass
class OwnRows:
    """The same for each step in turn, by a schedule: groups are drawn when due and held while they
    are used.

    Call it with every step from a report's boundary or a phase's begin on, before that step's
    update.
    """

    schedule: Schedule
    draw: Callable[[int], LaterBatch]  # a group -> its batch, by the student as it is
    spans: Sequence[tuple[float, float]] = (
        (0, math.inf),
    )  # the steps [since, until) in which its terms count
    held: dict[int, LaterBatch] = field(default_factory=dict)
    log: DraftLog | None = None  # where drafts are kept

    def counts(self, step: int) -> bool:
        """Whether any term counts in the interval of a step: in others nothing is drawn."""
        first = self.schedule.begin(step)
        return any(
            first < until and since < first + self.schedule.every for since, until in self.spans
        )

    def intervals(self, steps: int) -> list[list[int]]:
        """The groups that are used within `steps`, by the intervals between reports that they are
        drawn in.
        """
        found: dict[int, list[int]] = {}
        for step in range(steps):
            if self.counts(step) and self.schedule.slot(step).first == step:
                found.setdefault(self.schedule.begin(step), []).append(step)
        return list(found.values())

    def __call__(self, step: int) -> Batch:
        slot = self.schedule.slot(step)
        for group in self.schedule.due(step):
            self.held[group] = self.draw(group)
        self.held = {group: batch for group, batch in self.held.items() if group >= slot.first}
        batch = self.held[slot.first]()
        self.held[slot.first] = lambda: batch
        assert batch.rollout is not None
        if self.log and step == slot.first:
            self.log.add(step, batch)
        return replace(batch, rollout=replace(batch.rollout, lag=step - slot.drawn))
