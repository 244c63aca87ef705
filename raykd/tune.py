"""Ray Tune: trials over one shared store."""

import json
import logging
from pathlib import Path
from typing import Any

from raykd import checks
from raykd.arms import Workshop, arms_of, write_predictions
from raykd.errors import InfraError, RaykdError
from raykd.files import read_json, write_bytes, write_json
from raykd.progress import Progress
from raykd.recipe import Range, Recipe
from raykd.score import device_of
from raykd.session import plain_error
from raykd.train import Arm

METRIC = "val_accuracy"


def search(recipe: Recipe, store: Path | None, folder: Path) -> dict[str, Any]:
    """Run the recipe's trials; the table of them, best first by validation accuracy. Needs a Ray session.

    A trial that fits one worker runs the plain loop under Tune; one of several workers nests a Ray Train group. Test
    rows are not looked at here.
    """
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    assert recipe.search is not None
    settings, steps = recipe.search, recipe.optim.steps
    workers = recipe.scale.workers[1]
    config = {"recipe": recipe.model_dump(mode="json"), "store": str(store) if store else None}
    nested = workers > 1
    function = tune.with_parameters(nested_trial if nested else trial, shared=config, folder=str(folder.resolve()))
    gpu = {"GPU": 1} if device_of(recipe).type == "cuda" else {}
    cpus = int(ray.cluster_resources().get("CPU", 1))
    fitting = max(1, cpus // (workers + 1)) if nested else max(1, cpus)
    tuner = tune.Tuner(
        tune.with_resources(function, {"CPU": 0.01} if nested else {"CPU": 1, **gpu}),
        param_space={k: _domain(v) for k, v in settings.space.items()},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=settings.trials,
            max_concurrent_trials=min(settings.concurrent, fitting),
            search_alg=_searcher(settings.searcher, settings.seed),
            scheduler=ASHAScheduler(
                time_attr="step", max_t=steps, grace_period=min(settings.grace, steps), reduction_factor=2
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.resolve() / "ray"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=recipe.scale.retries),
            callbacks=[_progress_callback(settings.trials)],
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        grid = tuner.fit()
    except Exception as error:  # Ray raises its own kinds and ours, wrapped
        raise plain_error(error, "tune") from error
    trials = sorted((_row(r, steps) for r in grid), key=lambda t: -(t[METRIC] if t[METRIC] is not None else -1))
    done = [t for t in trials if t["state"] == "finished"]
    if not done:
        errors = [r.error for r in grid if r.error]
        raise plain_error(errors[0], "tune") if errors else InfraError("no trial ran to its end")
    return {"metric": METRIC, "trials": trials, "best": done[0]}
