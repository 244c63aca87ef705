"""A run whose rows are read in parts: what the teacher says of them is what it says of rows in
memory, and a killed process costs time alone.
"""

import json
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import Done, in_workers, raykd, trained

from raykd.data import tables
from raykd.recipe.recipe import Recipe
from raykd.stages.load import resolve
from raykd.stages.run_folder import RunFolder
from raykd.store.reader import Store

pytestmark = pytest.mark.ray
COUNTS = {"train": 200, "val": 60, "test": 60}
CLASSES = 7
RECIPE = """
name = "parts"
[data]
source = "./rows"
[teacher]
weights = "teacher.safetensors"
settings = {settings}
[student.settings]
width = 8
layers = 1
[terms.kd]
temperature = 2.0
[store]
codec = "dense"
rows_per_shard = 16
batch = 16
[optim]
steps = 40
batch = 32
evaluate_every = 10
order = "{order}"
lanes = 4
window = 2
[scale]
checkpoint_every = 10
"""


def write(folder: Path) -> None:
    """Rows of 1 to 16 steps in row groups of 40 rows, and a teacher with random weights."""
    rng = np.random.default_rng(0)
    (folder / "rows").mkdir()
    for split, count in COUNTS.items():
        length = rng.integers(1, 17, count)
        rows = [
            {"inputs": rng.normal(size=(steps, 6)).tolist(), "label": i % CLASSES}
            for i, steps in enumerate(length)
        ]
        path = folder / "rows" / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    by_hand.teacher(folder / "teacher.safetensors")
    settings = json.dumps(by_hand.SETTINGS).replace(":", " =")
    settings = settings.replace('"', "")
    for order in ("rows", "blocks"):
        text = RECIPE.format(settings=settings, order=order)
        (folder / f"{order}.toml").write_text(text)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(here, session) -> Path:
    """The --out of a run in parts."""
    sound(raykd(here, "run", "blocks.toml", "--out", here / "out", cwd=here, **session))
    return here / "out"


def sound(done: Done) -> None:
    assert done.code == 0, done.err
    assert "Traceback" not in done.err


def manifest(out: Path) -> dict[str, Any]:
    [path] = out.glob("stores/*/_MANIFEST.json")
    return json.loads(path.read_bytes())


def recipe_of(here: Path, order: str) -> Recipe:
    import tomllib

    raw = tomllib.loads((here / f"{order}.toml").read_text())
    raw["data"]["source"] = str(here / "rows")
    raw["teacher"]["weights"] = str(here / "teacher.safetensors")
    return resolve(raw)


def test_a_teacher_says_of_parts_what_it_says_of_rows_in_memory(here, undisturbed, tmp_path):
    held = Store(by_hand.score(recipe_of(here, "rows"), tmp_path))
    [folder] = undisturbed.glob("stores/*")
    parts = Store(folder)
    assert all(record["last"] - record["first"] <= 16 for record in parts.manifest["shards"])
    assert len(parts.manifest["shards"]) == 5 * 3 + 2 * (3 + 2)  # of 16, 16 and 8 rows, and of 20
    for split, count in COUNTS.items():
        assert len(parts.row_id(split)) == count
        for name in ("answer", "valence", "saliency"):
            mine, theirs = (store.column(name, split) for store in (parts, held))
            assert np.array_equal(mine.steps, theirs.steps)
            np.testing.assert_allclose(mine.values, theirs.values, atol=2e-3, err_msg=name)
    mine, theirs = (store.manifest["statistics"] for store in (parts, held))
    assert mine["rows"] == theirs["rows"] == COUNTS
    assert mine["classes"] == theirs["classes"]
    assert mine["class_prior"] == theirs["class_prior"]
    assert mine["saliency"]["mean"] == pytest.approx(theirs["saliency"]["mean"], abs=1e-3)


def test_killed_processes_cost_time_alone(here, undisturbed, session, tmp_path):
    out = tmp_path / "out"
    asked = ("run", "blocks.toml", "--out", out)
    fault = "score:shard=2,at=before_commit"
    plans = {"RAYKD_FAULT": fault, "RAYKD_FAULT_FIRED": str(tmp_path / "scorer")}
    at_step = {
        "RAYKD_FAULT": "train:step=25,rank=0,arm=student-0",
        "RAYKD_FAULT_FIRED": str(tmp_path / "trainer"),
    }
    killed = raykd(tmp_path, *asked, cwd=here, **session, **in_workers(plans), **at_step)
    assert killed.code == -9, killed.err
    assert (tmp_path / "scorer").exists()
    assert (tmp_path / "trainer").exists()
    sound(raykd(tmp_path, *asked, cwd=here, **session))
    assert manifest(out) == manifest(undisturbed)
    assert trained(out) == trained(undisturbed)


def test_the_order_that_auto_comes_to_names_the_run(here, tmp_path, monkeypatch):
    def named(order: str) -> str:
        recipe = recipe_of(here, "blocks")
        optim = recipe.optim.model_copy(update={"order": order})
        return RunFolder(recipe.model_copy(update={"optim": optim}), tmp_path).path.name

    in_memory = named("auto")
    monkeypatch.setattr(tables, "MOST_ROWS", 100)
    assert named("auto") == named("blocks") != in_memory
    assert named("rows") != in_memory  # the recipe says it
