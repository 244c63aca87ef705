"""Ray Train: every arm of a recipe, in this process or in one group of workers."""

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from raykd.console import Progress, say
from raykd.errors import Diverged, InfraError
from raykd.files.address import Address
from raykd.files.atomic import read_json
from raykd.models.device import device_of
from raykd.orchestration.session import plain_error
from raykd.orchestration.teachers import Served, teachers
from raykd.recipe.recipe import Recipe
from raykd.training import run_files
from raykd.training.arm import World
from raykd.training.arms import arms_of
from raykd.training.run_arms import run_arms


def fit(recipe: Recipe, store: Address | None, folder: Path) -> list[dict[str, Any]]:
    """Train all arms that are not done, give every arm's record.

    One worker is Ray Train's local mode: the loop runs here, with no actors and no start-up. More
    are one worker group for all arms, because starting a group costs many seconds; it survives
    `scale.retries` lost workers.
    """
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "store": str(store) if store else None,
        "folder": str(folder),
    }
    arms = arms_of(recipe)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    progress = Progress("train", len(arms) * recipe.optim.steps, "steps")
    asks = recipe.source is not None and recipe.source.log is None
    apart = teachers(recipe) if asks and recipe.scale.workers[1] > 1 else nullcontext([])
    with _Watch(folder, [a.key for a in arms], recipe.optim.steps, progress), apart as names:
        try:
            fault = (
                group(recipe, train_worker, config | {"teachers": names}, folder).fit().return_value
            )
        except Exception as error:  # Ray raises its own kinds and ours, wrapped
            raise plain_error(error, "train") from error
    if fault:
        raise fault
    records = [read_json(run_files.arm_record(folder, arm.key)) for arm in arms]
    if not all(records):
        raise InfraError(
            "train ended without training every arm; run it again to continue where it stopped"
        )
    progress.finish()
    for arm in arms:
        log = run_files.draft_log(folder, arm.key)
        if arm.source and arm.source.keep and not (log / "_MANIFEST.json").exists():
            again = run_files.arm_record(folder, arm.key)
            say(
                "train",
                f"{log} lacks shards of an earlier attempt; delete {again} and train again to finish it",
            )
    return records


def group(
    recipe: Recipe,
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    folder: Path,
    **options: Any,
) -> Any:
    """A Ray Train group of `scale.workers` that runs `loop(config)`; its retries and waits have an
    end.

    An attempt's name is its own, because our checkpoints, not Ray's, are what it resumes from.
    `options` join the RunConfig, except `cpus`, a worker's share of its node, and `num_workers`: 1
    is an actor, 0 this process.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    low, high = recipe.scale.workers
    gpu, retries = device_of(recipe).type == "cuda", recipe.scale.retries
    cpus = options.pop("cpus", 1.0)
    num_workers = options.pop(
        "num_workers", 0 if high == 1 else high if low == high else (low, high)
    )
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
            **options,
        ),
    )


def train_worker(config: dict[str, Any]) -> Diverged | None:
    """What every worker of the group runs.

    A divergence is every rank's: given back, because a retry repeats it.
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    recipe, folder = Recipe.model_validate(config["recipe"]), Path(config["folder"])

    def tell(arm: str, step: int, metrics: dict[str, Any]) -> None:
        if world.rank == 0:
            _note(folder, arm, step, metrics)
        ray.train.report({"arm": arm, **metrics})

    device = ray.train.torch.get_device() if device_of(recipe).type == "cuda" else device_of(recipe)
    try:
        teacher = _teacher(recipe, config["teachers"], world.rank) if config["teachers"] else None
        run_arms(
            recipe, config["store"], folder, world=world, device=device, tell=tell, teacher=teacher
        )
    except Diverged as fault:
        return fault
    return None


def _teacher(recipe: Recipe, names: list[str], rank: int) -> Served:
    """A worker's teacher among the actors; as many of its texts may wait as its source draws ahead,
    and one.
    """
    assert recipe.source is not None
    most, wait_s = recipe.source.ahead + 1, recipe.scale.start_timeout_s
    return Served(names[rank % len(names)], most=most, wait_s=wait_s)


def _note(folder: Path, arm: str, step: int, metrics: dict[str, Any]) -> None:
    line = {"arm": arm, "step": step, "val_accuracy": metrics.get("val_accuracy")}
    with (folder / run_files.PROGRESS).open("a") as file:
        file.write(json.dumps(line) + "\n")


class _Watch:
    """Shows the progress that rank 0, wherever it runs, appends to the run folder."""

    def __init__(self, folder: Path, arms: list[str], steps: int, progress: Progress):
        self.path, self.arms, self.steps, self.progress = (
            folder / run_files.PROGRESS,
            arms,
            steps,
            progress,
        )
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.5):
            last = _last_line(self.path)
            if last and last["arm"] in self.arms:
                done = self.arms.index(last["arm"]) * self.steps + last["step"]
                self.progress.advance(
                    done, f"{last['arm']}: validation accuracy {last['val_accuracy']:.3f}"
                )


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line, as JSON; None while there is none."""
    try:
        lines = path.read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None
