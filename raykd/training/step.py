"""One optimiser step over a global batch, of which this process takes its share."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raykd.data.order import input_noise, mixed
from raykd.errors import Diverged, RecipeError
from raykd.generation.draft_log import DraftLog, DraftLogSpec
from raykd.generation.own_rows import LiveTeacher, OwnRows, replay_rows, write_rows
from raykd.generation.replay import Replay
from raykd.generation.sampling import LaterBatch
from raykd.generation.schedule import Schedule
from raykd.losses.terms import Answered, is_own
from raykd.losses.weighting import RowWeights, Spread, mean_spread
from raykd.quant.swap import roundable
from raykd.recipe.source import Source
from raykd.recipe.tables import Optim
from raykd.signals import Batch, Signals
from raykd.store.logits import Targets
from raykd.training import phases
from raykd.training.arm import Arm, World
from raykd.training.phases import Span
from raykd.training.prefetch import Ahead
from raykd.training.state import State
from raykd.training.throughput import Pace
from raykd.training.train_rows import TrainRows


class TrainStep:
    """One optimiser step at a time, with everything that no step changes made once."""

    def __init__(
        self,
        arm: Arm,
        optim: Optim,
        rows: TrainRows,
        world: World,
        state: State,
        live: LiveTeacher | Replay | None = None,
        kept: DraftLogSpec | None = None,
        micro: int | None = None,
    ):
        self.arm = arm
        self.optim = optim
        self.rows = rows
        self.world = world
        self.state = state
        self.micro = micro
        self.pace = Pace.begun(rows.device)
        self.form: AnswerForm | None = None  # of the student, once it is asked
        # of all terms, since the last report: counts known before the answers, and those of them
        terms = len(state.learner.objective.weights)
        self.foretold = torch.zeros(2, terms, dtype=torch.float64)
        self.spoilt = Spoilt.none(terms, rows.device)
        # the first rows of a global batch are the student's own
        self.num_own = arm.source.rows(optim.batch) if arm.source else 0
        self.device = rows.device
        self.share = world.share(optim.batch - self.num_own)
        self.places = slice(self.num_own + self.share.start, self.num_own + self.share.stop)
        self.order = rows.order(optim, arm.seed)
        self.weights = RowWeights.of(rows.saliency, arm.weighting) if arm.weighting else None
        self.spreads: list[Spread] = []  # of the row weights since the last report
        self.lags: list[int] = []  # of the student's text since then
        self.is_live = isinstance(live, LiveTeacher)
        self.temperatures: tuple[float, ...] = ()  # at which the terms read sparse targets
        reads = rows.readers and self.num_own < optim.batch
        self.ahead = Ahead(self._decoded, optim.steps, rows.readers) if reads else None
        assert live or not arm.source, "text of the student's own needs a live teacher, or a log"
        self.own_rows = self._own_rows(arm.source, live, kept) if arm.source and live else None

    def enter(self, span: Span) -> None:
        """Take the steps of a phase, over the parameters that it has."""
        learner = self.state.learner
        self.span = span
        self.parameters = list(learner.parameters())
        self.layers = [layer for _, layer in roundable(learner.student.module)]
        self.model: nn.Module = learner
        if self.world.size > 1 and not self.state.shards:
            self.model = DistributedDataParallel(learner, find_unused_parameters=True)

    def __call__(self) -> Tensor:
        """(2, terms): this rank's sums and counts of each term over its part of the batch."""
        number = self.state.step
        optimizer = self.state.optimizer
        seed = mixed(self.arm.seed, number)
        for layer in self.layers:
            layer.blend = self.span.blend(number)
        started = time.perf_counter()
        batches = self._batches(number, seed)
        self.pace.read(batches, time.perf_counter() - started)
        sums, counts = self._gradients(batches, number / self.optim.steps, seed)
        if isinstance(batches[0].targets, Targets):
            self.temperatures = tuple(batches[0].targets.decoded)
        terms = torch.stack([sums, counts])
        is_finite = self._clip().isfinite()
        self.spoilt = self.spoilt.noted(~is_finite, number, terms)
        # The optimiser leaves out a step whose gradient is not finite: to ask here whether it is
        # would wait for a GPU's queue.
        optimizer.found_inf = (~is_finite).to(torch.float32)  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = self.span.learning_rate(self.optim, number)
        optimizer.step()
        return terms

    def check_finite(self) -> None:
        """Diverged where a step since the beginning had a gradient that was not finite.

        All workers must ask together.
        """
        number = int(self.spoilt.step)
        if number >= 0:
            sums, counts = self.world.sum(self.spoilt.terms)
            raise Diverged(_diverged(self.state, self.arm, number, sums, counts))

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is scaled down where that is above `optim.clip`."""
        if self.state.shards:
            return self.state.shards.clip(self.parameters, self.optim.clip)
        return nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)

    def _gradients(self, batches: list[Batch], progress: float, seed: int) -> tuple[Tensor, Tensor]:
        """This rank's sums and counts; the gradient of the global loss is left in the parameters.

        With `micro` rows at a time the counts of the whole batch are known before the first of them
        is read, so that loss and gradient are those of the whole.
        """
        objective = self.state.learner.objective
        if self.micro is None:
            reseed(self.device, seed + 1 + self.world.rank)
            sums, counts = self.model(*batches, progress=progress)
            self.state.optimizer.zero_grad()
            objective.total(sums * self.world.size, self.world.sum(counts)).backward()
            return sums.detach(), counts
        parts = [part for batch in batches for part in in_parts(batch, self.micro)]
        form = self.form or self._form(batches[0])
        foretold = [objective.counts(form.answered(part), part, progress) for part in parts]
        everywhere = self.world.sum(torch.stack(foretold).sum(0))
        reseed(self.device, seed + 1 + self.world.rank)
        self.state.optimizer.zero_grad()
        sums = torch.zeros_like(everywhere)
        counts = torch.zeros_like(everywhere)
        calls = max(len(parts), self._most_parts(batches))
        for number in range(1, calls + 1):
            counts_here = number <= len(parts)  # the others go on in parts, of which it has no more
            with self._reduced(number == calls):
                part_sums, part_counts = self.model(
                    parts[min(number, len(parts)) - 1], progress=progress
                )
                part_sums = part_sums * counts_here
                objective.total(part_sums * self.world.size, everywhere).backward()
            sums += part_sums.detach()
            counts += part_counts * counts_here
        self.foretold = self.foretold.to(self.device)
        self.foretold += torch.stack([torch.stack(foretold).sum(0), counts])
        return sums, counts

    def _form(self, batch: Batch) -> "AnswerForm":
        """The form of the student's answers, which it is asked for once."""
        with self.state.whole():
            self.form = AnswerForm.of(self.state.student, batch)
        return self.form

    def _most_parts(self, batches: list[Batch]) -> int:
        """Of a student in parts: the calls of the worker with the most, which all must make."""
        if not self.state.shards or self.micro is None:
            return 0
        own = self.num_own
        rows = [own if batch.rollout else self.optim.batch - own for batch in batches]
        return sum(math.ceil(math.ceil(n / self.world.size) / self.micro) for n in rows)

    def _reduced(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients of all workers are summed once a step, with its last part."""
        if self.state.shards:
            self.state.shards.set_reduced(is_last)
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        return nullcontext()

    def _check_counts(self) -> None:
        """RecipeError where a term has counted elsewhere than it says beforehand."""
        wrong = (self.foretold[0] != self.foretold[1]).tolist()
        names = [
            name
            for name, is_wrong in zip(self.state.learner.objective.weights, wrong, strict=True)
            if is_wrong
        ]
        if names:
            raise RecipeError(
                f"scale.micro: terms.{names[0]} counted at other places than its `counts` says, so "
                "the loss was not that of the whole batch; mend that, or leave scale.micro out"
            )
        self.foretold.zero_()

    def close(self) -> None:
        """End the thread that makes batches ahead."""
        if self.ahead:
            self.ahead.close()

    def extra_metrics(self) -> dict[str, Any]:
        """What is reported beside the terms since the last call.

        `weights` is the mean spread of row weights, `lag` the greatest age of the student's text.
        Errors as of `check_finite`.
        """
        self.check_finite()
        self._check_counts()
        metrics: dict[str, Any] = {}
        if self.spreads:
            metrics["weights"] = mean_spread(self.spreads)
        if self.lags:
            metrics["lag"] = max(self.lags)
        self.spreads.clear()
        self.lags.clear()
        return metrics

    def _batches(self, number: int, seed: int) -> list[Batch]:
        """The data's rows and the student's own, of which either may be none."""
        batches: list[Batch] = []
        if self.num_own < self.optim.batch:
            batch = self.ahead(number) if self.ahead else self._batch(number, seed)
            batches.append(self._weighed(number, batch))
        if self.own_rows and self.own_rows.counts(number):
            batch = self.own_rows(number)
            assert batch.rollout is not None
            if self.is_live:
                self.lags.append(batch.rollout.lag)
            batches.append(batch)
        return batches

    def _own_rows(
        self, source: Source, live: LiveTeacher | Replay, kept: DraftLogSpec | None
    ) -> OwnRows:
        """What gives each step its rows of the student's own text."""
        share = self.world.share(self.num_own)
        seed = self.arm.seed
        spans = [
            (spec.since * self.optim.steps, spec.until * self.optim.steps)
            for name, spec in self.arm.terms.items()
            if is_own(name)
        ]
        if isinstance(live, Replay):
            return OwnRows(
                Schedule(),
                lambda group: replay_rows(live, self.num_own, seed, group, share=share),
                spans,
            )
        begins = [span.first for span in phases.spans(self.arm.phases, self.optim.steps)]
        schedule = Schedule(source.passes, source.ahead, self.optim.evaluate_every, begins)

        def draw(group: int) -> LaterBatch:
            index = torch.from_numpy(self.order.rows(group, share))
            rows = self.rows.batch(index.to(self.device))
            with self.state.whole():
                student = self.state.student.module
                return write_rows(
                    source, live.text, group, seed, student, live.teacher, rows, share=share
                )

        own_rows = OwnRows(schedule, draw, spans)
        if kept:
            intervals = own_rows.intervals(self.optim.steps)
            own_rows.log = DraftLog(kept, intervals, self.num_own, share)
        return own_rows

    def _decoded(self, number: int) -> Batch:
        """The batch of a step, its sparse targets decoded where an earlier step has read them."""
        batch = self._batch(number, mixed(self.arm.seed, number))
        if batch.targets:
            for temperature in self.temperatures:
                batch.targets(temperature)
        return batch

    def _weighed(self, number: int, batch: Batch) -> Batch:
        """The batch with its rows' weights.

        Every rank knows the saliency of the whole global batch.
        """
        if self.weights is None:
            return batch
        weight, spread = self.weights(self.order.rows(number)[self.num_own :], self.share)
        self.spreads.append(spread)
        return replace(batch, weight=torch.from_numpy(weight).to(self.device))

    def _batch(self, number: int, seed: int) -> Batch:
        self.rows.expect(self.order, number, self.places)
        index = torch.from_numpy(self.order.rows(number, self.places))
        noise = input_noise(self.optim, self.rows.row_shape, seed)
        if noise is not None:
            noise = noise[self.share].to(self.device)
        return self.rows.batch(index.to(self.device), noise)


class Spoilt(NamedTuple):
    """The first step whose gradient was not finite, on the device: nothing is asked of it."""

    step: Tensor  # () int64; -1: there is none
    terms: Tensor  # (2, terms): this rank's sums and counts of that step

    @classmethod
    def none(cls, terms: int, device: torch.device) -> "Spoilt":
        step = torch.full((), -1, dtype=torch.int64, device=device)
        return cls(step, torch.zeros(2, terms, device=device))

    def noted(self, is_bad: Tensor, step: int, terms: Tensor) -> "Spoilt":
        """The same after one more step."""
        is_first = is_bad & (self.step < 0)
        number = torch.where(is_first, step, self.step)
        return Spoilt(number, torch.where(is_first, terms, self.terms))


@dataclass(frozen=True)
class AnswerForm:
    """How many steps a student's answer and inner layers have, whatever the rows."""

    once: bool  # whether it answers once a row
    layers: dict[str, int]

    @classmethod
    @torch.no_grad()
    def of(cls, student: nn.Module, batch: Batch) -> "AnswerForm":
        """The form of what a student answers to the first row of a batch."""
        was_training = student.training
        said: Signals = student.eval()(batch.inputs[:1], batch.mask[:1])
        student.train(was_training)
        layers = {name: layer.shape[1] for name, layer in said.layers.items()}
        return cls(said.mask.shape[1] != batch.mask.shape[1], layers)

    def answered(self, batch: Batch) -> Answered:
        """What is known of the student's answers to a batch before it gives them."""
        mask = torch.ones_like(batch.mask[:, :1]) if self.once else batch.mask
        return Answered(mask, self.layers)


def in_parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch as batches of at most so many rows."""
    for first in range(0, len(batch.row_id), rows):
        yield batch.rows(slice(first, first + rows))


def reseed(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout on `device` draws from.

    Not torch.manual_seed: without a GPU it remembers a stack trace a call, for the day CUDA wakes.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _diverged(state: State, arm: Arm, step: int, sums: Tensor, counts: Tensor) -> str:
    means = (sums / counts.clamp(min=1)).tolist()
    by_name = zip(state.learner.objective.weights, means, strict=True)
    terms = ", ".join(f"{name} {value:.3g}" for name, value in by_name)
    return (
        f"arm {arm.key}: the gradient is not finite at step {step} ({terms}); "
        "lower optim.learning_rate"
    )
