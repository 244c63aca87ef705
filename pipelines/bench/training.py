"""A training step: raykd's loop in a Ray Train worker, and a loop written by hand that takes turns
with it.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.bench.table import Clock
from raykd.files.address import Address
from raykd.losses.objective import Objective
from raykd.orchestration import training
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import Optim
from raykd.training.arm import ONE_PROCESS, Arm, World
from raykd.training.arms import arms_of
from raykd.training.checkpoints import Checkpoints
from raykd.training.device_rows import DeviceRows
from raykd.training.phases import spans
from raykd.training.run_arms import ArmRunner
from raykd.training.state import Learner, State
from raykd.training.step import TrainStep

TURN = 25


def run(recipe: Recipe, store: Address, folder: Path, workers: int = 1) -> dict[str, Any]:
    """CPU and wall seconds of each round of both loops, and the parts of a step, from the first of
    so many real workers.
    """
    config = {"recipe": recipe.model_dump(mode="json"), "store": str(store), "folder": str(folder)}
    return (
        training.worker_group(recipe, worker, config, folder=folder, num_workers=workers)
        .fit()
        .return_value
    )


class Plain:
    """Distillation by hand: this recipe's terms, noise, clip, AdamW and schedule, for rows without
    padding. Several workers have a share of the batch each, under DDP.
    """

    def __init__(self, optim: Optim, arm: Arm, module: nn.Module, rows: DeviceRows, world: World):
        self.optim = optim
        self.module = module
        self.inputs = rows.inputs
        self.label = rows.label
        self.teacher = rows.teacher["logits"].float()
        self.ce = arm.terms["ce"].weight
        self.kd = arm.terms["kd"].weight
        self.temperature = float(str(arm.terms["kd"].settings["temperature"]))
        self.adamw = torch.optim.AdamW(
            module.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True
        )
        batch = optim.batch // world.size
        labelled = round(optim.labelled_share * batch)
        self.labelled = endless(torch.nonzero(rows.label >= 0).squeeze(1), labelled)
        self.every = endless(torch.arange(len(rows.label)), batch - labelled)
        self.number = 0
        self.running = torch.zeros(())
        if world.size > 1:
            self._freeze_unused(rows)
            self.module = DistributedDataParallel(module)

    def _freeze_unused(self, rows: DeviceRows) -> None:
        """Leave what no term reads out of DDP, as its error says."""
        self.loss(rows.inputs[:2], rows.label[:2], self.teacher[:2]).backward()
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def loss(self, x: Tensor, y: Tensor, z_teacher: Tensor) -> Tensor:
        z = self.module(x)["logits"]
        t = self.temperature
        ce = F.cross_entropy(
            z.transpose(1, 2), y.unsqueeze(1).expand(z.shape[:2]), ignore_index=-100
        )
        log_q = F.log_softmax(z / t, -1)
        log_p = F.log_softmax(z_teacher / t, -1)
        kd = t * t * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / z.shape[:2].numel()
        return self.ce * ce + self.kd * kd

    def step(self) -> None:
        index = torch.cat([next(self.labelled), next(self.every)])
        x = self.inputs[index]
        x = x + self.optim.input_noise * torch.randn_like(x)
        loss = self.loss(x, self.label[index], self.teacher[index])
        self.adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.optim.clip)
        warm = self.optim.warmup * self.optim.steps
        steps = self.optim.steps
        share = min((self.number + 1) / warm, (steps - self.number) / (steps - warm))
        for group in self.adamw.param_groups:
            group["lr"] = self.optim.learning_rate * share
        self.adamw.step()
        self.running += loss.detach()
        self.number += 1


def endless(pool: Tensor, size: int) -> Iterator[Tensor]:
    """Whole batches of a pool, shuffled again each time it is used up."""
    while True:
        yield from pool[torch.randperm(len(pool))].split(size)[: len(pool) // size]


class Alternating(ArmRunner):
    """An ArmRunner whose student lets the hand-written loop train as many steps, every TURN steps.

    It does not validate.
    """

    def __init__(self, recipe: Recipe, store: Address, world: World):
        super().__init__(recipe, store, torch.device("cpu"))
        self.arm = next(a for a in arms_of(recipe) if a.name == "student")
        assert isinstance(self.train, DeviceRows)
        module = self.student(self.arm).module
        self.plain = Plain(recipe.optim, self.arm, module, self.train, world)
        self.raykd: list[tuple[float, float]] = []
        self.by_hand: list[tuple[float, float]] = []
        self.taken = 0
        self.clock = Clock()

    def validate(self, student: nn.Module, world: World = ONE_PROCESS) -> dict[str, float]:
        return {"val_accuracy": 0.0}

    def take_turns(self, *hooked: Any) -> None:
        self.taken += 1
        if self.taken % TURN == 0:
            self.raykd.append(self.clock.read())
            for _ in range(TURN):
                self.plain.step()
            self.by_hand.append(self.clock.read())


def worker(config: dict[str, Any]) -> dict[str, Any]:
    """In a worker: both loops in turn, a round from one report to the next, and where a step's time
    goes.
    """
    import ray.train

    recipe = Recipe.model_validate(config["recipe"])
    folder = Path(config["folder"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    shop = Alternating(recipe, config["store"], world)
    if world.size == 1:
        check_equal(shop)
    reports: list[float] = []

    def report(step: int, metrics: dict[str, Any]) -> None:
        started = time.process_time()
        ray.train.report({"arm": shop.arm.key, **metrics})
        reports.append(time.process_time() - started)

    kept = Checkpoints(folder / "checkpoints" / shop.arm.key)
    student = shop.student(shop.arm)
    student.register_forward_pre_hook(shop.take_turns)
    shop.clock.read()
    shop.train_arm(shop.arm, student, world, checkpoints=kept, report=report)
    parts = step_parts(shop) | {"report": float(np.median(reports)) / recipe.optim.evaluate_every}
    every = recipe.optim.evaluate_every // TURN
    rounds = {
        k: np.array(getattr(shop, k)).reshape(-1, every, 2).sum(1).tolist()
        for k in ("raykd", "by_hand")
    }
    return rounds | {"parts": parts}


def fresh_step(shop: Alternating) -> tuple[Learner, TrainStep]:
    optim = shop.recipe.optim
    learner = Learner(shop.student(shop.arm), Objective(shop.arm.terms))
    adamw = torch.optim.AdamW(
        learner.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True
    )
    step = TrainStep(shop.arm, optim, shop.train, World(), State(learner, adamw))
    step.enter(spans((), optim.steps)[0])
    return learner, step


def check_equal(shop: Alternating) -> None:
    """From equal weights and an equal batch, both loops have one loss and one gradient."""
    learner, step = fresh_step(shop)
    batch = step._batch(0, 0)
    assert batch.teacher is not None
    ours = learner.objective.total(*learner(batch))
    ours.backward()
    theirs = shop.plain.loss(batch.inputs, batch.label, batch.teacher.logits.float())
    theirs.backward()
    pairs = zip(learner.student.module.parameters(), shop.plain.module.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs if a.grad is not None or b.grad is not None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def step_parts(shop: Alternating, steps: int = 300) -> dict[str, float]:
    """Median CPU seconds of each part of raykd's step."""
    learner, step = fresh_step(shop)
    rows = []
    for number in range(steps):
        marks = [time.process_time()]

        def mark(marks: list[float] = marks) -> None:
            marks.append(time.process_time())

        batch = step._batch(number, number)
        mark()
        signals = learner.student(batch.inputs, batch.mask)
        mark()
        loss = learner.objective.total(*learner.objective(signals, batch))
        mark()
        step.state.optimizer.zero_grad()
        loss.backward()
        mark()
        nn.utils.clip_grad_norm_(step.parameters, shop.recipe.optim.clip)
        step.state.optimizer.step()
        mark()
        rows.append(np.diff(marks))
    names = ("order, batch, noise", "forward", "loss", "backward", "clip, optimiser")
    return dict(zip(names, np.median(rows, axis=0).tolist(), strict=True))
