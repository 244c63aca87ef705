"""A recipe's `[source]`: batches that the student writes.

Each is a pure function of the seed, the step and the student's weights.
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

REPLAYED = 2  # names the order of a log's drafts, apart from those of the rows


@dataclass(frozen=True)
class TextShape:
    """What a text is to a model."""

    steps: int  # positions that the student takes
    eos: int | None = None  # the token that ends a text
    vocab: int | None = None  # real tokens, where heads are padded


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that scores while the student trains, and what a text is to the two."""

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
    """The group of rows named `group`: this worker's `rows`, continued by the student.

    They are continued from their prompts, or from one cut that the whole batch shares. The text is
    written now; the batch waits for the teacher's scores.

    `share` says which rows of the global batch these are. The cut and the uniforms are the global
    batch's, drawn by (seed, group). DataError if no cut leaves room for `source.length` tokens.
    """
    most = min(rows.inputs.shape[1], text.steps + 1 - source.length)
    if most < 1:
        raise DataError(
            f"source.length = {source.length} leaves no position for a prompt: the student was "
            f"built for {text.steps}; give at most {text.steps}"
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
    """This worker's `share` of the `own` drafts of a log that a step reads; the seed shuffles."""
    stream = ShuffledStream(np.arange(len(replay)), own, seed, REPLAYED)
    index = stream.take(group * own, own)[share]
    return lambda: replay.batch(index)


@dataclass
class OwnRows:
    """The student's own rows for each step in turn: groups are drawn when due, and kept while used.

    Call it with every step, before that step's update, from the boundary of a report or the begin
    of a phase on.
    """

    schedule: Schedule
    draw: Callable[[int], LaterBatch]  # a group -> its batch, by the student as it is
    # the steps [since, until) in which its terms count
    spans: Sequence[tuple[float, float]] = ((0, math.inf),)
    drawn: dict[int, LaterBatch] = field(default_factory=dict)  # groups that are still used
    log: DraftLog | None = None  # where drafts are kept

    def counts(self, step: int) -> bool:
        """Whether any term counts in the interval of a step. Elsewhere nothing is drawn."""
        first = self.schedule.begin(step)
        last = first + self.schedule.every
        return any(first < until and since < last for since, until in self.spans)

    def intervals(self, steps: int) -> list[list[int]]:
        """The groups that `steps` use, in a list for each interval between reports."""
        groups: dict[int, list[int]] = {}
        for step in range(steps):
            if self.counts(step) and self.schedule.slot(step).first == step:
                groups.setdefault(self.schedule.begin(step), []).append(step)
        return list(groups.values())

    def __call__(self, step: int) -> Batch:
        slot = self.schedule.slot(step)
        for group in self.schedule.due(step):
            self.drawn[group] = self.draw(group)
        self.drawn = {group: batch for group, batch in self.drawn.items() if group >= slot.first}
        batch = self.drawn[slot.first]()
        self.drawn[slot.first] = lambda: batch
        assert batch.rollout is not None
        if self.log and step == slot.first:
            self.log.add(step, batch)
        return replace(batch, rollout=replace(batch.rollout, lag=step - slot.drawn))
