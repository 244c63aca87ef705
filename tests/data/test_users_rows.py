"""Users' own rows as they come: labels of any type, copies beside the files, folders that name a
column, rows that do not fit, and functions that fail.
"""

import json
import os
import sys
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards

from raykd import data
from raykd.console import show, stdout_for_results
from raykd.data import SPLITS, Dataset
from raykd.data import room as room_of_rows
from raykd.data.order import shuffled
from raykd.data.table import Held
from raykd.errors import DataError, RaykdError, RecipeError
from raykd.files.digests import file_sha256
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import DataRef, Optim
from raykd.stages.check import check_with_data
from raykd.targets import UNLABELLED

NUMBER = count()


def rows_of(labels: list, **columns: list) -> list[dict]:
    """A row of each label in every split."""
    rows = []
    for split in SPLITS:
        for i, label in enumerate(labels):
            row = {"inputs": [[float(i), 1.0]], "label": label, "split": split}
            rows.append(row | {name: values[i] for name, values in columns.items()})
    return rows


def write(path: Path, rows: list[dict], **keywords) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **keywords)
    return path.parent


def load(folder: Path, **settings) -> Dataset:
    return data.load(DataRef.model_validate({"source": str(folder), **settings}))


@pytest.fixture
def load_function(tmp_path, monkeypatch):
    """A function that loads what the body of a function of the user's gives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(body: str, **settings) -> Dataset:
        name = f"own_{next(NUMBER)}"
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        Path(f"{name}.py").write_text(f"import os, sys, threading\ndef rows():\n{lines}\n")
        try:
            return data.load(DataRef.model_validate({"source": f"{name}:rows", **settings}))
        finally:
            sys.modules.pop(name, None)

    return load


# classes


@pytest.mark.parametrize("kind", [int, float, str, np.int64])
def test_integer_classes_are_in_the_order_of_numbers(tmp_path, kind):
    numbers = [kind(i) for i in (*range(12), -1)]
    folder = write(tmp_path / "a.parquet", rows_of(numbers))
    dataset = load(folder)
    assert dataset.classes == tuple(map(str, range(-1, 12)))
    assert dataset.splits["test"].label.tolist() == [*range(1, 13), 0]


def test_numbers_among_words_are_words(tmp_path):
    folder = write(tmp_path / "a.parquet", rows_of(["10", "9", "a"]))
    assert load(folder).classes == ("10", "9", "a")


def test_nan_is_no_label_and_whole_floats_are_integers(tmp_path):
    folder = write(tmp_path / "a.parquet", rows_of([0.0, 1.0, float("nan")]))
    write(tmp_path / "b.parquet", rows_of([1, 0]))
    dataset = load(folder)
    assert dataset.classes == ("0", "1")
    assert dataset.splits["val"].label.tolist() == [0, 1, UNLABELLED, 1, 0]


def test_bytes_are_text(tmp_path):
    folder = write(tmp_path / "a.parquet", rows_of([b"walk", b"run"]))
    assert load(folder).classes == ("run", "walk")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (0.5, "row 1 is 0.5, no whole number"),
        (b"\xff", "row 1 is .*, bytes that are no UTF-8"),
        ("", "row 1 is '', which names no class"),
        (" ", "row 1 is ' ', which names no class"),
        ([1], r"row 1 is '\[1\]' of type list"),
        ("\ud800", "row 1 is .*half of a surrogate pair"),
        (True, r"row 1 is True \(bool\), and that of row 0 a int"),
        ("1", r"row 1 is '1' \(str\), and that of row 0 a int"),
    ],
)
def test_what_is_no_label_is_refused_with_its_row(load_function, label, words):
    first = 0 if label in (True, "1", 0.5) else type(label)()
    first = first or (0 if isinstance(label, bool | float | int) or label == "1" else "a")
    if isinstance(label, bytes):
        first = b"a"
    with pytest.raises(DataError, match=words) as caught:
        load_function(f"return {rows_of([first, label])!r}")
    assert caught.value.exit_code == 3


# files


def test_copies_under_hidden_names_are_no_data(tmp_path):
    write(tmp_path / "rows" / "a.parquet", rows_of(["a", "b"]))
    plain = load(tmp_path / "rows").digest
    sha256 = file_sha256(tmp_path / "rows")
    for name in (
        ".ipynb_checkpoints/a-checkpoint.parquet",
        "_temporary/0/part.parquet",
        "_metadata.parquet",
        "._a.parquet",
    ):
        write(tmp_path / "rows" / name, rows_of(["a", "b"]))
    (tmp_path / "rows" / "x.parquet").mkdir()
    assert load(tmp_path / "rows").digest == plain
    assert file_sha256(tmp_path / "rows") == sha256


def test_a_folder_below_a_hidden_one_may_hold_data(tmp_path):
    folder = write(tmp_path / ".cache" / "_rows" / "a.parquet", rows_of(["a", "b"]))
    assert len(load(folder).splits["train"]) == 2


def test_a_suffix_in_capitals_and_a_folder_named_like_a_file_are_read(tmp_path):
    write(tmp_path / "a.parquet" / "b.PARQUET", rows_of(["a", "b"]))
    assert len(load(tmp_path).splits["train"]) == 2
    sha256 = file_sha256(tmp_path)
    write(tmp_path / "a.parquet" / "b.PARQUET", rows_of(["a", "c"]))
    assert file_sha256(tmp_path) != sha256


def test_a_flipped_bit_is_found_by_the_pages_checksum(tmp_path):
    rows = rows_of(["a", "b"] * 100)
    folder = write(
        tmp_path / "a.parquet",
        rows,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    sound = load(folder).digest
    path = tmp_path / "a.parquet"
    content = path.read_bytes()
    at = content.index(np.float64(77.0).tobytes())
    shards.flip(path, byte=at + 6, bit=1)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        load(folder)
    path.write_bytes(content)
    assert load(folder).digest == sound


@pytest.mark.parametrize("column", ["split", "label"])
def test_a_folder_that_names_a_column_gives_it(tmp_path, column):
    rows = [row | {"label": ["9", "10"][i % 2]} for i, row in enumerate(rows_of(["", ""]))]
    for value in {row[column] for row in rows}:
        some = [
            {k: v for k, v in row.items() if k != column} for row in rows if row[column] == value
        ]
        write(tmp_path / f"{column}={value}" / "a.parquet", some)
    dataset = load(tmp_path)
    assert dataset.classes == ("9", "10")
    assert {name: len(part) for name, part in dataset.splits.items()} == dict.fromkeys(SPLITS, 2)


def test_a_folder_and_a_column_that_disagree_are_refused(tmp_path):
    write(tmp_path / "split=train" / "a.parquet", rows_of(["a", "b"]))
    with pytest.raises(DataError, match="row 2 has split 'val', and its folder says split=train"):
        load(tmp_path)


def test_a_folder_and_a_column_that_agree_are_read(tmp_path):
    for split in SPLITS:
        some = [row for row in rows_of(["a", "b"]) if row["split"] == split]
        write(tmp_path / f"split={split}" / "a.parquet", some)
    assert len(load(tmp_path).splits["val"]) == 2


# groups


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_rows_without_a_group_are_groups_of_their_own(load_function, missing):
    rows = rows_of(["a"] * 5, group=["None", "g", missing, missing, "None"])
    made = load_function(f"nan = float('nan')\nreturn {rows!r}", columns={"group": "group"})
    groups = made.splits["test"].group.tolist()
    assert groups[0] == groups[4]
    assert len(set(groups)) == 4
    everywhere = np.concatenate([part.group for part in made.splits.values()])
    assert len(set(everywhere.tolist())) == 2 + 6


# shapes


def test_a_flat_list_is_told_as_one(tmp_path):
    rows = [row | {"inputs": [0.5] * 348} for row in rows_of(["a", "b"])]
    with pytest.raises(DataError, match=r"row 0: inputs are one flat list of 348 numbers"):
        load(write(tmp_path / "a.parquet", rows))


def test_a_row_far_longer_than_the_others_is_named_before_memory_is_asked(monkeypatch):
    lengths = np.full(2000, 30)
    lengths[17] = 2_000_000
    words = r"row 17 has 2,000,000 steps, and half of the rows have at most 30: .* 33\.5 GiB"
    with pytest.raises(DataError, match=words):
        room_of_rows.check_room(lengths, 2, "rows")
    room_of_rows.check_room(np.full(2000, 30), 2, "rows")
    monkeypatch.setattr(room_of_rows, "memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match="cut it, or leave it out"):
        room_of_rows.check_room(np.full(2000, 30), 2, "rows")


def test_a_function_that_never_ends_is_stopped_by_its_rows_or_by_memory(load_function, monkeypatch):
    endless = f"while True:\n    yield {rows_of(['a'])[0]!r}"
    with pytest.raises(DataError, match=r"own_\d+:rows: gives more than data\.max_rows = 50 rows"):
        load_function(endless, max_rows=50)
    monkeypatch.setattr(room_of_rows, "memory_bytes", lambda: 1 << 20)
    with pytest.raises(
        DataError, match=r"own_\d+:rows: gave 100 rows, and this process has .* GiB"
    ):
        load_function(endless)


def test_the_check_of_room_comes_before_rows_are_padded(load_function, monkeypatch):
    monkeypatch.setattr(room_of_rows, "SMALL_BYTES", 1 << 10)
    rows = rows_of(["a"] * 40)
    rows[7] = rows[7] | {"inputs": [[0.0, 1.0]] * 5000}
    with pytest.raises(DataError, match="row 7 has 5,000 steps"):
        load_function(f"return {rows!r}")


# functions

GOOD = rows_of(["a", "b"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "gives 'None' of type NoneType; return a list of dicts"),
        ("return 7", "gives '7' of type int"),
        ("return [1, 2]", "row 0 is '1' of type int, not a dict"),
        ("return 'abc'", "row 0 is 'a' of type str, not a dict"),
        (
            "raise ValueError('no file')",
            r"data.source own_\d+:rows raised ValueError: no file \(own_.*line 3",
        ),
        (
            f"yield {GOOD[0]!r}\nyield {GOOD[1]!r}\nraise KeyError('x')",
            "after 2 rows, raised KeyError: 'x'",
        ),
        ("sys.exit(0)", r"asked this process to exit \(0\)"),
        ("sys.exit('bye')", r"asked this process to exit \('bye'\)"),
        ("os._exit(0)", r"asked this process to exit \(0\)"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise MemoryError", "rows raised MemoryError"),
        ("return [bytearray(1 << 60)]", "MemoryError"),
        (
            f"import torch\nrow = {GOOD[0]!r}\nrow['inputs'] = torch.zeros(1, 2).requires_grad_()\n"
            "return [row]",
            "row 0: inputs must be .*requires grad",
        ),
        (
            f"import numpy\nrow = {GOOD[0]!r}\nrow['inputs'] = numpy.ones((1, 2), complex)\n"
            "return [row]",
            "row 0: inputs must be .*complex",
        ),
    ],
)
def test_a_function_that_fails_is_named(load_function, body, words):
    with pytest.raises(DataError, match=words) as caught:
        load_function(body)
    assert caught.value.exit_code == 3


def test_a_thread_that_is_left_does_not_keep_the_process(load_function):
    body = f"threading.Thread(target=threading.Event().wait, name='left').start()\nreturn {GOOD!r}"
    assert len(load_function(body).splits["train"]) == 2
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "left")
    assert os._exit.__module__ in ("posix", "nt")
    assert threading.Thread.start.__qualname__ == "Thread.start"


def test_what_a_function_prints_never_reaches_stdout(capfd, load_function):
    body = (
        "print('by print')\nos.write(1, b'by descriptor')\nos.system('echo by process')\n"
        f"sys.__stdout__.write('behind')\nreturn {GOOD!r}"
    )
    with stdout_for_results():
        load_function(body)
        show({"rows": 2}, "", as_json=True)
    out, err = capfd.readouterr()
    assert json.loads(out) == {"rows": 2}
    assert all(word in err for word in ("by print", "by descriptor", "by process"))


# text


def test_rows_of_text_with_labels_are_refused(tmp_path):
    rows = [{"text": "a", "split": split, "label": 1} for split in SPLITS]
    with pytest.raises(
        RaykdError, match=r"data\.tokenizer: the rows have a column 'label'"
    ) as caught:
        load(write(tmp_path / "a.parquet", rows), tokenizer="tokenizer.json")
    assert caught.value.exit_code == 2


def test_half_of_a_surrogate_pair_is_no_text(load_function):
    rows = [{"text": text, "split": "train"} for text in ("a", "b\ud800")]
    with pytest.raises(DataError, match=r"text of row 1 holds half of a surrogate pair"):
        load_function(f"return {rows!r}", tokenizer="tokenizer.json")


# rows without labels


def test_a_class_that_a_split_lacks_is_told_and_not_refused(tmp_path):
    rows = rows_of(["a", "b"])
    rows[1]["label"] = "c"
    dataset = load(write(tmp_path / "a.parquet", rows))
    assert dataset.classes == ("a", "b", "c")
    told = ["b in train", "c in val", "c in test"]
    assert dataset.cautions == [f"no row of class {words}" for words in told]
    assert "; no row of class b in train; " in dataset.describe()


def test_rows_without_any_label_are_learnt_from_the_teacher_alone(tmp_path):
    rows = rows_of(["a", "b"] * 4)
    for row in rows:
        row["label"] = None if row["split"] == "train" else row["label"]
    dataset = load(write(tmp_path / "a.parquet", rows))
    assert not dataset.splits["train"].labelled.any()
    order = shuffled(dataset.splits["train"].labelled, Optim(batch=4, steps=2), seed=0)
    assert sorted([*order.rows(0), *order.rows(1)]) == list(range(8))
    taught = {"source": "watch_gestures"}
    raw = {
        "data": taught,
        "teacher": {"weights": "t.safetensors"},
        "student": {},
        "terms": {"kd": {"weight": 1.0}},
    }
    recipe = Recipe.model_validate(raw)
    with pytest.raises(RecipeError, match="control: no training row has a label"):
        check_with_data(recipe, Held(dataset), tmp_path)
    alone = recipe.model_copy(update={"teacher": None})
    with pytest.raises(RecipeError, match="terms: no training row has a label, and no term"):
        check_with_data(alone, Held(dataset), tmp_path)
