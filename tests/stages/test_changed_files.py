"""A run folder whose files were changed after they were written: refused by name, or made again,
and never taken for done.

The reference is the report of the run before anything was changed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from raykd.cli import cli
from raykd.deploy import load_artefact, run_artefact
from raykd.errors import StoreError
from raykd.files import records
from raykd.files.atomic import read_json, write_json
from raykd.files.digests import file_sha256
from raykd.orchestration import tuning
from raykd.recipe.recipe import Recipe
from raykd.reports import answers
from raykd.stages import plan, walk
from raykd.stages.load import load
from raykd.stages.run_folder import RunFolder
from raykd.tracking import journal
from raykd.training import run_digests, run_files

SETTINGS = (
    "control=false",
    "optim.steps=4",
    "data.stride=200",
    "student.settings={width=8, layers=1}",
    'track.uri="http://127.0.0.1:9"',  # where nobody listens, so nothing waits
)
ARM = "arms/student-0"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text('name = "small"\ntechnique = "none"\n')
    return load(path, SETTINGS)


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """(--out, its report) that no test may change."""
    out = tmp_path_factory.mktemp("made")
    return out, walk.run(recipe, out)


@pytest.fixture
def out(made, tmp_path) -> Path:
    """The same of the test's own."""
    return Path(shutil.copytree(made[0], tmp_path / "out"))


@pytest.fixture
def run(out) -> Path:
    return next(out.glob("small-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def to(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def changed(**changes: Any) -> Callable[[Path], object]:
    """Some keys of a JSON file with other values."""
    return lambda path: write_json(path, read_json(path) | changes)


def negate(path: Path) -> None:
    save_file({name: -value for name, value in load_file(path).items()}, path)


REFUSED = {
    "an arm's record is empty": (f"{ARM}/arm.json", to("{}")),
    "an arm's record is a list": (f"{ARM}/arm.json", to("[]")),
    "an arm's record is cut": (f"{ARM}/arm.json", cut),
    "an arm's record is deep": (f"{ARM}/arm.json", to("[" * 100_000)),
    "an arm's accuracy is edited": (f"{ARM}/arm.json", changed(val={"val_accuracy": 1.0})),
    "an arm's record names a file elsewhere": (f"{ARM}/arm.json", changed(files={"../x": {}})),
    "an arm's weights are of one bit less": (f"{ARM}/weights.safetensors", flip),
    "an arm's weights are gone": (f"{ARM}/weights.safetensors", Path.unlink),
    "an arm's predictions are forged": (f"{ARM}/predictions.parquet", flip),
    "an arm's predictions are cut": (f"{ARM}/predictions.parquet", cut),
    "an artefact's weights are negated": ("artefact/student.safetensors", negate),
    "an artefact's script is another": ("artefact/run.py", to("print('class 3')")),
    "an artefact's manifest is a list": ("artefact/manifest.json", to("[]")),
    "an artefact's manifest is cut": ("artefact/manifest.json", cut),
    "an artefact's manifest is of schema 99": ("artefact/manifest.json", changed(schema=99)),
    "an artefact's manifest names a file elsewhere": (
        "artefact/manifest.json",
        changed(files={"../../x": {"bytes": 1, "sha256": "0" * 64}}),
    ),
    "an artefact's answers are forged": ("artefact_answers.parquet", flip),
    "the best weights are of one bit less": ("student.safetensors", flip),
    "the digests are a list": ("digests.json", to("[]")),
    "the digests are cut": ("digests.json", cut),
    "the digests are edited": ("digests.json", changed(files={})),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_changed_file_is_refused_by_name_and_left_as_it_is(case, recipe, run, out):
    name, change = REFUSED[case]
    change(run / name)
    left = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    for verb in (walk.run, plan.plan):
        with pytest.raises(StoreError) as caught:
            verb(recipe, out)
        assert caught.value.exit_code == 3
        assert str(run / name) in str(caught.value)
        assert "delete" in str(caught.value) or "move it away" in str(caught.value)
    for path, data in left.items():
        if path.name not in ("journal.jsonl", "recipe.json"):
            assert path.read_bytes() == data


@pytest.mark.parametrize("case", [case for case in REFUSED if "artefact's" in case])
def test_a_report_is_not_made_of_a_changed_artefact(case, recipe, run, out):
    name, change = REFUSED[case]
    change(run / name)
    (run / "report.json").unlink()
    with pytest.raises(StoreError, match=name.rpartition("/")[2]):
        walk.report(recipe, out)


@pytest.mark.parametrize("change", [to("{}"), to("[]"), cut, Path.unlink, changed(seeds=[7])])
@pytest.mark.parametrize("name", run_files.REPORTED)
def test_a_changed_report_is_made_again(name, change, recipe, run, out, made):
    if name == "report.json" or change in (cut, Path.unlink):
        change(run / name)
    else:
        flip(run / name)
    again = walk.report(recipe, out)
    for key in ("student", "artefact", "seeds", "classes"):
        assert again.get(key) == made[1].get(key)
    assert read_json(run / "report.json") == again
    was = answers.read(next(made[0].glob("small-*")))
    assert (answers.read(run).student[0] == was.student[0]).all()
    assert all(run_digests.holds(run, each) for each in run_files.REPORTED)


def test_the_card_may_be_filled_in(recipe, run, out, made):
    (run / "artefact/README.md").write_text("# My student")
    assert walk.run(recipe, out) == made[1]
    assert (run / "artefact/README.md").read_text() == "# My student"
    assert load_artefact(run / "artefact")


def test_a_missing_file_of_an_artefact_is_exported_again(recipe, run, out):
    (run / "artefact/run.py").unlink()
    walk.run(recipe, out)
    assert (run / "artefact/run.py").exists()


@pytest.fixture(scope="module")
def otherwise(recipe, tmp_path_factory) -> Path:
    """The arm as another machine might have trained it: other weights, and their predictions."""
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"batch": 7})})
    return walk.train(recipe, tmp_path_factory.mktemp("otherwise")) / ARM


@pytest.fixture
def again(otherwise, run) -> Path:
    """The run with its arm trained again, with other weights."""
    shutil.rmtree(run / ARM)
    shutil.copytree(otherwise, run / ARM)
    record = read_json(run / ARM / "arm.json") | {"run": run.name[-8:]}
    write_json(run / ARM / "arm.json", records.with_own_digest(record))
    return run


def test_an_artefact_of_weights_that_were_trained_anew_is_exported_again(recipe, again, out, made):
    told = f"{again}/artefact is of other weights than those of the best student"
    with pytest.raises(StoreError, match=re.escape(told)) as caught:
        walk.report(recipe, out)
    assert "type: raykd export RECIPE" in str(caught.value)
    done = {stage["stage"]: stage["done"] for stage in plan.plan(recipe, out)["stages"]}
    assert done["train"] is True
    assert done["export"] is False
    report = walk.run(recipe, out)
    trained = read_json(again / ARM / "arm.json")["weights_sha256"]
    manifest = read_json(again / "artefact/manifest.json")
    assert manifest["weights_sha256"] == trained == file_sha256(again / "student.safetensors")
    assert report["artefact"]["seed"] == report["confusion_seed"] == manifest["seed"] == 0
    was = made[1]["artefact"]["metrics"]["accuracy"]
    assert report["artefact"]["metrics"]["accuracy"] == report["student"]["metrics"]["accuracy"]
    assert report["artefact"]["metrics"]["accuracy"] != was


def test_a_manifest_that_names_no_weights_is_held_by_the_copy_beside_it(recipe, run):
    path = run / "artefact/manifest.json"
    manifest = read_json(path)
    del manifest["weights_sha256"]
    write_json(path, manifest)
    assert run_artefact.is_of_best(recipe, run)
    negate(run / "student.safetensors")
    assert not run_artefact.is_of_best(recipe, run)


class Killed(BaseException):
    """What ends a process here."""


def killed(after: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does its work, and is killed then."""

    def both(*args: Any, **keywords: Any) -> None:
        after(*args, **keywords)
        raise Killed

    return both


def test_a_stage_killed_once_it_wrote_is_done_again(recipe, again, out, monkeypatch, made):
    (again / "artefact/run.py").unlink()
    for module in (walk.run_artefact, walk.answers):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write", killed(module.write))
            with pytest.raises(Killed):
                walk.run(recipe, out)
        run_digests.check(again)  # as `raykd report RUN RUN` does
    report = walk.run(recipe, out)
    assert report["student"]["metrics"] != made[1]["student"]["metrics"]
    for names in (run_files.EXPORTED, run_files.REPORTED):
        there = [each for each in names if (again / each).exists()]
        assert all(run_digests.holds(again, each) for each in there)


def told_by(run: Path) -> list[tuple[str, Any]]:
    """What a journal tells, without times, and each thing once."""
    lines = [line for line in journal.read(run / journal.NAME) if line["kind"] != "end"]
    keys = ("run", "kind", "values", "path", "name", "digest")
    return sorted({json.dumps([line.get(key) for key in keys]) for line in lines})


def test_what_a_killed_process_did_not_write_is_in_the_journal_after_the_next(recipe, run, out):
    """Wherever it was cut; and a whole one gets no line more."""
    path = run / journal.NAME
    whole = path.read_bytes()
    told = told_by(run)
    walk.run(recipe, out)
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        walk.run(recipe, out)
        assert told_by(run) == told, count
    path.unlink()
    walk.run(recipe, out)
    assert told_by(run) == told


def test_a_search_killed_once_it_wrote_its_recipe_is_done_again(tmp_path, monkeypatch):
    path = tmp_path / "search.toml"
    space = '"optim.learning_rate" = { uniform = [0.001, 0.01] }'
    path.write_text(f'name = "small"\ntechnique = "none"\n[search]\n{space}\n')
    run_folder = RunFolder(load(path, SETTINGS), tmp_path / "out")
    rates = iter((0.002, 0.003, 0.004))

    def trials(*_: Any) -> dict[str, Any]:
        row = {"number": 0, "id": "a", "state": "finished", "val_accuracy": 0.5, "steps": 4}
        row |= {"params": {"optim.learning_rate": next(rates)}}
        return {"metric": "val_accuracy", "trials": [row], "best": row}

    monkeypatch.setattr(tuning, "run_trials", trials)
    monkeypatch.setattr(walk, "_tested", lambda *_: {})
    walk._tune(run_folder)
    (run_folder.path / run_files.TRIALS).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(walk, "write_bytes", killed(walk.write_bytes))
        with pytest.raises(Killed):
            walk._tune(run_folder)
    assert not run_folder.is_searched
    table = walk._tune(run_folder)
    assert table["best"]["params"] == {"optim.learning_rate": 0.004}
    assert "0.004" in (run_folder.path / run_files.BEST_RECIPE).read_text()


def as_before(run: Path) -> None:
    """What a run folder was before it had digests."""
    (run / "digests.json").unlink()
    record = read_json(run / ARM / "arm.json")
    old = {name: value for name, value in record.items() if name not in ("files", "sha256", "run")}
    write_json(run / ARM / "arm.json", old)


def test_a_run_of_before_there_were_digests_is_taken_up(recipe, run, out, made):
    as_before(run)
    trained = (run / ARM / "weights.safetensors").stat().st_mtime_ns
    assert walk.run(recipe, out)["student"] == made[1]["student"]
    assert (run / ARM / "weights.safetensors").stat().st_mtime_ns == trained
    assert all(run_digests.holds(run, name) for name in run_files.REPORTED)


@pytest.mark.parametrize("name", ["run.py", "numpy.py", "torch/__init__.py"])
def test_what_a_forger_laid_into_an_artefact_is_not_run_by_a_report(name, recipe, run, out):
    """Its manifest names it, and nothing is left that could tell the files of the export."""
    as_before(run)
    artefact = run / "artefact"
    canary = out / "canary"
    (artefact / name).parent.mkdir(exist_ok=True)
    (artefact / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    manifest = read_json(artefact / "manifest.json")
    if "/" not in name:
        manifest["files"] |= records.entries_of(artefact, [name])
    write_json(artefact / "manifest.json", manifest)
    (run / "report.json").unlink()
    if name == "numpy.py":  # named by the manifest, so it may be there: nothing imports it
        walk.report(recipe, out)
    else:
        with pytest.raises(StoreError, match=f"artefact/{name.partition('/')[0]}"):
            walk.report(recipe, out)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "change"), [("weights.safetensors", flip), ("predictions.parquet", cut)]
)
def test_an_arm_of_before_there_were_digests_is_not_taken_as_it_comes(
    recipe, run, out, name, change
):
    as_before(run)
    change(run / ARM / name)
    with pytest.raises(StoreError, match=name):
        walk.run(recipe, out)


def test_an_arm_of_another_run_is_refused(recipe, run, out, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('name = "small"\ntechnique = "none"\n')
    other = walk.train(load(path, (*SETTINGS, "optim.batch=7")), tmp_path / "other")
    shutil.rmtree(run / ARM)
    shutil.copytree(other / ARM, run / ARM)
    with pytest.raises(StoreError, match=rf"arm\.json: of the run \w+, not of {run.name[-8:]}"):
        walk.run(recipe, out)


def test_an_arm_of_another_seed_is_refused(recipe, run, out):
    record = read_json(run / ARM / "arm.json") | {"seed": 5}
    write_json(run / ARM / "arm.json", records.with_own_digest(record))
    with pytest.raises(StoreError, match="the record of student-5, not of student-0"):
        walk.run(recipe, out)


@pytest.mark.parametrize("table", ["{}", "[]", '{"metric": "a", "trials": [1], "best": {}}', "["])
def test_a_table_of_trials_that_is_none_is_refused(table, tmp_path):
    (tmp_path / "tune.json").write_text(table)
    with pytest.raises(StoreError, match=r"tune\.json"):
        run_files.read_trials(tmp_path)


def typed(*argv: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(arg) for arg in argv])
    return getattr(done.exception, "exit_code", done.exit_code), str(done.exception)


@pytest.mark.parametrize(
    "place", ["artefact/notes.txt", "artefact/run.py", "arms/x", "report.json"]
)
def test_a_link_that_leads_out_of_a_run_is_refused_before_it_is_read(
    place, recipe, run, out, tmp_path
):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(secret)
    for verb in (walk.run, walk.report, plan.plan):
        with pytest.raises(StoreError, match=f"{place} is or lies below a link to {secret}"):
            verb(recipe, out)
    code, told = typed("track", "sync", run, "--uri", f"sqlite:///{tmp_path / 'm.db'}")
    assert code == 3
    assert f"a link to {secret}" in told
    assert not (tmp_path / "mlruns").exists()
    if place.startswith("artefact"):
        with pytest.raises(StoreError, match="a link to"):
            load_artefact(run / "artefact")


def test_a_pipe_in_a_run_is_refused_before_it_is_read(recipe, run, out):
    os.mkfifo(run / "artefact" / "pipe")
    with pytest.raises(StoreError, match="pipe is neither a file nor a folder"):
        walk.run(recipe, out)


def test_changed_files_are_not_uploaded(run, tmp_path):
    report = json.loads((run / "report.json").read_text()) | {"seeds": [7]}
    write_json(run / "report.json", report)
    code, told = typed("track", "sync", run, "--uri", f"sqlite:///{tmp_path / 'm.db'}")
    assert code == 3
    assert str(run / "report.json") in told


def test_a_file_is_hashed_once_until_it_is_written(tmp_path, monkeypatch):
    hashed = []
    right = records.file_sha256
    monkeypatch.setattr(records, "file_sha256", lambda path: hashed.append(path) or right(path))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = records.sha256_once(path)
    assert records.sha256_once(path) == first
    assert len(hashed) == 1
    path.write_bytes(b"other")
    assert records.sha256_once(path) != first
    assert len(hashed) == 2
