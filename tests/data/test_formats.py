"""JSON lines, CSV and folders of Hugging Face `datasets` give the rows that Parquet gives."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import texts
from texts import END, STEPS, sentence

from raykd import data
from raykd.data import SPLITS, layout
from raykd.errors import DataError, RecipeError
from raykd.recipe.tables import DataRef
from raykd.reports.compare.changes import changes
from raykd.stages.load import resolve
from raykd.targets import UNLABELLED
from raykd.teacher.identity import run_digest

COLUMNS = {"group": "group", "valence": "valence"}


def rows_of(split: str) -> list[dict]:
    """Rows of two to four steps, of which some have no label, group or valence."""
    rng = np.random.default_rng(len(split))
    rows = []
    for i in range(14):
        steps = 2 + i % 3
        rows.append(
            {
                "inputs": np.round(rng.normal(size=(steps, 2)), 4).tolist(),
                "label": None if i % 7 == 6 else "ab"[i % 2],
                "group": None if i % 5 == 4 else f"{split}-{i // 2}",
                "valence": None if i % 4 == 0 else [0.5] * steps,
            }
        )
    return rows


def as_parquet(folder: Path, name: str, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def as_lines(folder: Path, name: str, rows: list[dict], suffix: str = "jsonl") -> None:
    lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows]
    (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")


def as_csv(folder: Path, name: str, rows: list[dict]) -> None:
    def cell(value) -> str:
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"'

    header = ",".join(rows[0])
    lines = [",".join(map(cell, row.values())) for row in rows]
    (folder / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")


def as_saved(folder: Path, name: str, rows: list[dict]) -> None:
    """As `DatasetDict.save_to_disk` writes it, with a file of its cache beside."""
    split = folder / name
    split.mkdir()
    files = []
    for number, some in enumerate((rows[:9], rows[9:])):
        file = f"data-0000{number}-of-00002.arrow"
        table = pa.Table.from_pylist(some, schema=pa.Table.from_pylist(rows).schema)
        with pa.ipc.new_stream(split / file, table.schema) as writer:
            writer.write_table(table)
        files.append({"filename": file})
    (split / "cache-1234.arrow").write_bytes(b"no data")
    (split / "state.json").write_text(json.dumps({"_data_files": files, "_split": name}))
    (split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))


FORMATS = {"parquet": as_parquet, "jsonl": as_lines, "csv": as_csv, "saved": as_saved}
NAMES = {"train": "train", "val": "validation", "test": "test"}


def load(folder: Path, **settings) -> data.Dataset:
    raw = {"source": str(folder), "columns": COLUMNS, **settings}
    return data.load(DataRef.model_validate(raw))


def written(folder: Path, form: str) -> Path:
    folder.mkdir(parents=True)
    for split in SPLITS:
        FORMATS[form](folder, NAMES[split], rows_of(split))
    return folder


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, form):
    whole = load(written(tmp_path / "parquet" / "rows", "parquet"))
    other = load(written(tmp_path / "other" / "rows", form))
    assert (other.digest, other.name, other.classes) == (whole.digest, "rows", ("a", "b"))
    assert (other.splits["val"].label == UNLABELLED).sum() == 2


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_text_is_text_even_where_it_looks_like_a_date_or_a_number(tmp_path, form):
    columns = {"prompt": "prompt", "completion": "completion"}
    settings = {
        "tokenizer": str(texts.tokenizer(tmp_path)),
        "end": END,
        "window": STEPS,
        "columns": columns,
    }
    rows = [{"prompt": "2026-01-01", "completion": "17"}, {"prompt": "a", "completion": "2026"}]
    rows += [{"prompt": sentence(1, 3), "completion": 'says "no",\nand goes'}]
    digests = set()
    for name in ("parquet", form):
        folder = tmp_path / name
        folder.mkdir()
        for split in SPLITS:
            FORMATS[name](folder, split, rows)
        digests.add(load(folder, **settings).digest)
    assert len(digests) == 1


def test_a_class_in_csv_is_what_is_written(tmp_path):
    rows = [
        row | {"label": label} for row, label in zip(rows_of("val"), "01234567890123", strict=True)
    ]
    rows[0]["label"] = "00"
    for split in SPLITS:
        as_csv(tmp_path, split, rows)
    assert load(tmp_path).classes == ("0", "00", *"123456789")


def test_several_formats_need_patterns(tmp_path):
    as_lines(tmp_path, "train", rows_of("train"))
    as_csv(tmp_path, "val", rows_of("val"))
    as_lines(tmp_path, "held out", rows_of("test"), suffix="json")
    with pytest.raises(DataError, match=r"holds \*\.jsonl and \*\.csv; name the files that count"):
        load(tmp_path)
    splits = {"train": "train.jsonl", "val": "*.csv", "test": "held *.json"}
    found = load(tmp_path, splits=splits)
    assert [len(found.splits[split]) for split in SPLITS] == [14, 14, 14]
    for change, words in (
        ({"val": "*.tsv"}, r"data\.splits\.val = '\*\.tsv': no file below"),
        ({"val": "train*"}, r"train\.jsonl is of train and of val"),
    ):
        with pytest.raises(DataError, match=words):
            load(tmp_path, splits=splits | change)
    (tmp_path / "val.txt").write_text("")
    with pytest.raises(DataError, match=r"data\.splits\.val: val\.txt is none of \.arrow"):
        load(tmp_path, splits=splits | {"val": "val.txt"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", "[1, 2", r"train\.jsonl: not a readable file of JSON lines"),
        ("train.csv", "inputs,label\n1,2,3\n", r"train\.csv: not a readable CSV file"),
        (
            "train.csv",
            "inputs,label,split\n0.5 0.7,a,train\n",
            r"train\.csv: not a readable CSV file: row 0: inputs is '0\.5 0\.7'; write a list",
        ),
        ("train/state.json", "{}", r"train/state\.json: not the state of a saved data set"),
        (
            "train/state.json",
            '{"_data_files": [{"filename": "x.arrow"}]}',
            r"train/x\.arrow: train/state\.json names it, and it is missing",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, name, kind):
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("nothing")
    with pytest.raises(DataError, match=rf"{name}: not a file; delete it"):
        load(tmp_path)
    path.rename(tmp_path / "notes.txt")
    written(tmp_path / "rows", "jsonl")
    assert len(load(tmp_path).splits["val"]) == 14


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation-00000.parquet", "val"),
        ("Test.csv", "test"),
        ("dev/part 1.parquet", "val"),
        ("train/test_1.parquet", "test"),
        ("training1.parquet", "train"),
        ("trained.parquet", None),
        ("latest.parquet", None),
        ("a.parquet", None),
    ],
)
def test_the_split_of_a_name_is_its_first_word(name, split):
    assert layout.split_of_name(name) == split


@pytest.mark.parametrize(
    ("pattern", "fits", "others"),
    [
        ("train/*.parquet", ["train/a.parquet"], ["train/b/a.parquet", "a.parquet", "train/a.csv"]),
        ("**/*.parquet", ["a.parquet", "x/y/a.parquet"], ["x/a.csv"]),
        ("./a/**", ["a/b", "a/b/c"], ["b/a"]),
        ("a[12].csv", ["a1.csv"], ["a3.csv"]),
    ],
)
def test_a_star_stands_for_a_part_of_a_name_and_two_for_folders(pattern, fits, others):
    test = layout.pattern_test(pattern)
    assert all(map(test, fits))
    assert not any(map(test, others))


def test_rows_of_csv_name_the_run_wherever_they_lie(tmp_path):
    """A folder's digest is of Parquet alone."""
    recipes = []
    digests = []
    for number, labels in enumerate(("ab", "ab", "ac")):
        folder = tmp_path / str(number) / "rows"
        folder.mkdir(parents=True)
        for split in SPLITS:
            rows = rows_of(split)
            as_csv(folder, split, [row | {"label": labels[i % 2]} for i, row in enumerate(rows)])
        recipe = resolve({"technique": "none", "data": {"source": str(folder)}})
        recipes.append(recipe)
        digests.append(run_digest(recipe, data.load(recipe.data)))
    assert digests[0] == digests[1] != digests[2]
    assert [change.key for change in changes(recipes[0], recipes[2])] == ["data.source"]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"splits": {"train": "a"}}, "data.splits"),
        ({"steps": 8}, "data.steps"),
        ({"source": "./here", "tokenizer": __file__, "steps": 8}, "data.steps"),
    ],
)
def test_keys_that_say_nothing_of_the_data_are_refused(table, key):
    with pytest.raises(RecipeError, match=rf"{key}: .*; leave it out"):
        resolve({"technique": "none", "data": table})
