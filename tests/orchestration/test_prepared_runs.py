"""A run over texts that have to be prepared: by Ray Data, then scored and learned in parts."""

import json

import pyarrow.parquet as pq
import pytest
import texts

from raykd.data import sources
from raykd.data.prepared import units
from raykd.data.prepared.parts import PreparedParts
from raykd.orchestration import preparing
from raykd.stages import plan, walk
from raykd.stages.load import load
from raykd.stages.run_folder import RunFolder
from raykd.training import run_files

pytestmark = pytest.mark.ray
SETS = ("optim.order='blocks'", "optim.lanes=4", "optim.window=2", "optim.steps=8", "control=false")


def test_texts_are_prepared_by_ray_and_then_scored_and_learned(cluster, tmp_path, monkeypatch):
    tokens = texts.tokenizer(tmp_path)
    path = texts.recipe(tmp_path, tokens)
    rows = pq.read_table(tmp_path / "rows" / "a.parquet").to_pylist()
    (tmp_path / "rows" / "a.parquet").unlink()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows" / "a.jsonl").write_text(lines)
    recipe = load(path, SETS)
    out = tmp_path / "out"
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    monkeypatch.setattr(preparing, "SMALL_BYTES", 0)
    foretold = plan.plan(recipe, out)
    assert [stage["stage"] for stage in foretold["stages"]][:3] == ["prepare", "score", "train"]
    assert not foretold["stages"][0]["done"]
    assert "about 64 rows" in foretold["data"]
    assert foretold["parameters"].keys() == {"student", "teacher"}
    assert "named once the rows are prepared" in plan.table(foretold)
    assert not out.exists()
    folder = walk.train(recipe, out)
    record = json.loads(run_files.arm_record(folder, "student-0").read_text())
    assert record["steps"] == 8
    source = RunFolder(recipe, out).source
    assert isinstance(source, PreparedParts)
    assert len(source.work.units) > 2
    found = plan.plan(recipe, out)
    assert found["stages"][0]["done"]
    assert found["run"] == str(folder)
    assert found["disk_bytes"]["rows"] == source.bytes
    tokens_of = sum(piece["steps"] for piece in source.work.folder.manifest()["parts"])
    assert foretold["disk_bytes"]["rows"] == pytest.approx(2 * tokens_of + 16 * 64, rel=0.25)
    here = sources.open_source(recipe.data, "blocks", tmp_path / "here")
    assert isinstance(here, PreparedParts)
    monkeypatch.setattr(preparing, "SMALL_BYTES", 1 << 30)
    preparing.prepare_rows(here.work)
    assert here.table() == source.table()
