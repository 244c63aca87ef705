"""What raykd costs over plain PyTorch: a training step in a Ray Train worker, a scored row in a Ray Data actor.

    python -m pipelines.bench.overhead

Both are compared with hand-written loops that take turns with raykd's in the same process, so that a busy machine
slows both alike. `train_step_ratio` and `score_ratio` count CPU time of the whole process, Ray's threads and waiting
between shards included; the `_wall` figures count wall time. Evaluation is left out on both sides.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.bench.table import breakdown, figure, show
from raykd import checks, data, fit, stream
from raykd.arms import Workshop, arms_of
from raykd.batches import DeviceRows
from raykd.checkpoints import Checkpoints
from raykd.files import put_once
from raykd.loop import Arm, Learner, State, Step, World
from raykd.losses import Objective
from raykd.recipe import Optim, Recipe
from raykd.scorer import Scorer, _to_table
from raykd.session import connect
from raykd.store.commit import Shard, StoreWriter, plan_shards, record_of, to_parquet

RECIPE = "examples/gesture/recipe.toml"
TRAIN_ROUNDS = 12
SHARDS_A_ROUND, SCORE_ROUNDS = 6, 10


class Clock:
    """CPU seconds of this process, and wall seconds, since the last reading."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> tuple[float, float]:
        now = time.process_time(), time.perf_counter()
        passed = tuple(a - b for a, b in zip(now, getattr(self, "last", now), strict=True))
        self.last = now
        return passed[0], passed[1]


class Plain:
    """Distillation by hand: this recipe's terms, noise, clip, AdamW and schedule, for rows without padding."""

    def __init__(self, optim: Optim, arm: Arm, module: nn.Module, rows: DeviceRows):
        self.optim, self.module, self.inputs, self.label = optim, module, rows.inputs, rows.label
        self.teacher = rows.teacher["logits"].float()
        self.ce, self.kd = arm.terms["ce"].weight, arm.terms["kd"].weight
        self.temperature = float(str(arm.terms["kd"].settings["temperature"]))
        self.adamw = torch.optim.AdamW(
            module.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True
        )
        labelled = round(optim.labelled_share * optim.batch)
        self.labelled = endless(torch.nonzero(rows.label >= 0).squeeze(1), labelled)
        self.every = endless(torch.arange(len(rows.label)), optim.batch - labelled)
        self.number, self.running = 0, torch.zeros(())

    def loss(self, x: Tensor, y: Tensor, z_teacher: Tensor) -> Tensor:
        z, t = self.module(x)["logits"], self.temperature
        ce = F.cross_entropy(z.transpose(1, 2), y.unsqueeze(1).expand(z.shape[:2]), ignore_index=-100)
        log_q, log_p = F.log_softmax(z / t, -1), F.log_softmax(z_teacher / t, -1)
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
        warm, steps = self.optim.warmup * self.optim.steps, self.optim.steps
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


class Alternating(Workshop):
    """A Workshop that, where the validation would be, lets the hand-written loop train as many steps."""

    def __init__(self, recipe: Recipe, store: Path):
        super().__init__(recipe, store, torch.device("cpu"))
        self.arm = next(a for a in arms_of(recipe) if a.name == "student")
        self.plain = Plain(recipe.optim, self.arm, self.student(self.arm).module, self.train)
        self.raykd: list[tuple[float, float]] = []
        self.by_hand: list[tuple[float, float]] = []
        self.clock = Clock()

    def validate(self, student: nn.Module) -> dict[str, float]:
        self.raykd.append(self.clock.read())
        for _ in range(self.recipe.optim.evaluate_every):
            self.plain.step()
        self.by_hand.append(self.clock.read())
        return {"val_accuracy": 0.0}


def train_rounds(config: dict[str, Any]) -> dict[str, Any]:
    """In a worker: rounds of both loops in turn, and where a step's time goes."""
    import ray.train

    recipe, folder = Recipe.model_validate(config["recipe"]), Path(config["folder"])
    shop = Alternating(recipe, Path(config["store"]))
    check_equal(shop)
    reports: list[float] = []

    def report(step: int, metrics: dict[str, Any]) -> None:
        started = time.process_time()
        ray.train.report({"arm": shop.arm.key, **metrics})
        reports.append(time.process_time() - started)

    kept = Checkpoints(folder / "checkpoints" / shop.arm.key)
    shop.clock.read()
    shop.train_arm(shop.arm, shop.student(shop.arm), checkpoints=kept, report=report)
    parts = step_parts(shop) | {"report": float(np.median(reports)) / recipe.optim.evaluate_every}
    return {"raykd": shop.raykd, "by_hand": shop.by_hand, "parts": parts}


def fresh_step(shop: Alternating) -> tuple[Learner, Step]:
    optim = shop.recipe.optim
    learner = Learner(shop.student(shop.arm), Objective(shop.arm.terms))
    adamw = torch.optim.AdamW(learner.parameters(), optim.learning_rate, weight_decay=optim.weight_decay, fused=True)
    return learner, Step(shop.arm, optim, shop.train, World(), State(learner, adamw), learner)


def check_equal(shop: Alternating) -> None:
    """From equal weights and an equal batch, both loops have one loss and one gradient."""
    learner, step = fresh_step(shop)
    batch = step._batch(0)
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

        batch = step._batch(number)
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


class Paired(stream.ShardScorer):
    """A ShardScorer that, after each round of shards, scores their rows once more by a bare loop, into one file."""

    def __init__(self, recipe: Recipe, folder: str, wanted: dict[str, Any]):
        super().__init__(recipe, folder, wanted)
        self.size = recipe.store.batch
        self.bare_path = Path(folder) / "bare.parquet"
        self.bare_file: pq.ParquetWriter | None = None
        self.round: list[Shard] = []
        self.warm, self.gap = False, 0.0
        self.clock = Clock()
        self.left = time.perf_counter()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.gap += time.perf_counter() - self.left
        out = super().__call__(batch)
        self.round.append(Shard(*(batch[k].item() for k in ("number", "split", "first", "last"))))
        spent = [np.nan] * 5
        if not self.warm or len(self.round) == SHARDS_A_ROUND:
            raykd, bare = self.clock.read(), self.bare()
            if self.warm:
                spent = [*raykd, *bare, self.gap]
            self.warm, self.gap, self.round = True, 0.0, []
        self.left = time.perf_counter()
        return out | {"spent": np.array([spent])}

    @torch.inference_mode()
    def bare(self) -> tuple[float, float]:
        """CPU and wall seconds of a plain pass over the round's rows."""
        for shard in self.round:
            rows = self.scorer.dataset.splits[shard.split]
            parts = []
            for i in range(shard.first, shard.last, self.size):
                x = torch.from_numpy(rows.inputs[i : min(i + self.size, shard.last)])
                parts.append(self.scorer.teacher.module(x)["logits"].half())
            z = torch.cat(parts).flatten(1).numpy()
            logits = pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), z.shape[1])
            table = pa.table({"row_id": rows.row_id[shard.first : shard.last], "logits": logits})
            self.bare_file = self.bare_file or pq.ParquetWriter(self.bare_path, table.schema, compression="zstd")
            self.bare_file.write_table(table)
        return self.clock.read()
