"""The training loop: plain torch, one process or DDP. It knows no Ray.

Everything random is a pure function of (seed, step): the order of rows, the noise on inputs,
torch's generator. So a checkpoint is tensors and a position, any number of workers sees the same
global batches, and a run that was killed and resumed ends with the weights of one that was not.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raykd.data.order import Order, input_noise, mixed
from raykd.errors import Diverged
from raykd.files import faults
from raykd.generation.draft_log import DraftLog, Kept, Replay
from raykd.generation.own_rows import Live, Written, replayed, written
from raykd.generation.sampling import Later
from raykd.generation.schedule import Schedule
from raykd.losses.objective import Objective, learned
from raykd.losses.terms import is_own
from raykd.losses.weighting import RowWeights, Spread, mean_spread
from raykd.models.adapter import Adapter
from raykd.quant.swap import roundable
from raykd.recipe.recipe import Optim, Phase, TermSpec, Weighting
from raykd.recipe.source import Source
from raykd.signals import Batch, Signals
from raykd.store.logits import Targets
from raykd.training import phases
from raykd.training.checkpoints import Checkpoints
from raykd.training.device_rows import DeviceRows
from raykd.training.phases import Span
from raykd.training.prefetch import Ahead
from raykd.training.state import Learner, State

Report = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Arm:
    """One training: the student under its terms, or the control under labels only.

    `source` are rows of its own.
    """

    name: str
    seed: int
    terms: dict[str, TermSpec]
    weighting: Weighting | None = None
    phases: tuple[Phase, ...] = ()
    source: Source | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-{self.seed}"


@dataclass(frozen=True)
class World:
    """This process among the workers."""

    rank: int = 0
    size: int = 1

    def share(self, batch: int) -> slice:
        """This rank's contiguous part of a global batch; parts differ by at most one row."""
        bounds = np.linspace(0, batch, self.size + 1).round().astype(int)
        return slice(int(bounds[self.rank]), int(bounds[self.rank + 1]))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


def train(
    arm: Arm,
    optim: Optim,
    student: Adapter,
    rows: DeviceRows,
    evaluate: Callable[[nn.Module], dict[str, float]],
    *,
    world: World = World(),
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    report: Report = lambda step, metrics: None,
    live: Live | Replay | None = None,
    kept: Kept | None = None,
) -> State:
    """The student trained by `arm` for `optim.steps` steps, resumed from `checkpoints` where they
    have a state.

    An arm with a source writes text of its own, which the `live` teacher scores, or reads drafts of
    a log. Drafts that are written are `kept` where that is given. `report(step, metrics)` is called
    every `optim.evaluate_every` steps and after the last, on every rank, with the mean of each term
    since the last call and what `evaluate(student)` says.
    """
    device = rows.device
    learner = Learner(student, objective_of(arm, student, rows)).to(device)
    adamw = torch.optim.AdamW(
        learner.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True
    )
    state = State(learner, adamw)
    plan = phases.spans(arm.phases, optim.steps)
    resumed = checkpoints.newest() if checkpoints else None
    begun = [span for span in plan if span.first < (resumed[0] if resumed else 1)]
    for (
        span
    ) in begun:  # in their order, so that the optimiser's parameters are those of the checkpoint
        state.begin(span)
    if checkpoints:
        state.restore(checkpoints)
    learner.train()
    step = Step(arm, optim, rows, world, state, live, kept)
    seen = torch.zeros(2, len(learner.objective.weights), device=device)
    with closing(step):
        for span in plan[len(begun) - 1 :]:
            if span not in begun:
                state.begin(span)
            step.enter(span)
            while state.step < span.last:
                started = clock(device)
                seen += step()
                state.step += 1
                state.seconds += clock(device) - started
                faults.point("train", step=state.step, rank=world.rank, arm=arm.key)
                if state.step % optim.evaluate_every == 0 or state.step == span.last:
                    state.history.append(_summary(state, world.sum(seen), step.told(), evaluate))
                    seen.zero_()
                    report(state.step, state.history[-1])
                    if arm.phases:
                        state.judge(span)
                    if (
                        checkpoints
                        and world.rank == 0
                        and _due(state, span, optim, checkpoint_every)
                    ):
                        state.save(checkpoints)
            state.end()
    return state


def objective_of(arm: Arm, student: Adapter, rows: DeviceRows) -> Objective:
    """The arm's objective; terms that learn are built from what the student says of one row, drawn
    by the seed.
    """
    if not learned(arm.terms):
        return Objective(arm.terms)
    with torch.no_grad():
        batch = rows.batch(torch.zeros(1, dtype=torch.int64, device=rows.device))
        said: Signals = student.to(rows.device).eval()(batch.inputs, batch.mask)
    torch.manual_seed(mixed(arm.seed, len(arm.terms)))
    return Objective(arm.terms, (said, batch))


class Step:
    """One optimiser step at a time, with everything that no step changes made once."""

    def __init__(
        self,
        arm: Arm,
        optim: Optim,
        rows: DeviceRows,
        world: World,
        state: State,
        live: Live | Replay | None = None,
        kept: Kept | None = None,
    ):
        self.arm, self.optim, self.rows, self.world, self.state = arm, optim, rows, world, state
        self.own = (
            arm.source.rows(optim.batch) if arm.source else 0
        )  # of the global batch, its first
        self.device, self.share = rows.device, world.share(optim.batch - self.own)
        self.order = Order(rows.labelled.cpu().numpy(), optim, arm.seed)
        self.weights = RowWeights.of(rows.saliency, arm.weighting)
        self.spreads: list[Spread] = []  # of the row weights since the last report
        self.lags: list[int] = []  # of the student's text since then
        self.is_live = isinstance(live, Live)
        self.temperatures: tuple[float, ...] = ()  # at which the terms read sparse targets
        self.ahead = (
            Ahead(self._decoded, optim.steps) if rows.mapped and self.own < optim.batch else None
        )
        assert live or not arm.source, "text of the student's own needs a live teacher, or a log"
        self.written = self._writer(arm.source, live, kept) if arm.source and live else None

    def enter(self, span: Span) -> None:
        """Take the steps of a phase, over the parameters that it has."""
        learner = self.state.learner
        self.span, self.parameters = span, list(learner.parameters())
        self.layers = [layer for _, layer in roundable(learner.student.module)]
        self.model: nn.Module = learner
        if self.world.size > 1:
            self.model = DistributedDataParallel(learner, find_unused_parameters=True)

    def __call__(self) -> Tensor:
        """(2, terms): this rank's sums and counts of each term over its part of the batch."""
        number, objective, optimizer = (
            self.state.step,
            self.state.learner.objective,
            self.state.optimizer,
        )
        seed = mixed(self.arm.seed, number)
        objective.progress = number / self.optim.steps
        for layer in self.layers:
            layer.blend = self.span.blend(number)
        batches = self._batches(number, seed)
        reseed(self.device, seed + 1 + self.world.rank)
        sums, counts = self.model(*batches)
        if isinstance(batches[0].targets, Targets):
            self.temperatures = tuple(batches[0].targets.asked)
        optimizer.zero_grad()
        objective.total(sums * self.world.size, self.world.sum(counts)).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)
        if not math.isfinite(norm):
            raise Diverged(
                _diverged(self.state, self.arm, self.world.sum(sums), self.world.sum(counts))
            )
        for group in optimizer.param_groups:
            group["lr"] = self.span.learning_rate(self.optim, number)
        optimizer.step()
        return torch.stack([sums.detach(), counts])

    def close(self) -> None:
        if self.ahead:
            self.ahead.close()

    def told(self) -> dict[str, Any]:
        """What is reported beside the terms since the last call: of row weights, and how old the
        student's text was.
        """
        found: dict[str, Any] = {"weights": mean_spread(self.spreads)} if self.spreads else {}
        found |= {"lag": max(self.lags)} if self.lags else {}
        self.spreads.clear()
        self.lags.clear()
        return found

    def _batches(self, number: int, seed: int) -> list[Batch]:
        """The data's rows and the student's own, of which either may be none."""
        found = []
        if self.own < self.optim.batch:
            found.append(
                self._weighed(
                    number, self.ahead(number) if self.ahead else self._batch(number, seed)
                )
            )
        if self.written and self.written.counts(number):
            found.append(self.written(number))
            assert found[-1].rollout is not None
            self.lags += [found[-1].rollout.lag] if self.is_live else []
        return found

    def _writer(self, source: Source, live: Live | Replay, kept: Kept | None) -> Written:
        """What gives each step its rows of the student's own text."""
        share, seed = self.world.share(self.own), self.arm.seed
        spans = [
            (s.since * self.optim.steps, s.until * self.optim.steps)
            for n, s in self.arm.terms.items()
            if is_own(n)
        ]
        if isinstance(live, Replay):
            return Written(
                Schedule(), lambda group: replayed(live, self.own, seed, group, share=share), spans
            )
        begins = [span.first for span in phases.spans(self.arm.phases, self.optim.steps)]
        schedule = Schedule(source.passes, source.ahead, self.optim.evaluate_every, begins)

        def draw(group: int) -> Later:
            index = torch.from_numpy(self.order.rows(group)[: self.own][share]).to(self.device)
            student, rows = self.state.learner.student.module, self.rows.batch(index)
            return written(source, live.text, group, seed, student, live.teacher, rows, share=share)

        found = Written(schedule, draw, spans)
        if kept:
            found.log = DraftLog(kept, found.intervals(self.optim.steps), self.own, share)
        return found

    def _decoded(self, number: int) -> Batch:
        """The batch of a step, its sparse targets decoded where an earlier step has read them."""
        batch = self._batch(number, mixed(self.arm.seed, number))
        if batch.targets:
            for temperature in self.temperatures:
                batch.targets(temperature)
        return batch

    def _weighed(self, number: int, batch: Batch) -> Batch:
        """The batch with its rows' weights: every rank knows the saliency of the whole global
        batch.
        """
        if self.weights is None:
            return batch
        weight, spread = self.weights(self.order.rows(number)[self.own :], self.share)
        self.spreads.append(spread)
        return replace(batch, weight=torch.from_numpy(weight).to(self.device))

    def _batch(self, number: int, seed: int) -> Batch:
        index = torch.from_numpy(self.order.rows(number)[self.own :][self.share]).to(self.device)
        noise = input_noise(self.optim, self.rows.inputs.shape[1:], seed)
        return self.rows.batch(index, None if noise is None else noise[self.share].to(self.device))


def reseed(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout on `device` draws from.

    Not torch.manual_seed: without a GPU it remembers a stack trace a call, for the day CUDA wakes.
    """
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _due(state: State, span: Span, optim: Optim, every: int) -> bool:
    """Checkpoints are taken at the first report after each `every` steps, where no sum is half
    done, within a phase.
    """
    return (
        state.step < span.last
        and state.step // every > (state.step - optim.evaluate_every) // every
    )


def _summary(
    state: State,
    seen: Tensor,
    told: dict[str, Any],
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> dict[str, Any]:
    objective = state.learner.objective
    means = (seen[0] / seen[1].clamp(min=1)).tolist()
    terms = dict(zip(objective.weights, means, strict=True))
    loss = sum(objective.weights[n] * v for n, v in terms.items())
    return {
        "step": state.step,
        "loss": loss,
        "terms": terms,
        **told,
        **evaluate(state.learner.student),
    }


def _diverged(state: State, arm: Arm, sums: Tensor, counts: Tensor) -> str:
    means = (sums / counts.clamp(min=1)).tolist()
    terms = ", ".join(
        f"{n} {v:.3g}" for n, v in zip(state.learner.objective.weights, means, strict=True)
    )
    return f"arm {arm.key}: the gradient is not finite at step {state.step} ({terms}); lower optim.learning_rate"


def clock(device: torch.device) -> float:
    """Seconds of work:

    CPU time of this process on a CPU, wall time on a GPU once its queue is empty.
    """
    return time.process_time() if device.type == "cpu" else time.perf_counter()
