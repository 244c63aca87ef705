"""One optimiser step over a global batch, of which this process takes its share."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raykd.data.order import Order, input_noise, mixed
from raykd.errors import Diverged
from raykd.generation.draft_log import DraftLog, DraftLogSpec
from raykd.generation.own_rows import LiveTeacher, OwnRows, replay_rows, write_rows
from raykd.generation.replay import Replay
from raykd.generation.sampling import LaterBatch
from raykd.generation.schedule import Schedule
from raykd.losses.terms import is_own
from raykd.losses.weighting import RowWeights, Spread, mean_spread
from raykd.quant.swap import roundable
from raykd.recipe.source import Source
from raykd.recipe.tables import Optim
from raykd.signals import Batch
from raykd.store.logits import Targets
from raykd.training import phases
from raykd.training.arm import Arm, World
from raykd.training.device_rows import DeviceRows
from raykd.training.phases import Span
from raykd.training.prefetch import Ahead
from raykd.training.state import State


class TrainStep:
    """One optimiser step at a time, with everything that no step changes made once."""

    def __init__(
        self,
        arm: Arm,
        optim: Optim,
        rows: DeviceRows,
        world: World,
        state: State,
        live: LiveTeacher | Replay | None = None,
        kept: DraftLogSpec | None = None,
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
        self.is_live = isinstance(live, LiveTeacher)
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
        for layer in self.layers:
            layer.blend = self.span.blend(number)
        batches = self._batches(number, seed)
        reseed(self.device, seed + 1 + self.world.rank)
        sums, counts = self.model(*batches, progress=number / self.optim.steps)
        if isinstance(batches[0].targets, Targets):
            self.temperatures = tuple(batches[0].targets.decoded)
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

    def _writer(
        self, source: Source, live: LiveTeacher | Replay, kept: DraftLogSpec | None
    ) -> OwnRows:
        """What gives each step its rows of the student's own text."""
        share, seed = self.world.share(self.own), self.arm.seed
        spans = [
            (s.since * self.optim.steps, s.until * self.optim.steps)
            for n, s in self.arm.terms.items()
            if is_own(n)
        ]
        if isinstance(live, Replay):
            return OwnRows(
                Schedule(),
                lambda group: replay_rows(live, self.own, seed, group, share=share),
                spans,
            )
        begins = [span.first for span in phases.spans(self.arm.phases, self.optim.steps)]
        schedule = Schedule(source.passes, source.ahead, self.optim.evaluate_every, begins)

        def draw(group: int) -> LaterBatch:
            index = torch.from_numpy(self.order.rows(group)[: self.own][share]).to(self.device)
            student, rows = self.state.learner.student.module, self.rows.batch(index)
            return write_rows(
                source, live.text, group, seed, student, live.teacher, rows, share=share
            )

        found = OwnRows(schedule, draw, spans)
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


def _diverged(state: State, arm: Arm, sums: Tensor, counts: Tensor) -> str:
    means = (sums / counts.clamp(min=1)).tolist()
    terms = ", ".join(
        f"{n} {v:.3g}" for n, v in zip(state.learner.objective.weights, means, strict=True)
    )
    return f"arm {arm.key}: the gradient is not finite at step {state.step} ({terms}); lower optim.learning_rate"
