"""The walk: score -> train -> [tune] -> export -> report. Each verb does what it needs and lacks.

Rows that are no parts yet, and are too many for the memory, are prepared before.

A run is the folder `<out>/<name>-<digest8>/`: the same inputs name the same folder, so a finished
stage is found and not done again, and a changed input is a new folder. Teacher stores lie beside
it, in `<out>/stores/`, or where `scale.store` says.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from raykd import models
from raykd.console import say
from raykd.data.prepared.parts import PreparedParts
from raykd.deploy import run_artefact
from raykd.errors import InfraError, RecipeError, StoreError
from raykd.files import waiting
from raykd.files.address import Address
from raykd.files.atomic import read_json, write_bytes, write_json
from raykd.files.digests import digest_of
from raykd.orchestration import cluster, preparing, scoring
from raykd.orchestration.session import prepare
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import apply_trial
from raykd.reports import answers, evidence, gather, page, teacher_check
from raykd.stages.check import check_with_data
from raykd.stages.run_folder import OUT, RunFolder
from raykd.store.reader import Store
from raykd.teacher.scorer import Header, Scorer
from raykd.techniques import register
from raykd.tracking import mlflow_mirror, run_log
from raykd.training import post_training, run_digests, run_files
from raykd.training.arms import arms_of

Stage = Callable[[RunFolder], Any]


def score(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> Address | None:
    """The address of the recipe's complete teacher store: a folder or an s3:// URL.

    None if the recipe reads no teacher.

    Example:
        >>> import raykd
        >>> small = ("control=false", "optim.steps=4", "student.settings={width=8, layers=1}")
        >>> _ = Path("recipe.toml").write_text('technique = "none"')
        >>> recipe = raykd.load("recipe.toml", small)
        >>> print(raykd.score(recipe, Path("runs")))
        None
    """
    return _walk(RunFolder(recipe, Path(out), address), _score)


def train(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> Path:
    """The run folder, with every arm trained in `arms/`.

    Example:
        >>> import raykd
        >>> small = ("control=false", "optim.steps=4", "student.settings={width=8, layers=1}")
        >>> _ = Path("recipe.toml").write_text('technique = "none"')
        >>> recipe = raykd.load("recipe.toml", small)
        >>> folder = raykd.train(recipe, Path("runs"))
        >>> (folder / "arms" / "student-0" / "arm.json").exists()
        True
    """
    return _walk(RunFolder(recipe, Path(out), address), _score, _train)


def tune(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> dict[str, Any]:
    """The table of trials and the best of them.

    The best trial's whole recipe is `best.toml` in the run folder.

    Example:
        >>> import raykd
        >>> rate = '"optim.learning_rate" = { loguniform = [0.001, 0.01] }'
        >>> lines = ['technique = "none"', "[search]", "trials = 2", "grace = 2", rate]
        >>> small = ("control=false", "optim.steps=4", "student.settings={width=8, layers=1}")
        >>> _ = Path("search.toml").write_text("\\n".join(lines))
        >>> recipe = raykd.load("search.toml", small)
        >>> table = raykd.tune(recipe, Path("runs"))
        >>> len(table["trials"]), list(table["best"]["params"])
        (2, ['optim.learning_rate'])
    """
    if recipe.search is None:
        raise RecipeError(
            'search: missing; add [search] with a line such as "optim.learning_rate" = {...}'
        )
    return _walk(RunFolder(recipe, Path(out), address), _score, _tune)


def export(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> Path:
    """The deployable folder `artefact/` of the best seed, by validation accuracy.

    GateError if it does not answer as the student does.

    Example:
        >>> import raykd
        >>> small = ("control=false", "optim.steps=4", "student.settings={width=8, layers=1}")
        >>> _ = Path("recipe.toml").write_text('technique = "none"')
        >>> recipe = raykd.load("recipe.toml", small)
        >>> folder = raykd.export(recipe, Path("runs"))
        >>> (folder / "manifest.json").exists()
        True
    """
    return _walk(RunFolder(recipe, Path(out), address), _score, _train, _export)


def report(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> dict[str, Any]:
    """report.json as a dict, of all that is done. Stages that it needs are run first.

    Example:
        >>> import raykd
        >>> small = ("control=false", "optim.steps=4", "student.settings={width=8, layers=1}")
        >>> _ = Path("recipe.toml").write_text('technique = "none"')
        >>> recipe = raykd.load("recipe.toml", small)
        >>> report = raykd.report(recipe, Path("runs"))
        >>> report["technique"], report["seeds"]
        ('none', [0])
    """
    return _walk(RunFolder(recipe, Path(out), address), _score, _train, _report)


def run(recipe: Recipe, out: Path = OUT, *, address: str | None = None) -> dict[str, Any]:
    """Every stage, then report.json as a dict.

    Example:
        >>> import raykd
        >>> small = ("control=false", "optim.steps=4", "student.settings={width=8, layers=1}")
        >>> _ = Path("recipe.toml").write_text('technique = "none"')
        >>> recipe = raykd.load("recipe.toml", small)
        >>> report = raykd.run(recipe, Path("runs"))
        >>> sorted(report["artefact"]["metrics"])
        ['accuracy', 'balanced_accuracy', 'macro_f1']
    """
    searching = [_tune] if recipe.search else []
    return _walk(
        RunFolder(recipe, Path(out), address), _score, _train, *searching, _export, _report
    )


def _walk(run_folder: RunFolder, *stages: Stage) -> Any:
    """The result of the last stage; all are done in order, while no other process works here."""
    register(run_folder.recipe.technique)
    _prepare_rows(run_folder)
    run_folder.check_links()
    check_with_data(
        run_folder.recipe,
        run_folder.source,
        run_folder.path,
        with_export=_export in stages,
    )
    run_folder.path.mkdir(parents=True, exist_ok=True)
    write_json(run_folder.path / run_files.RECIPE, run_folder.recipe.model_dump(mode="json"))
    _name_unfit(run_folder)
    try:
        with waiting.locked(run_files.checkpoints(run_folder.path)):
            _begin(run_folder, stages)
            for stage in stages:
                result = stage(run_folder)
    except BlockingIOError:
        raise InfraError(
            f"{run_folder.path} is being worked on by another process; wait for it, or end it"
        ) from None
    except BaseException as error:
        run_log.ended(run_folder.path, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run_log.ended(run_folder.path, "FINISHED")
    _sync(run_folder)
    return result


def _prepare_rows(run_folder: RunFolder) -> None:
    """Make parts of rows that are none yet.

    Nothing else is known of the run before, but whether models of text can be built.
    """
    source = run_folder.source
    if not isinstance(source, PreparedParts) or source.is_ready:
        return
    recipe = run_folder.recipe
    if shape := source.work.shape_of_text:
        models.build_model(recipe.student.of_seed(recipe.seeds[0]), **shape, key="student")
        if recipe.teacher:
            models.build_model(recipe.teacher, **shape, key="teacher")
    prepare(run_folder.address)
    if not preparing.is_small(source.work):
        cluster.begin(recipe, run_folder.address, source.work.folder.address)
    preparing.prepare_rows(source.work)


def _name_unfit(run_folder: RunFolder) -> None:
    """Write the rows that were left out of the data, one a line, and tell how many there are."""
    unfit = run_folder.table.unfit
    if unfit:
        path = run_folder.path / run_files.UNFIT
        write_bytes(path, b"".join(json.dumps(one._asdict()).encode() + b"\n" for one in unfit))
        say("data", f"{len(unfit)} rows are left out as unfit: {path}")


def _begin(run_folder: RunFolder, stages: tuple[Stage, ...]) -> None:
    """Make ready for Ray, and start it where training will need it anyway.

    So what the cluster cannot give is said before the teacher's work, not after it.
    """
    prepare(run_folder.address)
    trains = _train in stages and bool(run_folder.untrained)
    tunes = _tune in stages and not run_folder.is_searched
    if trains or tunes:
        cluster.check_here(run_folder.recipe, run_folder.address)
    if tunes or (trains and not cluster.is_here(run_folder.recipe, run_folder.address)):
        _connect(run_folder)
    if tunes or (trains and cluster.trains_elsewhere(run_folder.recipe)):
        _connect(run_folder, run_folder.path)


def _connect(run_folder: RunFolder, run: Path | None = None) -> None:
    """A cluster whose nodes see the stores, and the run folder where workers train in it."""
    stores = scoring.stores_address(run_folder.recipe, run_folder.out.resolve())
    cluster.begin(run_folder.recipe, run_folder.address, stores, run)


def _score(run_folder: RunFolder) -> Address | None:
    if run_folder.store is None:
        return None
    if run_folder.is_scored:
        say("score", f"done before: {run_folder.store}")
    else:
        cluster.check_here(run_folder.recipe, run_folder.address)
        Scorer.check(run_folder.recipe, Header.of(run_folder.recipe, run_folder.table))
        _connect(run_folder)
        scoring.score(run_folder.recipe, run_folder.source, run_folder.out.resolve())
    warning = teacher_check.warning(Store(run_folder.store), run_folder.source)
    if warning:
        say("score", f"! {warning}")
    return run_folder.store


def _train(run_folder: RunFolder) -> Path:
    from raykd.orchestration.training import train_all_arms

    if run_folder.untrained:
        train_all_arms(run_folder.recipe, run_folder.store, run_folder.path, run_folder.source)
    else:
        say("train", f"done before: {run_files.arms(run_folder.path)}")
    run_log.arms(run_folder.journal, run_folder.recipe, run_folder.path)
    post_training.write_missing(run_folder.recipe, run_folder.source, run_folder.path)
    return run_folder.path


def _tune(run_folder: RunFolder) -> dict[str, Any]:
    from raykd.orchestration.tuning import run_trials

    if run_folder.is_searched:
        say("tune", f"done before: {run_folder.path / run_files.TRIALS}")
    else:
        table = run_trials(run_folder.recipe, run_folder.store, run_folder.path, run_folder.source)
        raw = run_folder.recipe.model_dump(mode="json")
        best = Recipe.model_validate(apply_trial(raw, table["best"]["params"]))
        best_row = table["best"] | _tested(run_folder, best, table["best"])
        with run_digests.renewed(run_folder.path, run_files.SEARCHED):
            write_bytes(run_folder.path / run_files.BEST_RECIPE, _toml(best).encode())
            write_json(run_folder.path / run_files.TRIALS, table | {"best": best_row})
    done = run_files.read_trials(run_folder.path)
    assert done is not None
    run_log.trials(run_folder.journal, run_folder.path, done)
    return done


def _tested(run_folder: RunFolder, best: Recipe, row: dict[str, Any]) -> dict[str, float]:
    """Test accuracy of the best trial, looked at once, after the search."""
    from raykd.orchestration.tuning import test_metrics

    weights = run_files.trial(run_folder.path, row["id"]) / run_files.WEIGHTS
    return {f"test_{k}": v for k, v in test_metrics(best, weights, run_folder.source).items()}


def _toml(best: Recipe) -> str:
    """A recipe as sparse TOML; paths in it are absolute."""
    return tomli_w.dumps(best.model_dump(mode="json", exclude_defaults=True, exclude_none=True))


def _export(run_folder: RunFolder) -> Path:
    target = run_files.artefact(run_folder.path)
    if run_folder.is_exported:
        say("export", f"done before: {target}")
    else:
        with run_digests.renewed(run_folder.path, run_files.EXPORTED):
            manifest = run_artefact.write(run_folder.recipe, run_folder.source, run_folder.path)
        say("export", f"seed {manifest['seed']}, {manifest['bytes']:,} bytes: {target}")
        for line in run_artefact.notes(manifest):
            say("export", line)
    return target


def _report(run_folder: RunFolder) -> dict[str, Any]:
    inputs = _inputs(run_folder)
    folder = run_folder.path
    report_page = folder / run_files.REPORT_PAGE
    if all(run_digests.holds(folder, name) for name in run_files.REPORTED):
        existing = read_json(folder / run_files.REPORT)
        if existing["inputs"] == inputs:
            say("report", f"done before: {report_page}")
            if not run_log.has_result(folder, existing):  # the process was killed before it
                run_log.result(run_folder.journal(), existing)
            return existing
    _check_artefact(run_folder)
    synced = _sync(run_folder)
    measured = gather.gather(
        run_folder.recipe,
        run_folder.source,
        folder=folder,
        where=run_folder.store,
        mlflow=synced,
    )
    report = evidence.build(measured) | {"inputs": inputs}
    with run_digests.renewed(folder, run_files.REPORTED):
        answers.write(measured, folder)
        page.write_html(report, report_page)
        write_json(folder / run_files.REPORT, report)
    run_log.result(run_folder.journal(), report)
    say("report", str(report_page))
    return report


def _check_artefact(run_folder: RunFolder) -> None:
    """StoreError if an artefact was changed after its export, or is of weights that were trained
    anew since. Its answers are made if they lack.

    So are those of a run folder without digests, which nobody can hold against anything.
    """
    folder = run_folder.path
    exported = run_files.artefact(folder)
    if not exported.exists():
        return
    run_artefact.check_files(exported)
    if not run_artefact.is_of_best(run_folder.recipe, folder):
        raise StoreError(
            f"{exported} is of other weights than those of the best student, which was trained "
            f"since; type: raykd export RECIPE, or delete {exported}"
        )
    if not all(run_digests.is_recorded(folder, name) for name in run_files.EXPORTED[:2]):
        with run_digests.renewed(folder, run_files.EXPORTED):
            (folder / run_files.ARTEFACT_ANSWERS).unlink(missing_ok=True)
            run_artefact.answer(run_folder.source, folder)


def _inputs(run_folder: RunFolder) -> str:
    """Digest of everything that a report is made of: it is made again only if that changed."""
    here = Path()
    files = [run_files.arm_record(here, arm.key) for arm in arms_of(run_folder.recipe)]
    files.append(here / run_files.TRIALS)
    files.append(run_files.artefact(here) / run_files.MANIFEST)
    return digest_of({file.as_posix(): read_json(run_folder.path / file) for file in files})


def _sync(run_folder: RunFolder) -> dict[str, Any]:
    """Bring MLflow up to the journal, and give what the run is called there.

    A server that is down is brought up to it by a later command.
    """
    experiment = run_folder.recipe.track.experiment
    synced = mlflow_mirror.sync(run_folder.path, uri=run_folder.uri, experiment=experiment)
    if not synced.done or synced.reason:
        say(
            "track",
            f"{synced.reason}; {synced.pending} lines wait: raykd track sync {run_folder.path}",
        )
    return {
        "uri": mlflow_mirror.public_uri(run_folder.uri),
        "experiment": experiment,
        "run_id": synced.runs.get(run_log.PARENT),
    }
