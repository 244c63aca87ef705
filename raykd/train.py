"""The training loop: plain torch, one process or DDP. It knows no Ray.

Everything random is a pure function of (seed, step): the order of rows, the noise on inputs, torch's generator. So a
checkpoint is tensors and a position, any number of workers sees the same global batches, and a run that was killed
and resumed ends with the weights of one that was not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raykd import faults
from raykd.batches import DeviceRows, Order, input_noise, mixed
from raykd.checkpoints import Checkpoints
from raykd.errors import DataError
from raykd.losses import Objective
from raykd.models.adapter import Adapter
from raykd.recipe import Optim, TermSpec
from raykd.signals import Batch

Report = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Arm:
    """One training: the student under its terms, or the control under labels only."""

    name: str
    seed: int
    terms: dict[str, TermSpec]

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


class Learner(nn.Module):
    """Student and objective as one module, so that DDP sees every parameter and one forward."""

    def __init__(self, student: Adapter, objective: Objective):
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.objective(self.student(batch.inputs, batch.mask), batch)


@dataclass
class State:
    """A training in progress: everything that a checkpoint carries."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, checkpoints: Checkpoints) -> None:
        tensors = {f"model.{k}": v for k, v in self.learner.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optim.{number}.{slot}": v for slot, v in slots.items()}
        checkpoints.save(self.step, tensors, {"seconds": self.seconds, "history": self.history})

    def restore(self, checkpoints: Checkpoints) -> None:
        """Continue from the newest sound checkpoint, if there is one."""
        found = checkpoints.newest()
        if found is None:
            return
        self.step, tensors, meta = found
        self.seconds, self.history = meta["seconds"], meta["history"]
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.learner.load_state_dict(model)
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optim."):
                _, number, slot = key.split(".", 2)
                slots.setdefault(int(number), {})[slot] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})


def train(
    arm: Arm,
    optim: Optim,
    student: Adapter,
    rows: DeviceRows,
    evaluate: Callable[[nn.Module], dict[str, float]],
    *,
    world: World = World(),  # noqa: B008 - frozen
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    report: Report = lambda step, metrics: None,
) -> State:
    """The student trained by `arm` for `optim.steps` steps, resumed from `checkpoints` where they have a state.

    `report(step, metrics)` is called every `optim.evaluate_every` steps and after the last, on every rank, with the
    mean of each term since the last call and what `evaluate(student)` says.
    """
    device = rows.inputs.device
    learner = Learner(student, Objective(arm.terms)).to(device)
    kind = torch.optim.AdamW
    state = State(learner, kind(learner.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True))
    if checkpoints:
        state.restore(checkpoints)
    model = DistributedDataParallel(learner, find_unused_parameters=True) if world.size > 1 else learner
    order = Order(rows.label.cpu().numpy(), optim, arm.seed)
    seen = torch.zeros(2, len(learner.objective.weights), device=device)
    while state.step < optim.steps:
        started = clock(device)
        seen += _step(state, model, arm, optim, rows, order, world)
        state.step += 1
        state.seconds += clock(device) - started
        faults.point("train", step=state.step, rank=world.rank, arm=arm.key)
        if state.step % optim.evaluate_every == 0 or state.step == optim.steps:
            state.history.append(_summary(state, world.sum(seen), evaluate))
            seen.zero_()
            report(state.step, state.history[-1])
            if checkpoints and state.step < optim.steps and world.rank == 0 and _due(state, optim, checkpoint_every):
                state.save(checkpoints)
    return state


def _step(
    state: State, model: nn.Module, arm: Arm, optim: Optim, rows: DeviceRows, order: Order, world: World
) -> Tensor:
    """One optimiser step; (2, terms) this rank's sums and counts."""
    share, device = world.share(optim.batch), rows.inputs.device
    torch.manual_seed(mixed(arm.seed, state.step, world.rank))
    index = torch.from_numpy(order.rows(state.step)[share]).to(device)
    noise = input_noise(optim, rows.inputs.shape[1:], arm.seed, state.step)
    batch = rows.batch(index, None if noise is None else noise[share].to(device))
    model.train()
    sums, counts = model(batch)
    loss = state.learner.objective.total(sums * world.size, world.sum(counts))
    state.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.learner.parameters(), optim.clip)
    if not torch.isfinite(norm):
        raise DataError(_diverged(state, arm, sums, counts))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(optim, state.step)
    state.optimizer.step()
    return torch.stack([sums.detach(), counts])


def learning_rate(optim: Optim, step: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then linear decay to zero at the end."""
    warm = optim.warmup * optim.steps
    rise = (step + 1) / warm if step + 1 < warm else 1.0
    return optim.learning_rate * min(rise, (optim.steps - step) / max(optim.steps - warm, 1.0))


def _due(state: State, optim: Optim, every: int) -> bool:
    """Checkpoints are taken at the first report after each `every` steps, where no sum is half done."""
    return state.step // every > (state.step - optim.evaluate_every) // every


def _summary(state: State, seen: Tensor, evaluate: Callable[[nn.Module], dict[str, float]]) -> dict[str, Any]:
    objective = state.learner.objective
    means = (seen[0] / seen[1].clamp(min=1)).tolist()
    terms = dict(zip(objective.weights, means, strict=True))
    loss = sum(objective.weights[n] * v for n, v in terms.items())
    return {"step": state.step, "loss": loss, "terms": terms, **evaluate(state.learner.student)}


def _diverged(state: State, arm: Arm, sums: Tensor, counts: Tensor) -> str:
    means = (sums / counts.clamp(min=1)).tolist()
    terms = ", ".join(f"{n} {v:.3g}" for n, v in zip(state.learner.objective.weights, means, strict=True))
    return f"arm {arm.key}: the gradient is not finite at step {state.step} ({terms}); lower optim.learning_rate"


def clock(device: torch.device) -> float:
    """Seconds of work: CPU time of this process on a CPU, wall time on a GPU once its queue is empty."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()
