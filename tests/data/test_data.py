"""Laws of the data: splits share no step, two ways in give the same rows, and every unusable row is
named.

The shipped file is checked against the sizes that its split rule gives by hand.
"""

import json
import math
import sys
from dataclasses import replace
from fractions import Fraction
from importlib import resources
from itertools import combinations, count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd import data
from raykd.data import SPLITS
from raykd.data.rows import Dataset, Rows, check_dataset, hide_labels
from raykd.errors import DataError, RecipeError
from raykd.recipe import imports
from raykd.recipe.tables import DataRef
from raykd.stages.load import resolve
from raykd.targets import UNLABELLED
from raykd.teacher.identity import run_digest

SHIPPED = resources.files("raykd.data") / "shipped" / "watch_gestures.npz"
COLUMNS = {"group": "group", "valence": "valence"}
NUMBER = count()


@pytest.fixture(scope="module")
def raw():
    with SHIPPED.open("rb") as file:
        return dict(np.load(file, allow_pickle=False))


@pytest.fixture(scope="module")
def gestures() -> Dataset:
    return data.load(DataRef())


def steps_of(rows: Rows, raw, *, stride: int) -> list[np.ndarray]:
    """The steps (of all recordings in a row) that each window of a split covers: the first found by
    its values.
    """
    signal = (raw["signal"] * raw["scale"] + raw["offset"]).astype(np.float32)
    window = rows.inputs.shape[1]
    found = []
    for recording in np.unique(rows.group):
        begin, end = raw["start"][recording : recording + 2]
        inside = np.lib.stride_tricks.sliding_window_view(
            signal[begin:end], window, axis=0
        ).swapaxes(1, 2)
        windows = rows.inputs[rows.group == recording]
        [first] = np.flatnonzero((inside == windows[0]).all((1, 2)))
        starts = first + stride * np.arange(len(windows))
        assert np.array_equal(inside[starts], windows)
        found.extend(begin + starts[:, None] + np.arange(window))
    return found


def test_the_shipped_file_is_small_and_no_pickle(raw):
    assert len(SHIPPED.read_bytes()) <= 1_500_000
    assert all(value.dtype != object for value in raw.values())
    assert len(raw["label"]) == len(raw["subject"]) == len(raw["start"]) - 1 == 140


def test_the_default_split_has_the_sizes_of_its_rule(gestures, raw):
    """Windows of 16 at stride 8 in [0, 0.6), [0.6 + gap, 0.72) and [0.72 + gap, 1) of each
    recording.
    """
    lengths = np.diff(raw["start"]).tolist()
    sizes = [
        sum(max(0, (high * n // 100 - low * n // 100 - gap - 16) // 8 + 1) for n in lengths)
        for low, high, gap in ((0, 60, 0), (60, 72, 16), (72, 100, 16))
    ]
    assert [len(gestures.splits[s]) for s in SPLITS] == sizes == [8946, 1353, 3798]
    assert gestures.splits["train"].inputs.shape == (8946, 16, 6)
    assert len(gestures.classes) == 7


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (32, 16)])
def test_parts_of_a_recording_lie_a_window_apart(raw, window, stride):
    splits = data.load(DataRef(window=window, stride=stride)).splits
    covered = {
        name: np.unique(np.concatenate(steps_of(splits[name], raw, stride=stride)))
        for name in SPLITS
    }
    for first, second in combinations(SPLITS, 2):
        pairs = 0
        for begin, end in zip(raw["start"][:-1], raw["start"][1:], strict=True):
            early, late = (
                steps[(begin <= steps) & (steps < end)]
                for steps in (covered[first], covered[second])
            )
            if len(early) and len(late):  # a short recording may have no window of a part
                assert late.min() - early.max() > window
                pairs += 1
        assert pairs > 100


def test_the_subject_split_shares_no_subject_and_no_recording(raw):
    splits = data.load(DataRef(split="subject")).splits
    for key in (lambda rows: set(raw["subject"][rows.group]), lambda rows: set(rows.group)):
        parts = [key(splits[s]) for s in SPLITS]
        assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert [len(set(raw["subject"][splits[s].group])) for s in SPLITS] == [6, 2, 2]


@pytest.mark.parametrize("split", ["time", "subject"])
def test_row_ids_are_unique_and_ascend(split):
    found = data.load(DataRef(split=split))
    ids = np.concatenate([found.splits[s].row_id for s in SPLITS])
    assert (np.diff(ids) > 0).all()
    assert all((found.splits[s].label == label).any() for s in SPLITS for label in range(7))


def test_every_window_has_the_label_of_its_recording(gestures, raw):
    for rows in gestures.splits.values():
        assert (rows.label == raw["label"][rows.group]).all()
        assert rows.mask.all()


def test_a_window_longer_than_a_part_is_refused():
    with pytest.raises(
        DataError, match=r"no window of 5000 steps fits split 'train'; lower data\.window"
    ):
        data.load(DataRef(window=5000))


def plain_rows(num: int = 24, *, seed: int = 0) -> list[dict]:
    """Rows of 2 channels and 3 to 5 steps: classes a, b, c in every split, one label in seven
    missing from train.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        split = SPLITS[i // 3 % 3]
        length = 3 + i % 3
        rows.append(
            {
                "inputs": rng.normal(size=(length, 2)).tolist(),
                "label": None if split == "train" and i % 7 == 1 else "abc"[i % 3],
                "split": split,
                "group": f"r{i // 2}",
                "valence": None if i % 5 == 0 else [None, *rng.uniform(-1, 1, length - 1).tolist()],
            }
        )
    return rows


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads plain rows by either way in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(
        rows: list[dict], *, way: str = "parquet", columns: dict | None = None, **settings
    ) -> Dataset:
        name = f"rows_{next(NUMBER)}"
        if way == "parquet":
            (tmp_path / name).mkdir()
            half = len(rows) // 2
            for part, some in (("b", rows[half:]), ("a", rows[:half])):
                pq.write_table(pa.Table.from_pylist(some), tmp_path / name / f"{part}.parquet")
            source = f"./{name}"
        else:
            text = f"from math import inf, nan\ndef rows(num=None):\n    return {rows!r}[:num]\n"
            (tmp_path / f"{name}.py").write_text(text)
            source = f"{name}:rows"
        return data.load(
            DataRef.model_validate({"source": source, "columns": columns or COLUMNS, **settings})
        )

    yield load
    for name in [n for n in sys.modules if n.startswith("rows_")]:
        del sys.modules[name]


def test_parquet_and_function_give_the_same_data_set(load):
    rows = plain_rows()
    one = load(rows)
    two = load(rows, way="function")
    assert one.digest == two.digest
    assert one.classes == ("a", "b", "c")
    for name in SPLITS:
        mine = [i for i, row in enumerate(rows) if row["split"] == name]
        got = one.splits[name]
        assert got.row_id.tolist() == mine
        for index, i in enumerate(mine):
            length = len(rows[i]["inputs"])
            assert got.mask[index].tolist() == [True] * length + [False] * (5 - length)
            assert np.array_equal(got.inputs[index, :length], np.float32(rows[i]["inputs"]))
            assert not got.inputs[index, length:].any()
            label = rows[i]["label"]
            assert got.label[index] == (UNLABELLED if label is None else "abc".index(label))
            values = np.array(rows[i]["valence"] or [None] * length, np.float32)
            assert got.valence is not None
            assert np.array_equal(got.valence[index, :length], values, equal_nan=True)
            assert np.isnan(got.valence[index, length:]).all()
    groups = {r["group"] for r in rows}
    assert len({g for s in SPLITS for g in one.splits[s].group.tolist()}) == len(groups)


def test_a_recipe_names_columns_classes_and_the_functions_settings(load):
    rows = plain_rows()
    renamed = [{{"inputs": "x", "label": "y"}.get(k, k): v for k, v in row.items()} for row in rows]
    columns = {"inputs": "x", "label": "y", **COLUMNS}
    assert load(renamed, columns=columns).digest == load(rows).digest
    assert load(rows, classes=["c", "b", "a"]).classes == ("c", "b", "a")
    cut = load(rows, way="function", settings={"num": 18})
    assert sum(map(len, cut.splits.values())) == 18
    plain = load(rows, columns={"label": "label"})
    assert plain.splits["val"].valence is None
    assert plain.splits["val"].group.tolist() == plain.splits["val"].row_id.tolist()


def test_number_labels_are_classes_by_name(load):
    rows = [
        row | {"label": None if row["label"] is None else "abc".index(row["label"])}
        for row in plain_rows()
    ]
    assert load(rows).classes == ("0", "1", "2")


def spoilt(change: dict, *, row: int = 3) -> list[dict]:
    """Good rows but for one, which lies in val."""
    rows = plain_rows()
    rows[row] = rows[row] | change
    return rows


VAL = plain_rows()[3]
BAD = {
    "NaN inputs": (
        spoilt({"inputs": [[math.nan, 1.0]] * 3}),
        {},
        r"split 'val': NaN or infinite inputs in rows 3;",
    ),
    "infinite inputs": (
        spoilt({"inputs": [[math.inf, 1.0]] * 3}),
        {},
        r"NaN or infinite inputs in rows 3;",
    ),
    "missing inputs": (spoilt({"inputs": None}), {}, r"row 3 has shape \(\)"),
    "no step": (spoilt({"inputs": [], "valence": None}), {}, r"row 3 has shape \(0,\)"),
    "ragged channels": (
        spoilt({"inputs": [[1.0, 2.0], [3.0], [4.0, 5.0]]}),
        {},
        "inputs must be lists of steps",
    ),
    "other channels": (
        spoilt({"inputs": [[1.0]] * 3}),
        {},
        r"row 3 has shape \(3, 1\) and row 0 \(3, 2\)",
    ),
    "label outside": (
        spoilt({"label": "d"}),
        {"classes": ["a", "b", "c"]},
        r"labels \['d'\] are outside data\.classes",
    ),
    "no label in val": (
        [row | {"label": None if row["split"] == "val" else row["label"]} for row in plain_rows()],
        {},
        r"split 'val': no row has a label",
    ),
    "unknown split": (
        spoilt({"split": "dev"}),
        {},
        r"column 'split' holds \['dev'\]; write train, val or test",
    ),
    "missing split": (spoilt({"split": None}), {}, r"column 'split' holds \['None'\]"),
    "empty split": (
        [r for r in plain_rows() if r["split"] != "test"],
        {},
        "split 'test' has 0 rows",
    ),
    "no rows": ([], {}, "0 rows"),
    "high valence": (
        spoilt({"valence": [0.0, 1.5, 0.0]}),
        {},
        r"split 'val': valence outside \[-1, 1\] in rows 3;",
    ),
    "infinite valence": (
        spoilt({"valence": [0.0, -math.inf, 0.0]}),
        {},
        r"valence outside \[-1, 1\] in rows 3;",
    ),
    "short valence": (spoilt({"valence": [0.0]}), {}, "row 3 has 1 valence values for 3 steps"),
}
BAD_IN_PYTHON = {  # what a Parquet column cannot hold beside good rows
    "valence is a number": (spoilt({"valence": 0.5}), {}, "row 3 has 1 valence values for 3 steps"),
    "valence is words": (
        spoilt({"valence": ["high"] * 3}),
        {},
        "row 3, valence must be a list of numbers",
    ),
    "inputs are words": (
        spoilt({"inputs": [["high", "low"]] * 3}),
        {},
        "inputs must be lists of steps",
    ),
    "three axes": (spoilt({"inputs": [[[1.0, 2.0]]] * 3}), {}, r"row 3 has shape \(3, 1, 2\)"),
}
CASES = [
    (f"{name}, {way}", way, *case) for name, case in BAD.items() for way in ("parquet", "function")
]
CASES += [(name, "function", *case) for name, case in BAD_IN_PYTHON.items()]


@pytest.mark.parametrize(
    ("way", "rows", "settings", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_unusable_rows_are_named(load, way, rows, settings, words):
    if way == "parquet" and not rows:
        rows = []
        words = "no column"
    with pytest.raises(DataError, match=words) as caught:
        load(rows, way=way, **settings)
    assert caught.value.exit_code == 3


def test_rows_without_a_step_are_named(load):
    good = load(plain_rows())
    val = good.splits["val"]
    empty = replace(val, mask=val.mask & (val.row_id != 3)[:, None])
    with pytest.raises(DataError, match="split 'val': rows 3 hold no step"):
        check_dataset(replace(good, splits=good.splits | {"val": empty}))


def test_many_faulty_rows_are_five_ids_and_a_count(load):
    rows = [row | {"inputs": [[math.nan, 0.0]], "valence": None} for row in plain_rows(72)]
    with pytest.raises(DataError, match="in rows 0, 1, 2, 9, 10 and 19 more; mend"):
        load(rows)


@pytest.mark.parametrize("key", ["inputs", "label", "split", "group", "valence"])
def test_a_missing_column_is_named_with_the_key_and_the_nearest(load, key):
    rows = [{f"{k}s" if k == key else k: v for k, v in row.items()} for row in plain_rows()]
    with pytest.raises(
        DataError,
        match=rf"a\.parquet: no column '{key}' \(data\.columns\.{key}\)\. Did you mean {key}s\?",
    ):
        load(rows)
    with pytest.raises(
        DataError, match=rf"row 0 has no '{key}' \(data\.columns\.{key}\); it has .*'{key}s'"
    ):
        load(rows, way="function")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 not a table PAR1", b"{}"])
def test_an_unreadable_parquet_file_is_named(tmp_path, content):
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        data.load(DataRef(source=str(tmp_path)))


def test_parquet_files_of_different_types_are_refused(tmp_path):
    rows = [row | {"label": row["label"] or "a"} for row in plain_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([r | {"label": 1} for r in rows]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"the files' columns differ in type"):
        data.load(DataRef(source=str(tmp_path)))


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "rows.txt").write_text("a,b\n")
    with pytest.raises(DataError, match=rf"{tmp_path}: no \*\.parquet file there"):
        data.load(DataRef(source=str(tmp_path)))


def test_an_unknown_data_set_is_refused_with_the_nearest():
    with pytest.raises(
        DataError, match=r"'watch_gesture': no such data set\. Did you mean watch_gestures\?"
    ):
        data.load(DataRef(source="watch_gesture"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rows_nowhere:rows", ": no module 'rows_nowhere' is installed"),
        ("json:rows", " cannot be imported: json has no function 'rows'"),
        ("json:__name__", " cannot be imported: json has no function '__name__'"),
    ],
)
def test_a_function_that_does_not_exist_is_a_fault_of_the_recipe(source, words):
    imports.permit(["json"])
    with pytest.raises(RecipeError, match=f"data.source: '{source}'{words}"):
        data.load(DataRef(source=source))


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.07, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_a_fraction_of_labels_is_exact_in_every_class(fraction):
    label = np.repeat([0, 1, 2, UNLABELLED], [100, 30, 1, 5])
    rows = Rows(
        np.arange(136),
        np.zeros((136, 1, 1), np.float32),
        np.ones((136, 1), bool),
        label,
        np.arange(136),
    )
    kept = hide_labels(rows, fraction, 0).label
    for number, num in ((0, 100), (1, 30), (2, 1)):
        assert (kept == number).sum() == math.ceil(Fraction(str(fraction)) * num)
    assert ((kept == label) | (kept == UNLABELLED)).all()


def test_padding_of_a_series_is_zero(load):
    good = load(plain_rows())
    train = good.splits["train"]
    short = int(train.mask.all(1).argmin())
    assert not train.mask[short, -1]
    check_dataset(good)
    inputs = train.inputs.copy()
    inputs[short, -1, 0] = 1
    filled = replace(good, splits=good.splits | {"train": replace(train, inputs=inputs)})
    words = f"inputs other than 0 where mask is False in rows {train.row_id[short]}"
    with pytest.raises(DataError, match=words):
        check_dataset(filled)


def test_labels_are_hidden_by_seed_and_a_smaller_fraction_is_part_of_a_larger(gestures):
    def kept(fraction: float, seed: int = 0) -> set[int]:
        rows = data.load(DataRef(label_fraction=fraction, label_seed=seed)).splits["train"]
        return set(rows.row_id[rows.label != UNLABELLED].tolist())

    assert kept(0.1) == kept(0.1)
    assert kept(0.1) != kept(0.1, seed=1)
    assert kept(0.05) < kept(0.1) < kept(0.5) < kept(1.0)
    hidden = data.load(DataRef(label_fraction=0.1))
    assert np.array_equal(hidden.splits["train"].inputs, gestures.splits["train"].inputs)
    for name in ("val", "test"):
        assert np.array_equal(hidden.splits[name].label, gestures.splits[name].label)


FIELDS = ["row_id", "inputs", "mask", "label", "group", "valence"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_digest_changes_with_any_value(load, split, field):
    good = load(plain_rows())
    value = getattr(good.splits[split], field).copy()
    place = (-1, *(0,) * (value.ndim - 1))
    value[place] = (
        not value[place]
        if value.dtype == bool
        else 0.25
        if np.isnan(value[place])
        else value[place] + 1
    )
    moved = replace(
        good, splits=good.splits | {split: replace(good.splits[split], **{field: value})}
    )
    assert moved.digest != good.digest
    assert replace(good, name="other").digest == good.digest


def test_the_test_digest_is_of_the_test_rows_alone(gestures):
    fewer = data.load(DataRef(label_fraction=0.1))
    assert fewer.test_digest == gestures.test_digest
    assert fewer.digest != gestures.digest
    assert data.load(DataRef(stride=16)).test_digest != gestures.test_digest


def test_the_digest_changes_with_shapes_classes_and_order(load):
    good = load(plain_rows())
    train = good.splits["train"]
    others = [
        replace(good, classes=("a", "b", "d")),
        replace(good, classes=("ab", "", "c")),
        replace(good, splits=good.splits | {"train": train.take(slice(None, None, -1))}),
        replace(good, splits=good.splits | {"train": train.take(slice(1, None))}),
        replace(good, splits=good.splits | {"train": replace(train, valence=None)}),
        replace(
            good, splits=good.splits | {"train": replace(train, inputs=train.inputs.swapaxes(1, 2))}
        ),
        replace(good, splits=good.splits | {"train": good.splits["val"], "val": train}),
    ]
    assert len({good.digest, *(o.digest for o in others)}) == 1 + len(others)


def test_the_fields_tested_are_all_there_are():
    assert list(Rows.__dataclass_fields__) == FIELDS


def test_a_line_says_what_was_loaded():
    found = data.load(DataRef(label_fraction=0.1))
    labels = (found.splits["train"].label != UNLABELLED).sum()
    assert found.describe() == (
        f"watch_gestures: train 8946, val 1353, test 3798 rows, {labels} training labels, 7 "
        "classes, "
        f"sha256 {found.digest[:12]}"
    )


def test_a_runs_folder_follows_the_rows_and_the_code_of_a_function(tmp_path, monkeypatch):
    """What a function reads is unknown to the recipe, so its rows name the run; so does a model's
    own file.
    """
    (tmp_path / "mine.py").write_text(
        "import json, pathlib\n"
        "def rows():\n"
        "    return json.loads((pathlib.Path(__file__).parent / 'rows.json').read_text())\n"
        "def model(channels, classes):\n"
        "    raise NotImplementedError\n"
    )
    (tmp_path / "nets.py").write_text("def model(channels, classes): ...\n")
    rows = [
        {"inputs": [[float(i)]], "label": i % 2, "split": split}
        for i, split in enumerate(["train", "val", "test"] * 2 + ["train"] * 2)
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = resolve(
        {"technique": "none", "data": {"source": "mine:rows"}, "student": {"model": "nets:model"}}
    )

    def named(value: float) -> str:
        rows[0]["inputs"] = [[value]]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return run_digest(recipe, data.load(recipe.data))

    first = named(0.0)
    assert named(1.0) != first
    assert named(0.0) == first
    (tmp_path / "nets.py").write_text("def model(channels, classes): pass\n")
    assert named(0.0) != first
