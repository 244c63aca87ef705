"""A report's ground that was cut or edited by hand is named, never read as something else."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd.errors import StoreError
from raykd.generation.acceptance import read_acceptance
from raykd.reports.gather import answers_of
from raykd.tracking import journal, sync_plan
from raykd.tracking.journal import Journal
from raykd.training import predictions
from raykd.training.predictions import Predictions


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "arms" / "student-0" / "predictions.parquet"
    rows = np.arange(6)
    logits = np.eye(6, 3, dtype=np.float32)
    log_q = np.zeros(6, np.float32)
    Predictions(rows, rows % 3, rows % 3, log_q, logits=logits).write(path)
    (path.parent / "arm.json").write_text("{}")
    return path


TEST = predictions.TestPlaces(
    np.arange(6), np.arange(6) % 3, np.arange(6), np.arange(6), np.arange(6), np.ones(6, np.int32)
)


def replaced(name, values):
    """An edit of one column, or its removal."""

    def edit(path):
        table = pq.read_table(path)
        at = table.column_names.index(name)
        table = table.remove_column(at)
        pq.write_table(table if values is None else table.append_column(name, [values]), path)

    return edit


EDITS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("answer\n1\n"),
    "no answer": replaced("answer", None),
    "words": replaced("answer", pa.array(list("abcdef"))),
    "nulls": replaced("answer", pa.array([0, 1, 2, None, 1, 2])),
    "fractions": replaced("log_q", pa.array(np.zeros(6))),
    "flat logits": replaced("logits", pa.array(np.zeros(6, np.float32))),
    "another column": lambda path: pq.write_table(
        pq.read_table(path).append_column("x", [pa.array(range(6))]), path
    ),
    "other rows": replaced("place", pa.array(np.arange(1, 7))),
    "other labels": replaced("label", pa.array(np.zeros(6, np.int64))),
    "fewer rows": lambda path: pq.write_table(pq.read_table(path).slice(1), path),
}


@pytest.mark.parametrize("kind", EDITS)
def test_predictions_that_were_edited_are_named(path, kind):
    assert answers_of(path, TEST).answer.tolist() == [0, 1, 2, 0, 1, 2]
    EDITS[kind](path)
    with pytest.raises(StoreError, match=r"predictions\.parquet is damaged") as caught:
        answers_of(path, TEST)
    assert f"delete {path.parent} and run again" in str(caught.value)
    assert caught.value.exit_code == 3


def test_predictions_are_read_as_written(path):
    again = predictions.read(path)
    np.testing.assert_array_equal(again.logits, np.eye(6, 3))
    assert again.kl is None


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", None])
def test_drafts_that_were_edited_are_named(content, tmp_path):
    path = tmp_path / "drafts.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"drafts\.parquet is damaged"):
        read_acceptance(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    lines = Journal(tmp_path / journal.NAME)
    lines.run("run", "first", tags={"a": 1})
    lines.params("run", {"optim.steps": 40})
    lines.dataset("run", "rows", "d" * 64, "here", {"rows": 12})
    lines.run("student/seed-0", "student/seed-0", "run")
    lines.metrics("run", [("loss", 0.5, 1), ("loss", float("nan"), 2), ("whole", 3, 2)])
    (tmp_path / "report.json").write_text("{}")
    lines.artefact("run", Path("report.json"))
    lines.end("run", "FINISHED")
    return tmp_path


HEAD = {"seq": 9, "time_ms": 1, "run": "run"}
LINES = {
    "a list": [1],
    "a number": 3,
    "null": None,
    "no kind": HEAD,
    "another kind": HEAD | {"kind": "delete"},
    "a seq of words": HEAD | {"kind": "end", "status": "FINISHED", "seq": "9"},
    "another status": HEAD | {"kind": "end", "status": "DONE"},
    "values that are no list": HEAD | {"kind": "metrics", "values": {"loss": 1}},
    "a point of two": HEAD | {"kind": "metrics", "values": [["loss", 1.0]]},
    "a value of words": HEAD | {"kind": "metrics", "values": [["loss", "low", 1]]},
    "a run without a name": HEAD | {"kind": "run", "parent": None, "tags": {}},
    "tags of numbers": HEAD | {"kind": "run", "name": "x", "parent": None, "tags": {"a": 1}},
    "a run nobody declared": HEAD | {"kind": "params", "values": {}, "run": "trial/3"},
    "a parent nobody declared": HEAD
    | {"kind": "run", "name": "x", "parent": "gone", "tags": {}, "run": "trial/3"},
}


@pytest.mark.parametrize("kind", LINES)
def test_a_journal_line_of_another_shape_is_named(folder, kind):
    path = folder / journal.NAME
    assert len(journal.read(path)) == 7
    with path.open("a") as file:
        file.write(json.dumps(LINES[kind]) + "\n")
    with pytest.raises(StoreError, match=r"journal.jsonl: line 8 .*remove that line"):
        journal.read(path)


def test_a_journal_line_of_another_shape_is_not_written_over(folder):
    path = folder / journal.NAME
    with path.open("a") as file:
        file.write("[1]\n")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="line 8"):
        Journal(path).end("run", "FAILED")
    assert path.read_bytes() == before


GARBAGE = ["", "{", "[]", "3", '{"uri": 1}', '{"runs": {"run": {}}}', '{"runs": []}', '{"x": 1}']


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_cursor_of_another_shape_is_as_good_as_none(folder, garbage):
    cursor = sync_plan.Cursor("sqlite:///x", "raykd", {"run": {"id": "0b1c", "seq": 3}})
    cursor.save(folder)
    assert sync_plan.load(folder) == cursor
    (folder / sync_plan.CURSOR).write_text(garbage)
    assert sync_plan.load(folder) == sync_plan.Cursor()
