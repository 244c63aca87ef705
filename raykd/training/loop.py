"""The training loop: plain torch, one process or DDP. It knows no Ray.

Everything random is a pure function of (seed, step): the order of rows, the noise on inputs,
torch's generator. So a checkpoint is tensors and a position, any number of workers sees the same
global batches, and a run that was killed and resumed ends with the weights of one that was not.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from raykd.data.order import mixed
from raykd.errors import InfraError
from raykd.files import faults
from raykd.generation.draft_log import DraftLogSpec
from raykd.generation.own_rows import LiveTeacher
from raykd.generation.replay import Replay
from raykd.losses.objective import Objective, learned_terms
from raykd.losses.weighting import Spread
from raykd.models.adapter import Adapter
from raykd.recipe.precision import FP32, Precision
from raykd.recipe.tables import Optim
from raykd.signals import Signals
from raykd.training import phases
from raykd.training.arm import ONE_PROCESS, Arm, World
from raykd.training.checkpoints import Checkpoints, Choice, Kept
from raykd.training.phases import Span
from raykd.training.pieces import Sharding
from raykd.training.state import Learner, State
from raykd.training.step import TrainStep
from raykd.training.throughput import Pace
from raykd.training.train_rows import TrainRows

TERMINATED = 143  # how a process ends that was told to by SIGTERM

Report = Callable[[int, dict[str, Any]], None]


def train(
    arm: Arm,
    optim: Optim,
    student: Adapter,
    rows: TrainRows,
    evaluate: Callable[[nn.Module], dict[str, float]],
    *,
    world: World = ONE_PROCESS,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    report: Report = lambda step, metrics: None,
    tick: Callable[[int, Pace], None] = lambda step, pace: None,
    live: LiveTeacher | Replay | None = None,
    kept: DraftLogSpec | None = None,
    precision: Precision = FP32,
    micro: int | None = None,
    sharding: Sharding | None = None,
) -> State:
    """The student trained by `arm` for `optim.steps` steps, resumed from `checkpoints` where they
    have a state.

    An arm with a source writes text of its own, which the `live` teacher scores, or reads drafts of
    a log. Drafts that are written are `kept` where that is given. The student's layers compute in
    the numbers of `precision`; validation is in float32. With `micro` a forward pass reads so many
    rows, with the loss and gradient of the whole share. With a `sharding` the student, its
    gradients and its optimiser's state lie in parts on the workers; `student` has the weights in
    the end. With `optim.ema` the weights that are validated and kept are a running mean.

    `report(step, metrics)` is called every `optim.evaluate_every` steps and after the last, on
    every rank, with the mean of each term since the last call and what `evaluate(student)` says.
    `tick(step, pace)` is called after every step, and told how fast rows are read.
    """
    device = rows.device
    _leave_out_head(student, rows)
    objective = objective_of(arm, student, rows)
    shards = None
    if sharding and world.size > 1:
        from raykd.training.sharding import Shards

        shards = Shards(sharding, student, world, device)
    learner = Learner(shards.in_parts if shards else student, objective, precision).to(device)
    if shards:
        shards.part(learner)
    state = State(learner, optimizer_of(learner, optim), shards=shards, ema=optim.ema)
    plan = phases.spans(arm.phases, optim.steps)
    chosen = checkpoints.choose(world, device) if checkpoints else None
    begun = [span for span in plan if span.first < (chosen.step if chosen else 1)]
    for (
        span
    ) in begun:  # in their order, so that the optimiser's parameters are those of the checkpoint
        state.begin(span)
    seen = torch.zeros(2, len(learner.objective.weights), device=device)
    saved: Kept | None = None
    if checkpoints and chosen:
        saved = _loaded(checkpoints, chosen)
        state.restore(saved)
        if "seen" in saved.tensors and world.rank == 0:
            seen += saved.tensors["seen"].to(device)
    learner.train()
    step = TrainStep(arm, optim, rows, world, state, live, kept, micro)
    step.spreads += [Spread(**table) for table in (saved.meta.get("spreads", ()) if saved else ())]
    patient = _terminated_between_steps() if checkpoints else nullcontext(lambda: False)
    writing = checkpoints.writing() if checkpoints else nullcontext()
    settle = checkpoints.wait if checkpoints else None
    with closing(step), patient as stop, writing:
        for span in plan[len(begun) - 1 :]:
            if span not in begun:
                state.begin(span)
            step.enter(span)
            while state.step < span.last:
                began = time.perf_counter()
                started = clock(device)
                seen += step()
                state.follow()
                state.step += 1
                state.seconds += clock(device) - started
                step.pace.seconds += time.perf_counter() - began
                where = {"step": state.step, "rank": world.rank, "arm": arm.key}
                faults.point("train", first=settle, **where)
                tick(state.step, step.pace)
                if state.step % optim.evaluate_every == 0 or state.step == span.last:
                    state.history.append(
                        _summary(state, world.sum(seen), step.extra_metrics(), evaluate)
                    )
                    seen.zero_()
                    report(state.step, state.history[-1])
                    if checkpoints:
                        checkpoints.check()
                    if arm.select:
                        state.judge(span, arm.select)
                    if (
                        checkpoints
                        and state.writes(world)
                        and _due(state, span, optim, checkpoint_every)
                    ):
                        state.save(checkpoints, seen)
                if checkpoints and stop():
                    # text that a student wrote at an earlier step is not in a checkpoint
                    if world.size == 1 and not arm.source:
                        step.check_finite()
                        state.save(checkpoints, seen, step.spreads)
                    checkpoints.wait()
                    raise SystemExit(TERMINATED)
            state.end()
    if shards:
        shards.fill()
    one = rows.batch(torch.zeros(1, dtype=torch.int64, device=device))
    state.throughput = step.pace.told(student, one, precision, workers=world.size)
    return state


def optimizer_of(learner: Learner, optim: Optim) -> torch.optim.Optimizer:
    """AdamW over all parameters; with `decay = "matrices"` vectors, as of norms, do not decay."""
    parameters: Any = list(learner.parameters())
    if optim.decay == "matrices":
        decaying = [value for value in parameters if value.dim() > 1]
        others = [value for value in parameters if value.dim() <= 1]
        parameters = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        parameters,
        optim.learning_rate,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def _loaded(checkpoints: Checkpoints, chosen: Choice) -> Kept:
    """The state that every rank has just found sound."""
    kept = checkpoints.load(chosen)
    if kept is None:
        raise InfraError(f"{checkpoints.folder}: a checkpoint changed while it was read; try again")
    return kept


@contextmanager
def _terminated_between_steps() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM wait for the end of a step; the function that is given says that it has come.

    Only the main thread may handle signals; in another, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:  # the step does not end, or the sender is in a hurry
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    def has_come() -> bool:
        told.extend(came)
        return bool(came)

    told: list[int] = []
    signal.signal(signal.SIGTERM, handle)
    try:
        yield has_come
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if came and not told:
            signal.raise_signal(signal.SIGTERM)


def objective_of(arm: Arm, student: Adapter, rows: TrainRows) -> Objective:
    """The arm's objective; terms that learn are built from what the student says of one row, drawn
    by the seed.
    """
    if not learned_terms(arm.terms):
        return Objective(arm.terms)
    with torch.no_grad():
        batch = rows.batch(torch.zeros(1, dtype=torch.int64, device=rows.device))
        said: Signals = student.to(rows.device).eval()(batch.inputs, batch.mask)
    torch.manual_seed(mixed(arm.seed, len(arm.terms)))
    return Objective(arm.terms, (said, batch))


def _leave_out_head(student: Adapter, rows: TrainRows) -> None:
    """Leave the product with a large head to the losses, where the student has one."""
    if student.heads():
        batch = rows.batch(torch.zeros(1, dtype=torch.int64, device=rows.device))
        student.to(rows.device).find_head(batch.inputs, batch.mask)


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
    with state.averaged(), state.whole():
        measured = evaluate(state.student)
    return {"step": state.step, "loss": loss, "terms": terms, **told, **measured}


def clock(device: torch.device) -> float:
    """Seconds of work:

    CPU time of this process on a CPU, wall time on a GPU once its queue is empty.
    """
    return time.process_time() if device.type == "cpu" else time.perf_counter()
