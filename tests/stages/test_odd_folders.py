"""Runs in folders whose names are no plain letters, and under a locale that knows only ASCII."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd.errors import RecipeError
from raykd.stages.load import load
from raykd.stages.run_folder import RunFolder
from raykd.tracking import mlflow_mirror
from raykd.tracking.journal import Journal

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
RECIPE = """
name = "small"
technique = "none"
control = false
[data]
source = "./rows"
[student.settings]
width = 8
layers = 1
[optim]
steps = 4
[track]
uri = "http://127.0.0.1:9"
"""


@pytest.mark.parametrize("name", ["a%20b", "a?x=1", "a%3Fb", "a#b", "a b", "ä"])
def test_mlflows_one_file_is_inside_out(name, tmp_path):
    out = tmp_path / name
    lines = Journal(out / "run" / "journal.jsonl")
    lines.run("run", "run")
    lines.metrics("run", [("accuracy", 0.5, 1)])
    uri = mlflow_mirror.default_uri(out)
    for _ in range(2):
        synced = mlflow_mirror.sync(out / "run", uri=uri, experiment="first")
        assert synced.done, synced.reason
    assert list(tmp_path.rglob("*.db")) == [out / "mlflow.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("out", "sets", "key"),
    [
        ("rows", (), "--out"),
        ("rows/runs", (), "--out"),
        ("link/runs", (), "--out"),
        ("out", ("scale.store=rows/stores",), "scale.store"),
        ("out", ("data.source=s3://bkt/rows", "scale.store=s3://bkt/rows/stores"), "scale.store"),
        ("rows-of-another", (), None),
        ("rows/.runs", (), None),  # hidden names are no rows
        (".", (), None),
        ("out", ("data.source=s3://bkt/rows", "scale.store=s3://bkt/rows2"), None),
        ("rows", ("data.source=s3://bkt/rows",), None),
    ],
)
def test_results_among_the_rows_are_refused_by_key(out, sets, key, folder, monkeypatch):
    """The next command would read the teacher's answers as rows, or refuse them as such."""
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to("rows")
    recipe = load("recipe.toml", sets)
    if key is None:
        assert RunFolder(recipe, Path(out)).out == Path(out)
        return
    with pytest.raises(RecipeError, match=rf"^{key}: .* lies below data\.source") as caught:
        RunFolder(recipe, Path(out))
    assert caught.value.exit_code == 2


def in_ascii(folder: Path, verb: str, out: str) -> subprocess.CompletedProcess[bytes]:
    """A verb over the recipe of a folder, in a process whose locale is C's."""
    environment = os.environ | ASCII | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "raykd.cli", verb, "recipe.toml", "--out", out]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=240)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A recipe over rows of two classes, one of them with an umlaut in its name."""
    draw = np.random.default_rng(0)
    rows = [
        {
            "inputs": draw.normal(size=(8, 3)).tolist(),
            "label": ("häufig", "selten")[i % 2],
            "split": ("train", "train", "val", "test")[i // 2 % 4],
        }
        for i in range(64)
    ]
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / "part-0.parquet")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def test_an_out_that_the_locale_cannot_write_is_refused_before_any_work(folder):
    for verb in ("run", "check"):
        done = in_ascii(folder, verb, "ä")
        assert done.returncode == 2, done.stderr
        assert b"cannot be written under this locale" in done.stderr
        assert b"set PYTHONUTF8=1 or LC_ALL=C.UTF-8" in done.stderr
        assert sorted(path.name for path in folder.iterdir()) == ["recipe.toml", "rows"]


def test_classes_with_other_letters_are_told_under_any_locale(folder):
    done = in_ascii(folder, "run", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    card = next((folder / "out").glob("small-*")) / "artefact" / "README.md"
    assert "häufig" in card.read_text(encoding="utf-8")
