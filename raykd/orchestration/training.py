"""Ray Train: every arm of a recipe, in this process or in one group of workers."""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from raykd.console import Progress, say
from raykd.data.table import Source
from raykd.errors import Diverged, InfraError
from raykd.files.address import Address
from raykd.models.device import training_device
from raykd.orchestration.cluster import check_seen, described, placed, trains_elsewhere
from raykd.orchestration.patience import Patience
from raykd.orchestration.session import faults_with_node, own_fault, plain_error
from raykd.orchestration.stalls import ALONE, Watch, heart
from raykd.orchestration.teachers import ServedTeacher, teacher_actors
from raykd.recipe import imports
from raykd.recipe.recipe import Recipe
from raykd.training import run_files, trained_arm
from raykd.training.arm import World
from raykd.training.arms import arms_of
from raykd.training.run_arms import ArmReport, run_arms
from raykd.training.throughput import WORTH_TELLING, Pace

TICK_S = 2  # between lines of progress that no evaluation brings
PACE = ("rows_per_second", "waiting_share")
LAST_BYTES = 4096  # of the file of progress, which hold its last line
WAITING_S = 30  # between words of what is waited for
AGAIN = "its group starts again from the newest checkpoint"


def train_all_arms(
    recipe: Recipe, store: Address | None, folder: Path, source: Source | None = None
) -> list[dict[str, Any]]:
    """Train all arms that are not done, and give every arm's record.

    Workers are sent what `source` knows of parts; rows in memory they load by themselves, but for
    one that is this process.

    One worker is Ray Train's local mode: the loop runs here, with no actors and no start-up. More
    are one worker group for all arms, because starting a group costs many seconds; it survives
    `scale.retries` lost workers.
    """
    recipe = placed(recipe)
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "store": str(store) if store else None,
        "folder": str(folder),
        "source": source if _workers(recipe) == 0 else to_send(source),
    }
    arms = arms_of(recipe)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    progress = Progress("train", len(arms) * recipe.optim.steps, "steps")
    asks = recipe.source is not None and recipe.source.log is None
    has_actors = asks and recipe.scale.workers[1] > 1
    actors = teacher_actors(recipe, source) if has_actors else nullcontext([])
    shown = _ProgressWatch(
        folder, [arm.key for arm in arms], steps=recipe.optim.steps, progress=progress
    )
    stalls = Watch("train", recipe.scale.stall_timeout_s, AGAIN, run_files.beats(folder.resolve()))
    with shown, actors as names, stalls:
        config |= {"teachers": names, "board": str(stalls.board.folder)}
        try:
            fault = _fit(recipe, config, folder, shown.reached)
        except Exception as error:  # Ray raises its own kinds and ours, wrapped
            raise stalls.fault(recipe.scale.retries, plain_error(error, "train")) from error
    if fault:
        raise fault
    found = [trained_arm.read_record(folder, arm.key) for arm in arms]
    records = [record for record in found if record]
    if len(records) < len(arms):
        raise InfraError(
            "train ended without training every arm; run it again to continue where it stopped"
        )
    progress.finish()
    for arm in arms:
        log = run_files.draft_log(folder, arm.key)
        if arm.source and arm.source.keep and not (log / "_MANIFEST.json").exists():
            record = run_files.arm_record(folder, arm.key)
            say(
                "train",
                f"{log} lacks shards of an earlier attempt; "
                f"delete {record} and train again to finish it",
            )
    return records


def _fit(
    recipe: Recipe, config: dict[str, Any], folder: Path, reached: Callable[[], int]
) -> Diverged | None:
    """Train with a group, and with another where it has lost workers more often than Ray allows.

    A further group begins as long as training goes forward by a checkpoint, or within
    `scale.start_timeout_s` without. `reached` counts the steps that are done.
    """
    patience = Patience(recipe.scale.start_timeout_s, least=recipe.scale.checkpoint_every)
    patience.reached = reached()
    while True:
        try:
            return worker_group(recipe, train_worker, config, folder=folder).fit().return_value
        except Exception as error:
            if not patience.again(error, reached()):
                raise
            say("train", f"! {plain_error(error, 'train')}; {AGAIN}")


def to_send(source: Source | None) -> Source | None:
    """A source that workers can be sent: one of parts, which has no rows in it."""
    return source if source and source.table().in_parts else None


def worker_group(
    recipe: Recipe,
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    folder: Path,
    cpus: float = 1.0,
    num_workers: int | tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """A Ray Train group that runs `loop(config)`; its retries and waits have an end.

    An attempt's name is its own, because our checkpoints, not Ray's, are what it resumes from.
    `cpus` is a worker's share of its node. `num_workers` is `scale.workers` unless given: 1 is an
    actor, 0 this process. `options` join the RunConfig.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = placed(recipe)
    gpu = recipe.scale.device == "cuda"
    retries = recipe.scale.retries
    if num_workers is None:
        num_workers = _workers(recipe)
    callbacks = [*options.pop("callbacks", ()), _stop_at_our_own_faults()]
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(recipe.scale.start_timeout_s)
    return TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name=f"raykd-{uuid.uuid4().hex[:12]}",
            storage_path=str(run_files.ray(folder.resolve())),
            failure_config=FailureConfig(
                max_failures=retries,
                controller_failure_limit=retries,
                max_preemption_failures=retries,
            ),
            callbacks=callbacks,
            **options,
        ),
    )


def _stop_at_our_own_faults() -> Any:
    """What ends a group whose worker has met a fault that each retry would meet again."""
    from ray.train import UserCallback

    class Stop(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for error in worker_exceptions.values():
                fault = own_fault(error)
                if fault:
                    raise fault

    return Stop()


def _workers(recipe: Recipe) -> int | tuple[int, int]:
    """`scale.workers` as Ray takes it; 0 is the loop in this process, where one is enough.

    One worker is an actor where the cluster has GPUs and this process none.
    """
    low, high = recipe.scale.workers
    if high == 1:
        return 1 if trains_elsewhere(recipe) else 0
    return high if low == high else (low, high)


def train_worker(config: dict[str, Any]) -> Diverged | None:
    """What every worker of the group runs.

    A divergence is every rank's. It is returned, not raised, because a retry would repeat it.
    """
    import ray.train

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    folder = Path(config["folder"])

    def report(arm: str, step: int, metrics: dict[str, Any]) -> None:
        if world.rank == 0:
            _append_progress(folder, arm, step=step, metrics=metrics)
        ray.train.report({"arm": arm, **metrics})

    try:
        with faults_with_node():
            recipe = Recipe.model_validate(config["recipe"])
            imports.permit(recipe.packages)
            limit_s = recipe.scale.stall_timeout_s
            board = config.get("board")
            with heart(board, ALONE, rank=world.rank, size=world.size, limit_s=limit_s) as beating:
                _train(recipe, folder, config, world=world, report=report, tick=beating.tick)
    except Diverged as fault:
        return fault
    return None


def _train(
    recipe: Recipe,
    folder: Path,
    config: dict[str, Any],
    *,
    world: World,
    report: ArmReport,
    tick: Callable[[], None],
) -> None:
    """Every arm, by this worker; `tick` is called after each step."""
    import ray.train.torch

    check_seen(folder)
    if world.rank == 0:
        _append_progress(folder, arms_of(recipe)[0].key, step=0, metrics={})
    device = training_device(recipe)
    if device.type == "cuda":
        device = ray.train.torch.get_device()
    written = _Ticker(folder, world.size) if world.rank == 0 else _no_tick

    def after_step(arm: str, step: int, pace: Pace) -> None:
        tick()
        written(arm, step, pace)

    names = config["teachers"]
    run_arms(
        recipe,
        config["store"],
        folder,
        world=world,
        device=device,
        report=report,
        tick=after_step,
        teacher=_teacher(recipe, names, world.rank, tick) if names else None,
        source=config["source"],
    )


def _teacher(
    recipe: Recipe, names: list[str], rank: int, tick: Callable[[], None]
) -> ServedTeacher:
    """A worker's teacher among the actors: one more text may wait than its source draws ahead."""
    assert recipe.source is not None
    most = recipe.source.ahead + 1
    wait_s = recipe.scale.start_timeout_s
    return ServedTeacher(names[rank % len(names)], most=most, wait_s=wait_s, tick=tick)


def _append_progress(folder: Path, arm: str, *, step: int, metrics: dict[str, Any]) -> None:
    line = {"arm": arm, "step": step}
    line |= {name: metrics.get(name) for name in ("val_accuracy", *PACE)}
    with (folder / run_files.PROGRESS).open("a") as file:
        file.write(json.dumps(line) + "\n")


class _Ticker:
    """Appends the steps that are done, and how fast, to the run folder, every few seconds, between
    evaluations.
    """

    def __init__(self, folder: Path, workers: int):
        self.folder = folder
        self.workers = workers
        self.written = time.monotonic()

    def __call__(self, arm: str, step: int, pace: Pace) -> None:
        now = time.monotonic()
        if now - self.written >= TICK_S:
            self.written = now
            _append_progress(self.folder, arm, step=step, metrics=pace.rates(self.workers))


def _no_tick(arm: str, step: int, pace: Pace) -> None:
    """What a rank does whose steps nobody watches."""


class _ProgressWatch:
    """Shows the progress that rank 0, wherever it runs, appends to the run folder."""

    def __init__(self, folder: Path, arms: list[str], *, steps: int, progress: Progress):
        self.path = folder / run_files.PROGRESS
        self.arms = arms
        self.steps = steps
        self.progress = progress
        self.before = self._size()  # what an earlier command wrote
        self.waiting = True
        self.said = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.5):
            if self.waiting and self._size() == self.before:
                self._say_waiting()
                continue
            self.waiting = False
            last = _last_line(self.path)
            if last and last["arm"] in self.arms:
                note = last["arm"]
                if last["val_accuracy"] is not None:
                    note += f": validation accuracy {last['val_accuracy']:.3f}"
                note += _pace(last)
                self.progress.advance(self.reached(), note)

    def reached(self) -> int:
        """How many steps are done of all arms, by the last line of progress."""
        last = _last_line(self.path)
        if not last or last["arm"] not in self.arms:
            return 0
        return self.arms.index(last["arm"]) * self.steps + last["step"]

    def _say_waiting(self) -> None:
        """What is waited for, every half minute until the workers have started."""
        import ray

        now = time.monotonic()
        if now - self.said >= WAITING_S and ray.is_initialized():
            self.said = now
            say("train", f"waits for its workers to start: {described()}")

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _pace(last: Mapping[str, Any]) -> str:
    """Rows a second of a line of progress, and how much of the time is spent waiting for rows."""
    if last.get("rows_per_second") is None:
        return ""
    text = f", {last['rows_per_second']:,.0f} rows/s"
    waiting = last["waiting_share"]
    return text if waiting < WORTH_TELLING else f"{text}, waiting for rows {waiting:.0%} of it"


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of progress; None while there is none.

    A process that was ended while it wrote leaves a torn line, which the next one continues.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().rpartition(b"\n")[0].splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict) and told.keys() >= {"arm", "step", "val_accuracy"}:
                return told
    return None
