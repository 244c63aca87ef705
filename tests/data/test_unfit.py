"""Rows that teach nothing: a few are left out and named, many are refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
from texts import END, STEPS, sentence

from raykd import data
from raykd.data import SPLITS
from raykd.errors import DataError
from raykd.recipe.tables import DataRef
from raykd.stages import walk
from raykd.stages.load import resolve
from raykd.stages.plan import plan, table

COUNT = 120  # rows, of which one is less than 1 %


def series() -> list[dict]:
    return [
        {"inputs": [[float(i), 1.0], [0.0, 2.0]], "label": "ab"[i // 3 % 2], "split": SPLITS[i % 3]}
        for i in range(COUNT)
    ]


def write(folder: Path, rows: list[dict]) -> Path:
    """Two files, the second one from row 50 on."""
    folder.mkdir(exist_ok=True)
    for name, some in (("a", rows[:50]), ("b", rows[50:])):
        pq.write_table(pa.Table.from_pylist(some), folder / f"{name}.parquet", row_group_size=30)
    return folder


@pytest.mark.parametrize("inputs", [None, []])
def test_a_row_without_a_step_is_left_out_and_named(tmp_path, inputs):
    rows = series()
    rows[61]["inputs"] = inputs
    ref = DataRef(source=str(write(tmp_path / "rows", rows)))
    dataset = data.load(ref)
    [unfit] = dataset.unfit
    assert (unfit.row, unfit.place) == (61, "b.parquet, row 11")
    assert dataset.cautions == [f"1 of 120 rows left out as unfit, such as row 61: {unfit.why}"]
    kept = sorted(i for rows in dataset.splits.values() for i in rows.row_id.tolist())
    assert kept == [i for i in range(COUNT) if i != 61]
    assert dataset.splits["val"].inputs[:, 0, 0].tolist() == [
        float(i) for i in range(1, COUNT, 3) if i != 61
    ]
    with pytest.raises(DataError, match=r"row 61 has .*: 1 of 120 rows .* data\.max_unfit = 0\.0"):
        data.load(ref.model_copy(update={"max_unfit": 0.0}))
    rows[0]["inputs"] = inputs
    write(tmp_path / "rows", rows)
    with pytest.raises(DataError, match=r"row 0 has .*; row 61 has .*: 2 of 120 rows"):
        data.load(ref)


def test_a_prompt_or_completion_that_cannot_be_used_is_left_out_and_named(tmp_path):
    rows = [
        {"split": SPLITS[i % 3], "prompt": sentence(i, 3), "completion": sentence(i, 4)}
        for i in range(COUNT)
    ]
    columns = {"prompt": "prompt", "completion": "completion"}
    ref = DataRef.model_validate(
        {
            "source": str(tmp_path / "rows"),
            "tokenizer": str(texts.tokenizer(tmp_path)),
            "end": END,
            "window": STEPS,
            "columns": columns,
        }
    )
    write(tmp_path / "rows", rows)
    whole = data.load(ref)
    for key, value, why in (
        ("completion", "", "has an empty completion"),
        ("prompt", "", "has an empty prompt"),
        ("prompt", sentence(0, 80), "raise data.window"),
    ):
        some = [dict(row) for row in rows]
        some[51][key] = value
        write(tmp_path / "rows", some)
        dataset = data.load(ref)
        [unfit] = dataset.unfit
        assert (unfit.row, unfit.place) == (51, "b.parquet, row 1")
        assert why in unfit.why
        assert dataset.splits["val"].mask.sum() == whole.splits["val"].mask.sum()
        assert dataset.splits["train"].mask.sum() < whole.splits["train"].mask.sum()


def test_a_run_names_the_rows_that_it_left_out(tmp_path):
    rows = series()
    rows[61]["inputs"] = None
    recipe = resolve(
        {
            "technique": "none",
            "control": False,
            "data": {"source": str(write(tmp_path / "rows", rows))},
            "student": {"settings": {"width": 8, "layers": 1}},
            "optim": {"steps": 2, "batch": 8},
        }
    )
    found = plan(recipe, tmp_path / "runs")
    assert [one["place"] for one in found["unfit"]] == ["b.parquet, row 11"]
    assert "row 61 has shape (), without any step (b.parquet, row 11)" in table(found)
    run = walk.train(recipe, tmp_path / "runs")
    told = [json.loads(line) for line in (run / "unfit.jsonl").read_text().splitlines()]
    assert [(one["row"], one["place"]) for one in told] == [(61, "b.parquet, row 11")]
