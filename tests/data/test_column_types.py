"""The right values of every type of column that a Parquet file may have."""

import decimal
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd import data
from raykd.data import SPLITS, arrow_columns
from raykd.data.blocks import MISSING
from raykd.errors import DataError
from raykd.recipe.tables import DataRef
from raykd.targets import UNLABELLED

COUNT = 6  # rows, of 3 steps of 2 channels
VALUES = np.arange(COUNT * 6, dtype=np.float32).reshape(COUNT, 3, 2)
SPLIT = [SPLITS[i // 2] for i in range(COUNT)]
FLAT = VALUES.ravel()


def lists(flat: pa.Array, kind: str) -> pa.Array:
    """The values as lists in lists of one kind."""
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 2), 3)
    made = {"list": pa.ListArray, "large": pa.LargeListArray}[kind]
    inner = made.from_arrays(list(range(0, 37, 2)), flat)
    return made.from_arrays(list(range(0, 19, 3)), inner)


def tensor(flat: pa.Array, permutation: list[int] | None = None) -> pa.Array:
    kind = pa.fixed_shape_tensor(flat.type, [3, 2], permutation=permutation)
    storage = pa.FixedSizeListArray.from_arrays(flat, 6)
    return pa.ExtensionArray.from_storage(kind, storage)


def load(folder: Path, inputs: pa.Array, label=None, split=None) -> data.Dataset:
    columns = {
        "inputs": inputs,
        "label": pa.array(["a", "b"] * 3) if label is None else label,
        "split": pa.array(SPLIT) if split is None else split,
    }
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=4)
    return data.load(DataRef(source=str(folder)))


def inputs_of(dataset: data.Dataset) -> np.ndarray:
    return np.concatenate([dataset.splits[split].inputs for split in SPLITS])


NUMBERS = {
    **{
        name: pa.array(FLAT.astype(name))
        for name in ("float16", "float32", "float64", "int8", "uint16", "int64")
    },
    "decimal": pa.array([decimal.Decimal(int(v)) for v in FLAT], pa.decimal128(9, 2)),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_any_type_are_read(tmp_path, number):
    dataset = load(tmp_path, lists(NUMBERS[number], "list"))
    assert np.array_equal(inputs_of(dataset), VALUES)
    assert all(dataset.splits[split].mask.all() for split in SPLITS)


def test_truth_values_are_zero_and_one(tmp_path):
    dataset = load(tmp_path, lists(pa.array(FLAT % 2 == 1), "list"))
    assert np.array_equal(inputs_of(dataset), VALUES % 2)


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_lists_of_any_kind_are_read(tmp_path, kind):
    assert np.array_equal(inputs_of(load(tmp_path, lists(pa.array(FLAT), kind))), VALUES)


def test_tensors_of_one_shape_are_read(tmp_path):
    assert np.array_equal(inputs_of(load(tmp_path, tensor(pa.array(FLAT)))), VALUES)


def test_a_name_may_hold_dots(tmp_path):
    columns = {"x.y": lists(pa.array(FLAT), "list"), "x": [1] * COUNT, "split": SPLIT}
    table = pa.table(columns).append_column("a.label", [["a", "b"] * 3])
    pq.write_table(table, tmp_path / "a.parquet")
    named = {"inputs": "x.y", "label": "a.label"}
    ref = DataRef.model_validate({"source": str(tmp_path), "columns": named})
    assert np.array_equal(inputs_of(data.load(ref)), VALUES)


LABELS = {
    "dictionary": (pa.array(["b", "a", None] * 2).dictionary_encode(), ("a", "b"), 1),
    "large text": (pa.array(["b", "a", None] * 2, pa.large_string()), ("a", "b"), 1),
    "bytes": (pa.array([b"b", b"a", None] * 2), ("a", "b"), 1),
    "small integers": (pa.array([10, 9, None] * 2, pa.int8()), ("9", "10"), 1),
    "floats": (pa.array([1.0, 0.0, float("nan")] * 2), ("0", "1"), 1),
    "half floats": (pa.array(np.float16([1, 0, np.nan] * 2)), ("0", "1"), 1),
    "truth values": (pa.array([True, False, None] * 2), ("False", "True"), 1),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_type_are_classes(tmp_path, name):
    column, classes, first = LABELS[name]
    dataset = load(tmp_path, lists(pa.array(FLAT), "list"), column)
    assert dataset.classes == classes
    labels = np.concatenate([dataset.splits[split].label for split in SPLITS])
    assert labels.tolist() == [first, 1 - first, UNLABELLED] * 2


@pytest.mark.parametrize("kind", ["dictionary", "large", "bytes"])
def test_splits_of_any_type_are_read(tmp_path, kind):
    column = {
        "dictionary": pa.array(SPLIT).dictionary_encode(),
        "large": pa.array(SPLIT, pa.large_string()),
        "bytes": pa.array([split.encode() for split in SPLIT]),
    }[kind]
    dataset = load(tmp_path, lists(pa.array(FLAT), "list"), split=column)
    assert [len(dataset.splits[split]) for split in SPLITS] == [2, 2, 2]


def test_a_part_of_a_column_has_the_values_of_that_part():
    """Arrow keeps the whole in memory, and so a place to begin at."""
    for column in (
        *(lists(pa.array(FLAT), kind) for kind in ("list", "large", "fixed")),
        tensor(pa.array(FLAT)),
    ):
        found, unfit = arrow_columns.series(column.slice(2, 3), "rows", 0)
        assert np.array_equal(found.values.reshape(3, 3, 2), VALUES[2:5])
        assert not unfit


WRONG = {
    "a null row": ([None, [[1.0]]], r"row 0 has shape \(\), without any step"),
    "a null step": ([[[1.0]], [[1.0], None]], "row 1: inputs must be .*: a step is null"),
    "a null value": ([[[1.0]], [[1.0], [None]]], "row 1: inputs must be .*: a value is null"),
    "flat numbers": ([[1.0, 2.0], [3.0]], "row 0: inputs are one flat list of 2 numbers"),
    "deep lists": ([[[[1.0]], [[2.0]]]], r"row 0 has shape \(2, 1, 1\)"),
    "uneven steps": ([[[1.0]], [[1.0], [2.0, 3.0]]], "row 1: .*: its steps hold 1, 2 values"),
    "other channels": ([[[1.0]], [[2.0, 3.0]]], r"row 1 has shape \(1, 2\) and row 0 \(1, 1\)"),
    "texts": ([[["a"]]], "inputs must be .*and the values are string"),
    "one number": ([1.0], "inputs must be lists of steps of channel values, and are double"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_series_is_named_by_its_row(tmp_path, name):
    rows, words = WRONG[name]
    rows = rows * 3
    split = pa.array([SPLITS[i % 3] for i in range(len(rows))])
    label = pa.array(["a"] * len(rows))
    with pytest.raises(DataError, match=words):
        load(tmp_path, pa.array(rows), label, split)


def test_a_tensor_that_is_turned_is_not_read(tmp_path):
    with pytest.raises(DataError, match=r"column 'inputs' is extension<arrow.fixed_shape_tensor"):
        load(tmp_path, tensor(pa.array(FLAT), [1, 0]))


@pytest.mark.parametrize("is_told", [True, False])
def test_minus_one_is_no_label_where_the_file_says_so(tmp_path, is_told):
    """As Hugging Face `datasets` writes the labels of a test set; elsewhere it is a class."""
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    columns = {
        "inputs": lists(pa.array(FLAT), "list"),
        "label": pa.array([0, 1, -1] * 2),
        "split": pa.array(SPLIT),
    }
    table = pa.table(columns).replace_schema_metadata(told if is_told else None)
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = data.load(DataRef(source=str(tmp_path)))
    assert dataset.classes == (("0", "1") if is_told else ("-1", "0", "1"))
    labels = np.concatenate([dataset.splits[split].label for split in SPLITS])
    assert labels.tolist() == ([0, 1, UNLABELLED] * 2 if is_told else [1, 2, 0] * 2)


def test_lists_are_no_labels(tmp_path):
    with pytest.raises(DataError, match=r"the label of row 0 is '\[1\]' of type list"):
        load(tmp_path, lists(pa.array(FLAT), "list"), pa.array([[1]] * COUNT))


def test_a_null_in_valence_is_a_step_without_it():
    column = pa.array([[0.5, None], None, []])
    found = arrow_columns.step_values(column, "rows", 0)
    assert np.array_equal(found.values, np.float32([0.5, np.nan]), equal_nan=True)
    assert found.length.tolist() == [2, MISSING, 0]
