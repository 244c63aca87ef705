"""Ray Tune: trials over one shared store.

Each trial leaves `trials/<id>/`: `history.jsonl` as it goes, and at its end `weights.safetensors`
and `trial.json`. A search that was killed and is given again reports what its trials reported, and
trains none of them twice: one that is half done goes on from its checkpoint. Test rows are not
looked at here.
"""

import json
import logging
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from raykd import errors, models
from raykd.console import Progress
from raykd.data.table import Source
from raykd.errors import InfraError, RaykdError
from raykd.files import waiting
from raykd.files.address import Address
from raykd.files.atomic import read_json, write_bytes, write_json
from raykd.models.device import device_of, on_device, training_device
from raykd.orchestration.cluster import check_seen, fitting, placed
from raykd.orchestration.session import faults_with_node, own_fault, plain_error
from raykd.orchestration.stalls import Watch, heart
from raykd.orchestration.training import to_send, worker_group
from raykd.recipe import imports
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import Range, apply_trial
from raykd.training import phases, run_files, trial_record
from raykd.training.arm import ONE_PROCESS, World
from raykd.training.arms import student_arm
from raykd.training.checkpoints import Checkpoints
from raykd.training.measured import tally
from raykd.training.run_arms import ArmRunner
from raykd.training.trial_record import TrialRecord

# A nested trial and its N workers fit N cores.
TRIAL_CPU = 0.05
WORKER_CPU = 0.9
AGAIN = "the trial goes on from its newest checkpoint"
TWIN_S = 86_400  # for another trial of the same point to end


def run_trials(
    recipe: Recipe, store: Address | None, folder: Path, source: Source | None = None
) -> dict[str, Any]:
    """Run the recipe's trials, and give their table with the best by the metric of `select`.

    A trial of one worker runs the plain loop under Tune; one of several workers nests a Ray Train
    group. Needs a Ray session. InfraError if no trial ran to its end.
    """
    from ray import tune

    assert recipe.search is not None
    settings = recipe.search
    steps = recipe.optim.steps
    nested = recipe.scale.workers[1] > 1
    recipe = placed(recipe)
    address = store.resolve() if isinstance(store, Path) else store
    known = trial_record.begun(folder)
    shared = {
        "recipe": recipe.model_dump(mode="json"),
        "store": str(address) if address else None,
        "folder": str(folder.resolve()),
        "source": to_send(source),
    }
    stalls = Watch("tune", recipe.scale.stall_timeout_s, AGAIN, run_files.beats(folder.resolve()))
    shared["board"] = str(stalls.board.folder)
    function = tune.with_parameters(nested_trial if nested else trial, shared=shared)
    # what fails a trial is reported once, by us
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    tuner = tune.Tuner(
        tune.with_resources(function, _resources(recipe, nested)),
        param_space={key: _domain(span) for key, span in settings.space.items()},
        tune_config=tune.TuneConfig(
            metric=metric_of(recipe),
            mode="max",
            num_samples=settings.trials,
            max_concurrent_trials=min(settings.concurrent, _fitting(recipe)),
            search_alg=_searcher(settings.searcher, settings.seed, known[: settings.trials]),
            scheduler=_scheduler(steps, settings.grace),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(run_files.ray(folder.resolve())),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=recipe.scale.retries),
            callbacks=[_record(folder), _progress(settings.trials, steps, metric_of(recipe))],
        ),
    )
    try:
        with stalls:
            grid = tuner.fit()
    except Exception as error:  # Ray raises its own kinds and ours, wrapped
        raise plain_error(error, "tune") from error
    results = [grid[i] for i in range(len(grid))]
    metric = metric_of(recipe)
    rows = [_trial_row(number, result, folder, metric) for number, result in enumerate(results)]
    faults = [fault for row in rows if (fault := _fault_of(row, folder))]
    failures = [result.error for result in results if result.error]
    return _with_best(rows, [*faults, *failures], metric)


def metric_of(recipe: Recipe) -> str:
    """The validation metric that trials are compared by."""
    return f"val_{recipe.select}"


def _with_best(trials: list[dict[str, Any]], failures: list[Any], metric: str) -> dict[str, Any]:
    """The table of trials, with the best that ran to its end."""
    finished = [row for row in trials if row["state"] == "finished"]
    if not finished and failures:
        raise plain_error(failures[0], "tune")
    if not finished:
        raise InfraError("no trial ran to its end; raise search.trials")
    best = max(finished, key=lambda row: row[metric])
    return {"metric": metric, "trials": trials, "best": best}


def trial(config: dict[str, Any], shared: dict[str, Any]) -> None:
    """One point of the space, trained by the plain loop in this process."""
    from ray import tune

    shared = shared | {"trial": trial_record.trial_id(config)}
    with waiting.locked(_folder_of(shared), wait=True, limit_s=TWIN_S):
        _told_once(lambda: _train_trial(config, shared, ONE_PROCESS, tune.report), config, shared)


def nested_trial(config: dict[str, Any], shared: dict[str, Any]) -> None:
    """One point of the space, trained by a Ray Train group of its own."""
    from ray.tune.integration.ray_train import TuneReportCallback

    shared = shared | {"trial": trial_record.trial_id(config)}
    loop_config = {"config": config, "shared": shared}
    recipe = _recipe_of(config, shared)
    group = worker_group(
        recipe,
        trial_worker,
        loop_config,
        folder=_folder_of(shared),
        cpus=WORKER_CPU,
        callbacks=[TuneReportCallback()],
    )
    with waiting.locked(_folder_of(shared), wait=True, limit_s=TWIN_S):
        _told_once(group.fit, config, shared)


def _told_once(train: Callable[[], Any], config: dict[str, Any], shared: dict[str, Any]) -> None:
    """Train a trial; a fault that a repetition would meet again fails it without one."""
    from ray import tune

    try:
        train()
    except Exception as error:  # Ray raises its own kinds and ours, wrapped
        fault = own_fault(error)
        if fault is None:
            raise
        folder = _folder_of(shared)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / run_files.FAULT, {"kind": type(fault).__name__, "text": str(fault)})
        recipe = _recipe_of(config, shared)
        tune.report({"step": recipe.optim.steps, metric_of(recipe): math.nan})


def _fault_of(row: dict[str, Any], folder: Path) -> RaykdError | None:
    """The fault that ended a trial, if one of ours did."""
    found = read_json(run_files.trial(folder, row["id"]) / run_files.FAULT) if row["id"] else None
    return getattr(errors, found["kind"])(found["text"]) if found else None


def trial_worker(config: dict[str, Any]) -> None:
    """What every worker of a nested trial runs."""
    import ray.train

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    _train_trial(config["config"], config["shared"], world, ray.train.report)


def _train_trial(
    config: dict[str, Any],
    shared: dict[str, Any],
    world: World,
    report: Callable[[dict[str, Any]], Any],
) -> None:
    """Train a trial, by this worker; a stop of it is told on the board of the search."""
    board = shared.get("board")
    with faults_with_node():
        recipe = _recipe_of(config, shared)
        limit_s = recipe.scale.stall_timeout_s
        beating = heart(board, shared["trial"], rank=world.rank, size=world.size, limit_s=limit_s)
        with beating:
            _train_point(recipe, shared, world=world, report=report, tick=beating.tick)


def _train_point(
    recipe: Recipe,
    shared: dict[str, Any],
    *,
    world: World,
    report: Callable[[dict[str, Any]], Any],
    tick: Callable[[], None],
) -> None:
    folder = _folder_of(shared)
    metric = metric_of(recipe)
    check_seen(Path(shared["folder"]))
    record = trial_record.read(folder)
    if record:
        _report_again(folder, record, metric, report)
        return
    device = training_device(recipe)
    runner = ArmRunner(recipe, shared["store"], device, source=shared["source"])
    arm = student_arm(recipe, recipe.seeds[0])
    student = runner.student(arm)
    checkpoints = Checkpoints(run_files.checkpoints(Path(shared["folder"])) / shared["trial"])

    def report_step(step: int, metrics: dict[str, Any]) -> None:
        if world.rank == 0:
            _append_history(folder, metrics)
        if step < recipe.optim.steps:
            report({"step": step, metric: metrics[metric]})

    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / run_files.HISTORY).unlink(missing_ok=True)
        (folder / run_files.FAULT).unlink(missing_ok=True)
    chosen = checkpoints.choose(world, device)
    kept = checkpoints.load(chosen) if chosen else None
    for metrics in kept.meta["history"] if kept else ():
        report_step(metrics["step"], metrics)
    state = runner.train_arm(
        arm,
        student,
        world=world,
        checkpoints=checkpoints,
        checkpoint_every=recipe.scale.checkpoint_every,
        report=report_step,
        tick=lambda step, pace: tick(),
    )
    # before the last report, where the scheduler may end this process; and both of the weights
    # that the student goes back to
    if world.rank == 0:
        _save(student.module, folder / run_files.WEIGHTS)
        value = float(state.kept[metric])
        trial_record.write(folder, TrialRecord(trial_record.FINISHED, state.step, value))
        checkpoints.clear()
    report({"step": state.step, metric: state.kept[metric]})


def _report_again(
    folder: Path, record: TrialRecord, metric: str, report: Callable[[dict[str, Any]], Any]
) -> None:
    """Report what a trial that is over reported, so that others are compared with it as before."""
    for line in (folder / run_files.HISTORY).read_text().splitlines():
        metrics = json.loads(line)
        is_last = metrics["step"] == record.step
        if metrics["step"] < record.step or (is_last and record.state == trial_record.STOPPED):
            report({"step": metrics["step"], metric: metrics[metric]})
    if record.state == trial_record.FINISHED:
        report({"step": record.step, metric: record.value})


def test_metrics(recipe: Recipe, weights: Path, source: Source | None) -> dict[str, float]:
    """Metrics of a trial's weights on the test split; of the best, once the search is over."""
    # this process may be on a node without the GPU that the trials had
    device = "cpu" if recipe.scale.device == "cpu" else "auto"
    runner = ArmRunner(recipe, None, device_of(on_device(recipe, device)), source=source)
    student = runner.student(student_arm(recipe, recipe.seeds[0])).to(runner.device)
    if recipe.phases:
        phases.enter(student.module, recipe.phases[-1])
    models.load_weights(student.module, weights, "trial")
    with closing(runner), closing(runner.tested()) as split:
        return tally(student, split).metrics()


def _folder_of(shared: dict[str, Any]) -> Path:
    return run_files.trial(Path(shared["folder"]), shared["trial"])


def _recipe_of(config: dict[str, Any], shared: dict[str, Any]) -> Recipe:
    recipe = Recipe.model_validate(apply_trial(shared["recipe"], config))
    imports.permit(recipe.packages)
    return recipe


def _append_history(folder: Path, metrics: dict[str, Any]) -> None:
    with (folder / run_files.HISTORY).open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def _save(module: nn.Module, path: Path) -> None:
    write_bytes(path, save(models.weights_of(module)))


def _resources(recipe: Recipe, nested: bool) -> dict[str, float]:
    if nested:
        return {"CPU": TRIAL_CPU}
    return {"CPU": 1, **({"GPU": 1} if recipe.scale.device == "cuda" else {})}


def _fitting(recipe: Recipe) -> int:
    """How many trials have room at once; more would wait for each other's workers for ever."""
    kind = "GPU" if recipe.scale.device == "cuda" else "CPU"
    return max(1, fitting({kind: 1}) // recipe.scale.workers[1])


def _domain(span: Range) -> Any:
    from ray import tune

    if span.uniform:
        return tune.uniform(*span.uniform)
    if span.loguniform:
        return tune.loguniform(*span.loguniform)
    if span.integer:
        return tune.randint(span.integer[0], span.integer[1] + 1)
    return tune.choice(span.choice or [])


def _searcher(name: str, seed: int, known: list[dict[str, Any]]) -> Any:
    """Who proposes points: those of trials that were begun first, then new ones.

    Chance draws the same points again by itself.
    """
    from ray.tune.search.basic_variant import BasicVariantGenerator

    if name == "random":
        return BasicVariantGenerator(random_state=seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # with the same seed the sampler would draw the known points once more
    return OptunaSearch(seed=seed + len(known), points_to_evaluate=known or None)


def _scheduler(steps: int, grace: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="step", max_t=steps, grace_period=min(grace, steps), reduction_factor=2
    )


def _trial_row(number: int, result: Any, folder: Path, metric: str) -> dict[str, Any]:
    """A trial as the report shows it. One whose metric is not a number has failed."""
    metrics = result.metrics or {}
    params = dict(result.config or {})
    key = trial_record.trial_id(params) if params else None
    record = trial_record.read(run_files.trial(folder, key)) if key else None
    value = record.value if record and record.value is not None else metrics.get(metric)
    is_number = value is not None and math.isfinite(value)
    is_sound = is_number and record is not None and not result.error
    return {
        "number": number,
        "id": key,
        "params": params,
        "steps": record.step if record else metrics.get("step"),
        "state": record.state if record and is_sound else "failed",
        metric: value if is_sound else None,
    }


def _record(folder: Path) -> Any:
    """What writes the point of each trial that begins, and which trials the scheduler stopped."""
    from ray import tune

    class Recorded(tune.Callback):
        def __init__(self) -> None:
            self.count = len(trial_record.begun(folder))

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            place = run_files.trial(folder, trial_record.trial_id(trial.config))
            trial_record.begin(place, trial.config, self.count)
            self.count += 1

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            place = run_files.trial(folder, trial_record.trial_id(trial.config))
            step = (trial.last_result or {}).get("step")
            is_known = trial_record.read(place) or (place / run_files.FAULT).exists()
            if step is not None and not is_known:
                trial_record.write(place, TrialRecord(trial_record.STOPPED, step))
            Checkpoints(run_files.checkpoints(folder) / place.name).clear()

    return Recorded()


def _progress(trials: int, steps: int, metric: str) -> Any:
    """Steps of all trials as they are reported; a stopped trial counts as whole."""
    from ray import tune

    class Shown(tune.Callback):
        def __init__(self) -> None:
            self.progress = Progress("tune", trials * steps, "steps")
            self.reached: dict[str, int] = {}

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            self.reached[trial.trial_id] = result["step"]
            number = list(self.reached).index(trial.trial_id)
            named = metric.removeprefix("val_").replace("_", "-")
            note = f"trial {number}: validation {named} {result[metric]:.3f}"
            self.progress.advance(sum(self.reached.values()), note)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.reached[trial.trial_id] = steps

        def on_experiment_end(self, trials: Any, **info: Any) -> None:
            self.progress.finish()

    return Shown()
