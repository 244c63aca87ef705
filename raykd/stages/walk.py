"""The walk: score -> train -> [tune] -> export -> report. Each verb runs what it needs and is not
yet done.

A run is the folder `<out>/<name>-<digest8>/`: the same inputs name the same folder, so a finished
stage is found and not done again, and a changed input is a new folder. Teacher stores lie beside
it, in `<out>/stores/`, or where `scale.store` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
import torch

from raykd import data, models
from raykd.console import say
from raykd.data import Dataset
from raykd.deploy import run_artefact
from raykd.errors import InfraError, RecipeError
from raykd.files import waiting
from raykd.files.address import Address
from raykd.files.atomic import read_json, write_bytes, write_json
from raykd.files.digests import digest_of
from raykd.generation import judge_drafter
from raykd.losses.terms import needs_of
from raykd.orchestration import scoring
from raykd.orchestration.session import connect
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import apply_trial
from raykd.reports import answers, evidence, gather, page
from raykd.teacher.identity import run_digest, signals_of
from raykd.teacher.scorer import Scorer
from raykd.techniques import register
from raykd.tracking import mlflow_mirror, run_log
from raykd.tracking.journal import Journal
from raykd.training import post_training, run_files
from raykd.training.arms import arms_of
from raykd.training.run_arms import kept_of, replay_of

OUT = Path("runs")


@dataclass(frozen=True)
class Place:
    """Where a recipe's results stand, and what has been done there."""

    recipe: Recipe
    out: Path = OUT
    address: str | None = None

    @cached_property
    def folder(self) -> Path:
        return (
            self.out / f"{self.recipe.name}-{run_digest(self.recipe, self.dataset)[:8]}"
        ).resolve()

    @cached_property
    def dataset(self) -> Dataset:
        return data.load(self.recipe.data)

    @cached_property
    def store(self) -> Address | None:
        """The address of the recipe's teacher store, whether or not it exists; None if no teacher
        is read.
        """
        if self.recipe.teacher is None or not needs_of(self.recipe.terms):
            return None
        return scoring.locate(self.recipe, self.dataset, self.out.resolve())[0]

    @property
    def is_scored(self) -> bool:
        return self.store is None or scoring.is_complete(self.store, signals_of(self.recipe))

    @property
    def untrained(self) -> list[str]:
        """The arms that are not trained yet."""
        keys = [arm.key for arm in arms_of(self.recipe)]
        return [key for key in keys if not run_files.arm_record(self.folder, key).exists()]

    @property
    def is_searched(self) -> bool:
        return self.recipe.search is None or (self.folder / run_files.TRIALS).exists()

    @property
    def is_exported(self) -> bool:
        return run_artefact.is_whole(self.recipe, self.folder)

    def check_text(self) -> None:
        """RecipeError where a table is about text and the data are none, a model can not write, or
        a log be used.
        """
        recipe = self.recipe
        for key in ("source", "drafter"):
            if getattr(recipe, key) and not self.dataset.is_text:
                raise RecipeError(
                    f"{key}: is about rows of text, and these are none; name data.tokenizer, or leave it out"
                )
        for arm in arms_of(recipe):
            kept_of(recipe, self.dataset, arm, self.folder)
            replay_of(arm, self.dataset, torch.device("cpu"))
        if recipe.drafter and recipe.teacher is None:
            raise RecipeError(
                "drafter: judges students by their teacher, and there is none; add [teacher], or leave it out"
            )
        if recipe.drafter and recipe.teacher:
            judge_drafter.openings(self.dataset.splits["test"], recipe.drafter)
            for key, ref in (("teacher", recipe.teacher), ("student", recipe.student)):
                with torch.device("meta"):
                    judge_drafter.check(
                        models.build_model(ref.bare, **self.dataset.shape, key=key), key
                    )

    def journal(self) -> Journal:
        return run_log.open_journal(self.recipe, self.dataset, self.folder, self.store)

    @property
    def uri(self) -> str:
        return self.recipe.track.uri or mlflow_mirror.default_uri(self.out)


def score(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> Address | None:
    """The recipe's complete teacher store, a folder or an s3:// URL; None if it reads no teacher."""
    return _walk(Place(recipe, Path(out), address), _score)


def train(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> Path:
    """The run folder, with every arm trained in `arms/`."""
    return _walk(Place(recipe, Path(out), address), _score, _train)


def tune(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> dict[str, Any]:
    """The table of trials and the best of them, whose whole recipe is `best.toml` in the run
    folder.
    """
    if recipe.search is None:
        raise RecipeError(
            'search: missing; add [search] with a line such as "optim.learning_rate" = {...}'
        )
    return _walk(Place(recipe, Path(out), address), _score, _tune)


def export(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> Path:
    """The deployable folder `artefact/` of the best seed, by validation accuracy.

    GateError if it is not faithful.
    """
    return _walk(Place(recipe, Path(out), address), _score, _train, _export)


def report(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> dict[str, Any]:
    """report.json as a dict, of all that is done; the stages it can not do without are run."""
    return _walk(Place(recipe, Path(out), address), _score, _train, _report)


def run(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> dict[str, Any]:
    """Every stage, then report.json as a dict."""
    searching = [_tune] if recipe.search else []
    return _walk(Place(recipe, Path(out), address), _score, _train, *searching, _export, _report)


def _walk(place: Place, *stages: Callable[[Place], Any]) -> Any:
    """What the last of the stages gives, taken in order while no other process works on this run."""
    register(place.recipe.technique)
    place.check_text()
    if _export in stages:
        run_artefact.check(place.recipe, place.dataset)
    place.folder.mkdir(parents=True, exist_ok=True)
    write_json(place.folder / run_files.RECIPE, place.recipe.model_dump(mode="json"))
    try:
        with waiting.locked(run_files.checkpoints(place.folder)):
            for stage in stages:
                found = stage(place)
    except BlockingIOError:
        raise InfraError(
            f"{place.folder} is being worked on by another process; wait for it, or end it"
        ) from None
    except BaseException as error:
        run_log.ended(place.folder, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run_log.ended(place.folder, "FINISHED")
    _sync(place)
    return found


def _score(place: Place) -> Address | None:
    if place.store is None:
        return None
    if place.is_scored:
        say("score", f"done before: {place.store}")
    else:
        Scorer.check(place.recipe)
        connect(place.address)
        scoring.score(place.recipe, place.dataset, place.out.resolve())
    return place.store


def _train(place: Place) -> Path:
    from raykd.orchestration.training import fit

    if place.untrained:
        if place.recipe.scale.workers[1] > 1:
            connect(place.address)
        fit(place.recipe, place.store, place.folder)
        run_log.arms(place.journal(), place.recipe, place.folder)
    else:
        say("train", f"done before: {run_files.arms(place.folder)}")
    post_training.write_missing(place.recipe, place.dataset, place.folder)
    return place.folder


def _tune(place: Place) -> dict[str, Any]:
    from raykd.orchestration.tuning import search

    if not place.is_searched:
        connect(place.address)
        table = search(place.recipe, place.store, place.folder)
        best = Recipe.model_validate(
            apply_trial(place.recipe.model_dump(mode="json"), table["best"]["params"])
        )
        write_bytes(place.folder / run_files.BEST_RECIPE, _toml(best).encode())
        write_json(
            place.folder / run_files.TRIALS,
            table | {"best": table["best"] | _tested(place, best, table["best"])},
        )
        run_log.trials(place.journal(), place.folder, table)
    else:
        say("tune", f"done before: {place.folder / run_files.TRIALS}")
    return read_json(place.folder / run_files.TRIALS)


def _tested(place: Place, best: Recipe, row: dict[str, Any]) -> dict[str, float]:
    """Test accuracy of the best trial, looked at once, after the search."""
    from raykd.orchestration.tuning import test_metrics

    weights = run_files.trial(place.folder, row["id"]) / run_files.WEIGHTS
    return {f"test_{k}": v for k, v in test_metrics(best, weights).items()}


def _toml(best: Recipe) -> str:
    """A recipe as sparse TOML; paths in it are absolute."""
    return tomli_w.dumps(best.model_dump(mode="json", exclude_defaults=True, exclude_none=True))


def _export(place: Place) -> Path:
    target = run_files.artefact(place.folder)
    if place.is_exported:
        say("export", f"done before: {target}")
    else:
        manifest = run_artefact.write(place.recipe, place.dataset, place.folder)
        say("export", f"seed {manifest['seed']}, {manifest['bytes']:,} bytes: {target}")
    return target


def _report(place: Place) -> dict[str, Any]:
    inputs = _inputs(place)
    made = read_json(place.folder / run_files.REPORT)
    if made is None or made["inputs"] != inputs or not (place.folder / run_files.ANSWERS).exists():
        run_artefact.answer(place.dataset, place.folder)
        synced = _sync(place)
        found = gather.gather(place.recipe, place.dataset, place.folder, place.store, synced)
        made = evidence.build(found) | {"inputs": inputs}
        answers.write(found, place.folder)
        page.write_html(made, place.folder / run_files.REPORT_PAGE)
        write_json(place.folder / run_files.REPORT, made)
        run_log.result(place.journal(), made)
        say("report", str(place.folder / run_files.REPORT_PAGE))
    else:
        say("report", f"done before: {place.folder / run_files.REPORT_PAGE}")
    return made


def _inputs(place: Place) -> str:
    """Digest of everything that a report is made of: it is made again only if that changed."""
    names = [f"arms/{arm.key}/arm.json" for arm in arms_of(place.recipe)] + [
        "tune.json",
        "artefact/manifest.json",
    ]
    return digest_of({name: read_json(place.folder / name) for name in names})


def _sync(place: Place) -> dict[str, Any]:
    """Bring MLflow up to the journal; what the run is called there.

    A server that is down is told later.
    """
    experiment = place.recipe.track.experiment
    synced = mlflow_mirror.sync(place.folder, uri=place.uri, experiment=experiment)
    if not synced.done or synced.reason:
        say(
            "track",
            f"{synced.reason}; {synced.pending} lines wait: raykd track sync {place.folder}",
        )
    return {
        "uri": mlflow_mirror.public_uri(place.uri),
        "experiment": experiment,
        "run_id": synced.runs.get(run_log.PARENT),
    }
