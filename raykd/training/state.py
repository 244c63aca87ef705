"""A training in progress: the student with its objective, the optimiser, and the best student of a
phase.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raykd.losses.objective import Objective
from raykd.losses.weighting import Spread
from raykd.models.adapter import Adapter
from raykd.models.form import computing
from raykd.recipe.precision import FP32, Precision
from raykd.signals import Batch
from raykd.training import phases
from raykd.training.arm import World
from raykd.training.average import Average
from raykd.training.checkpoints import Checkpoints, Kept
from raykd.training.phases import Span
from raykd.training.pieces import extent_of, local_of, put, put_rows, rows_like
from raykd.training.state_file import Stored, on_host

if TYPE_CHECKING:
    from raykd.training.sharding import Shards

STUDENT = "student.module."  # before the names of a student's tensors among a learner's
MEAN = "mean."  # before the names of the means of its parameters


class Learner(nn.Module):
    """Student and objective as one module, so that DDP sees every parameter and one forward.

    The student computes in the numbers of `precision`, the objective in float32.
    """

    def __init__(self, student: Adapter, objective: Objective, precision: Precision = FP32):
        super().__init__()
        self.precision = precision
        self.student = student
        self.objective = objective

    def forward(self, *batches: Batch, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """The objective's sums and counts over all of the batches; `progress` as in Objective."""
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        for batch in batches:
            with computing(self.precision, batch.inputs.device):
                signals = self.student(batch.inputs, batch.mask)
            batch_sums, batch_counts = self.objective(signals, batch, progress)
            sums.append(batch_sums)
            counts.append(batch_counts)
        return torch.stack(sums).sum(0), torch.stack(counts).sum(0)


@dataclass(frozen=True)
class Best:
    """The best student of a phase so far, and the summary of the step at which it was validated.

    Its tensors are in this process's memory, whatever the device, and nothing changes them, so that
    a checkpoint needs no copy of them.
    """

    summary: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class State:
    """A training in progress: everything that a checkpoint carries, and how fast it went."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None
    throughput: dict[str, float] = field(default_factory=dict)  # once it has ended
    shards: "Shards | None" = None  # where the student lies in parts on the workers
    ema: float | None = None  # the decay of the mean of its weights in a phase
    average: Average | None = None

    @property
    def student(self) -> Adapter:
        """The whole student. One in parts has its weights here within `whole`, and at the end."""
        return self.shards.student if self.shards else self.learner.student

    def whole(self) -> AbstractContextManager[None]:
        """Within it the whole student has its weights; all workers must enter it together."""
        return self.shards.whole() if self.shards else nullcontext()

    def follow(self) -> None:
        """Take a step's weights into their mean."""
        if self.average:
            self.average.update()

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the student has the weights that are validated and kept."""
        return self.average.within() if self.average else nullcontext()

    def writes(self, world: World) -> bool:
        """Whether this worker writes a checkpoint, or a part of it."""
        return self.shards.own is not None if self.shards else world.rank == 0

    def save(self, checkpoints: Checkpoints, seen: Tensor, spreads: Sequence[Spread] = ()) -> None:
        """Begin to write a checkpoint.

        `seen` and `spreads` are what the next report will tell of the steps since the last one.
        """
        tensors = {f"model.{k}": v for k, v in self.learner.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optim.{number}.{slot}": v for slot, v in slots.items()}
        tensors["seen"] = seen
        means = self.average.means if self.average else {}
        tensors |= {f"{MEAN}{k}": v for k, v in means.items()}
        settled: dict[str, Tensor] = {}
        if self.best:
            best = self.best.tensors
            settled = {f"best.{k}": v for k, v in best.items()}
            if self.best.summary["step"] == self.step:  # they are the student's own, or their mean
                own = {f"model.{STUDENT}{k}": v for k, v in best.items()}
                settled |= {f"{MEAN}{k}": best[k] for k in means} if means else own
        part = self.shards.own if self.shards else None
        found = {k: extent_of(v) for k, v in tensors.items()}
        extents = {k: extent for k, extent in found.items() if extent}
        if self.best:
            alike = {k: extents.get(f"model.{STUDENT}{k}") for k in self.best.tensors}
            extents |= {f"best.{k}": extent for k, extent in alike.items() if extent}
        if part and part.number > 0:  # what all workers have is in the first one's file
            tensors = {k: v for k, v in tensors.items() if k in extents}
            settled = {k: v for k, v in settled.items() if k in extents}
        changing = {k: local_of(v) for k, v in tensors.items() if k not in settled}
        summary = self.best.summary if self.best else None
        meta = {"seconds": self.seconds, "history": list(self.history), "best": summary}
        meta["spreads"] = [asdict(spread) for spread in spreads]
        checkpoints.save(self.step, changing, meta, settled, part, extents)

    def restore(self, kept: Kept) -> None:
        """Continue from a checkpoint."""
        self.step = kept.step
        tensors = kept.tensors
        meta = kept.meta
        self.seconds = meta["seconds"]
        self.history = meta["history"]
        if self.shards:
            put_rows(self.learner.state_dict(), tensors, "model.")
        else:
            self.learner.load_state_dict(_under("model.", tensors))
        slots: dict[int, dict[str, Tensor]] = {}
        groups = self.optimizer.param_groups
        parameters = [value for group in groups for value in group["params"]]
        for key in tensors:
            if key.startswith("optim."):
                _, number, slot = key.split(".", 2)
                whole = parameters[int(number)]
                value = rows_like(whole, tensors, key) if slot != "step" else tensors[key]
                slots.setdefault(int(number), {})[slot] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        if self.average:
            self.average.restore(tensors, MEAN)
        if meta["best"] is not None:
            best = _under("best.", tensors)
            if self.shards:
                best = {
                    k: local_of(rows_like(v, tensors, f"best.{k}")).cpu()
                    for k, v in self.learner.student.module.state_dict().items()
                }
            self.best = Best(self._summary_of(meta["best"]), best)

    def _summary_of(self, best: dict[str, Any] | float) -> dict[str, Any]:
        """The summary that a checkpoint names, of before there were such by its accuracy."""
        if isinstance(best, dict):
            return best
        return next(point for point in self.history if point.get("val_accuracy") == best)

    @property
    def kept(self) -> dict[str, Any]:
        """The summary of the weights that the student has once a phase has ended."""
        return self.best.summary if self.best else self.history[-1]

    def begin(self, span: Span) -> None:
        """Enter a phase; scales that are learned join the optimiser, without weight decay."""
        before = set(self.learner.parameters())
        phases.enter(self.learner.student.module, span.phase)
        scales = [p for p in self.learner.parameters() if p not in before]
        if scales:
            self.optimizer.add_param_group({"params": scales, "weight_decay": 0.0})
        self.best = None
        if self.ema is not None:
            self.average = Average(self.learner.student.module, self.ema)

    def judge(self, span: Span, select: str) -> None:
        """Keep the student if it is its phase's best, fully rounded, by the last validation."""
        name = f"val_{select}"
        value = self.history[-1].get(name, math.nan)
        if math.isnan(value) or span.blend(self.step - 1) < 1:
            return
        if self.best and value <= self.best.summary[name]:
            return
        with self.averaged():
            tensors = self.learner.student.module.state_dict()
            local = {k: local_of(v) for k, v in tensors.items()}
            self.best = Best(self.history[-1], on_host(local))

    def end(self) -> None:
        """Go back to the phase's best student, or to the mean of its weights."""
        if self.average:
            self.average.put()
        if self.best and self.shards:
            put(self.learner.student.module.state_dict(), self.best.tensors)
        elif self.best:
            self.learner.student.module.load_state_dict(self.best.tensors)


def _under(prefix: str, tensors: Stored) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
