"""All the trainings of a recipe: every seed of the student and of its control, in one process
group.

Each arm ends as a folder `arms/<name>-<seed>/` with `weights.safetensors`, `predictions.parquet`
(the test split), `drafts.parquet` where it is judged as a drafter, `rounded_afterwards.parquet`
where it is in full precision beside a rounded student, and last `arm.json`: its presence means that
the arm is done, and a later attempt does not train it again. `trained_arm` writes and reads it.
"""

import hashlib
from collections.abc import Callable
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import nn

from raykd import data, models
from raykd.console import say
from raykd.data import Dataset
from raykd.data.rows import Facts
from raykd.data.table import Held, Source, in_memory
from raykd.files.address import Address
from raykd.files.atomic import write_bytes
from raykd.generation import judge_drafter
from raykd.generation.acceptance import Acceptance
from raykd.generation.draft_log import DraftLogSpec, draft_log_spec
from raykd.generation.own_rows import LiveTeacher, TextShape
from raykd.generation.replay import Replay
from raykd.generation.sampling import FrozenTeacher, Teacher
from raykd.losses.reads import reads_of
from raykd.losses.terms import needs_of, wants_of
from raykd.models.adapter import Adapter
from raykd.models.build import build_frozen
from raykd.models.compiled import compile_student
from raykd.models.form import Form, set_attention, set_matmul
from raykd.models.recompute import recompute_blocks
from raykd.recipe.recipe import Recipe
from raykd.store.reader import Store
from raykd.teacher.head import teacher_head
from raykd.teacher.identity import check_rows, run_digest, store_table
from raykd.teacher.statistics import check_futures
from raykd.techniques import register
from raykd.training import phases, post_training, run_files, trained_arm
from raykd.training.arm import ONE_PROCESS, Arm, World
from raykd.training.arms import UNROUNDED, arms_of
from raykd.training.checkpoints import Checkpoints
from raykd.training.device_rows import to_device
from raykd.training.loop import train
from raykd.training.measured import Measured, join, measured, tally, write
from raykd.training.part_rows import PartRows
from raykd.training.pieces import Sharding, workers_of_parts
from raykd.training.state import State
from raykd.training.throughput import Pace
from raykd.training.train_rows import TrainRows

DRAFTERS = ("student", "control")
ArmReport = Callable[[str, int, dict[str, Any]], None]  # (arm key, step, metrics)
ArmTick = Callable[[str, int, Pace], None]  # (arm key, step, pace)


def kept_of(recipe: Recipe, rows: Facts, arm: Arm, folder: Path) -> DraftLogSpec | None:
    """Where an arm's drafts are kept in the run folder; None where they are not.

    RecipeError as in `draft_log_spec`.
    """
    if arm.source is None or not arm.source.keep:
        return None
    stored = store_table(recipe, len(rows.classes))
    run = f"{run_digest(recipe, rows)}/{arm.key}"
    return draft_log_spec(
        run_files.draft_log(folder, arm.key), run, rows.classes, arm.source.temperature, stored
    )


def replay_of(arm: Arm, rows: Facts, device: torch.device) -> Replay | None:
    """The log of drafts that an arm learns from; None where it learns from none.

    Errors as in Replay and its `check`.
    """
    if arm.source is None or arm.source.log is None:
        return None
    replay = Replay(arm.source.log, rows.classes, rows.shape["steps"], device)
    replay.check(arm.terms, arm.source.temperature)
    return replay


class ArmRunner:
    """What every arm of a recipe shares on one worker: rows, teacher signals, device."""

    def __init__(
        self,
        recipe: Recipe,
        store: Address | None,
        device: torch.device,
        teacher: Teacher | None = None,
        source: Source | None = None,
    ):
        torch.set_num_threads(1)
        set_matmul(recipe.precision)
        register(recipe.technique)
        self.recipe = recipe
        self.device = device
        self.teacher = teacher
        self.source = source or data.open_source(recipe.data, recipe.optim.order, task=recipe.task)
        self.table = self.source.table()
        self.store = Store(store) if store else None
        if self.store:
            check_rows(self.table, self.store.manifest["identity"])
            check_futures(self.store, self.table, reads_of(recipe))
        self.head = teacher_head(recipe, self.store, self.table) if self.store else None
        self.train = self._training_rows()
        self.val = measured(self.source, "val", None, device, scale=recipe.scale)

    def close(self) -> None:
        """End what reads rows ahead."""
        self.train.close()
        self.val.close()

    @cached_property
    def dataset(self) -> Dataset:
        """The rows that are in memory."""
        return in_memory(self.source)

    def _training_rows(self) -> TrainRows:
        """The training split, held on the device or read in parts."""
        needs = needs_of(self.recipe.terms)
        taught = self.store if reads_of(self.recipe) else None
        if isinstance(self.source, Held) and self.recipe.optim.order != "blocks":
            rows = self.source.dataset.splits["train"]
            return to_device(rows, "train", taught, needs, self.device, self.head)
        scale = self.recipe.scale
        return PartRows(self.source, "train", taught, needs, self.device, self.head, scale)

    def student(self, arm: Arm) -> Adapter:
        """A fresh student, initialised by the arm's seed alone.

        So control and student start from equal weights.
        """
        torch.manual_seed(arm.seed)
        module = models.build_model(
            self.recipe.student.of_seed(arm.seed), **self.table.shape, key="student"
        )
        set_attention(module, self.recipe.precision.attention)
        phases.prepare(module, arm.phases)
        if self.recipe.scale.compile:
            compile_student(module, partial(say, "train"))
        if self.recipe.scale.recompute == "blocks":
            recompute_blocks(module)
        return Adapter(module, want=wants_of(arm.terms))

    def validate(self, student: nn.Module, world: World = ONE_PROCESS) -> dict[str, float]:
        """Validation metrics, prefixed val_; each rank measures a share of the rows."""
        metrics = tally(student, self.val, world).metrics()
        return {f"val_{name}": value for name, value in metrics.items()}

    def train_arm(
        self, arm: Arm, student: Adapter, world: World = ONE_PROCESS, **keywords: Any
    ) -> State:
        """One arm's training of `student`; keywords go to `train`."""
        live = (replay_of(arm, self.table, self.device) or self.live) if arm.source else None
        return train(
            arm,
            self.recipe.optim,
            student,
            self.train,
            lambda student: self.validate(student, world),
            live=live,
            world=world,
            precision=self.recipe.precision,
            micro=self.recipe.scale.micro,
            sharding=self.sharding(arm),
            **keywords,
        )

    def sharding(self, arm: Arm) -> Sharding | None:
        """How an arm's student lies in parts on the workers; None where each has it all."""
        kind = self.recipe.scale.shard
        return None if kind == "none" else Sharding(kind, lambda: self.student(arm))

    @cached_property
    def live(self) -> LiveTeacher:
        """The teacher for students that write, and what a text is to both."""
        return LiveTeacher(self.teacher or FrozenTeacher(self.frozen), self.text)

    @cached_property
    def text(self) -> TextShape:
        """What a text is to student and teacher."""
        classes = self.table.classes
        return TextShape(
            self.table.shape["steps"], classes.index(self.recipe.data.end), len(classes)
        )

    @cached_property
    def frozen(self) -> nn.Module:
        """The teacher in this process."""
        assert self.recipe.teacher is not None
        form = Form.of_teacher(self.recipe.precision, self.device)
        shape = self.table.shape
        return build_frozen(self.recipe.teacher, shape, form, key="teacher").eval()

    @cached_property
    def texts(self) -> dict[int, list[int]]:
        """What the teacher writes by itself where drafts are judged, once for all arms."""
        assert self.recipe.drafter is not None
        teacher = judge_drafter.reader(self.frozen, "teacher")
        return judge_drafter.teacher_texts(
            teacher, self.dataset.splits["test"], self.recipe.drafter, self.text
        )

    def drafts(self, student: nn.Module) -> Acceptance:
        """How the student does as the teacher's drafter on the test split."""
        assert self.recipe.drafter is not None
        drafter = judge_drafter.reader(student.eval(), "student")
        teacher = judge_drafter.reader(self.frozen, "teacher")
        test = self.dataset.splits["test"]
        return judge_drafter.judge(
            teacher, drafter, test, self.recipe.drafter, self.text, self.texts
        )

    def tested(self) -> Measured:
        """The test split, to be measured on.

        On text it tells the KL to the teacher where a store has the teacher's answers to all rows.
        """
        store = self.store
        whole = store is not None and self.table.is_text and not store.unscored("test")
        taught = store if whole and self.train.teaches_logits else None
        return measured(self.source, "test", taught, self.device, self.head, self.recipe.scale)

    def write_answers(self, student: nn.Module, path: Path, world: World) -> None:
        """Write this rank's share of the student's predictions of the test split."""
        with closing(self.tested()) as split:
            write(student, split, path, world)


def run_arms(
    recipe: Recipe,
    store: Address | None,
    folder: Path,
    *,
    world: World,
    device: torch.device,
    report: ArmReport,
    tick: ArmTick = lambda arm, step, pace: None,
    teacher: Teacher | None = None,
    source: Source | None = None,
) -> None:
    """Train every arm that is not done; safe to call again after any death.

    `report(arm key, step, metrics)` is called as training goes on, and `tick(arm key, step, pace)`
    after every step. `teacher` scores what students write, and `source` has the rows; each is
    loaded here where it is not given.
    """
    shard = recipe.scale.shard
    if shard != "none" and world.size > 1:
        workers_of_parts(shard, world, device)
    runner = ArmRunner(recipe, store, device, teacher, source)
    for arm in arms_of(recipe):
        is_done = world.rank == 0 and trained_arm.read_record(folder, arm.key) is not None
        if _agreed(world, is_done, device):
            continue
        saved = Checkpoints(run_files.checkpoints(folder) / arm.key)
        state = runner.train_arm(
            arm,
            runner.student(arm),
            world=world,
            checkpoints=saved,
            checkpoint_every=recipe.scale.checkpoint_every,
            report=partial(report, arm.key),
            tick=partial(tick, arm.key),
            kept=kept_of(recipe, runner.table, arm, folder),
        )
        answers = run_files.arm(folder, arm.key) / run_files.PREDICTIONS
        runner.write_answers(state.student, answers, world)
        if world.size > 1:
            dist.barrier()  # every rank has come to the end
        if world.rank == 0:
            join(answers, world)
            _write_arm(runner, arm, state, folder)
            saved.clear()
        if world.size > 1:
            dist.barrier()
    runner.close()


def _agreed(world: World, value: bool, device: torch.device) -> bool:
    """Rank 0's answer on every rank, so that all of them skip or train together."""
    if world.size == 1:
        return value
    answer = torch.tensor([float(value and world.rank == 0)], device=device)
    return bool(world.sum(answer) > 0)


def _write_arm(runner: ArmRunner, arm: Arm, state: State, folder: Path) -> None:
    target = run_files.arm(folder, arm.key)
    student = state.student
    weights = save(models.weights_of(student.module))
    write_bytes(target / run_files.WEIGHTS, weights)
    if runner.recipe.drafter and arm.name in DRAFTERS:
        runner.drafts(student.module).write(target / run_files.DRAFTS)
    if arm.name == UNROUNDED and runner.recipe.quant:
        post_training.write_rounded(runner.recipe, runner.source, target)
    record = {
        "run": trained_arm.run_of(folder),
        "arm": arm.name,
        "seed": arm.seed,
        "steps": state.step,
        "seconds": state.seconds,
        "throughput": state.throughput,
        "params": sum(p.numel() for p in student.module.parameters()),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "history": state.history,
        "kept_step": state.kept["step"],
        "val": {k: v for k, v in state.kept.items() if k.startswith("val_")},
    }
    trained_arm.write_record(target, record)
