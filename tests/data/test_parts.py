"""Laws of Parquet in parts: its rows are those that are held in memory, from wherever they come,
and what cannot be read is named with its file.
"""

import errno
import io
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykd import data
from raykd.data import SPLITS, label_scan, parquet_parts, room, sources, tables
from raykd.data.file_rows import FileRows
from raykd.data.parquet_parts import ParquetParts
from raykd.data.rows import Rows
from raykd.data.table import PLACE_BITS, Held, read_split
from raykd.errors import DataError, InfraError
from raykd.files.data_files import open_files
from raykd.recipe.tables import DataRef
from raykd.targets import UNLABELLED

COLUMNS = {"group": "group", "valence": "valence"}
SIZES = {"train": 40, "val": 11, "test": 13}


def rows_of(split: str, count: int, *, ragged: bool = True) -> list[dict]:
    """Rows of 2 channels and 3 to 6 steps, some without a label, a group or valence."""
    rng = np.random.default_rng(len(split))
    rows = []
    for i in range(count):
        steps = 3 + (i * 7) % 4 if ragged else 4
        row = {
            "inputs": rng.normal(size=(steps, 2)).tolist(),
            "label": None if i % 7 == 6 else i % 12,
            "group": None if i % 9 == 8 else f"{split}-{i // 2}",
            "valence": None if i % 5 == 0 else rng.uniform(-1, 1, steps).tolist(),
        }
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict] | pa.Table, size: int = 5, **keywords) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=size, **keywords)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files by the hub's names, train in two."""
    for split, count in SIZES.items():
        rows = rows_of(split, count)
        name = {"val": "validation"}.get(split, split)
        half = len(rows) // 2 if split == "train" else len(rows)
        for number, some in enumerate(filter(None, (rows[:half], rows[half:]))):
            write(tmp_path / "rows" / f"{name}-0000{number}-of-00002.parquet", some)
    return tmp_path / "rows"


def parts_of(source: Path | str, **settings) -> ParquetParts:
    ref = DataRef.model_validate({"source": str(source), "columns": COLUMNS, **settings})
    return ParquetParts(FileRows(open_files(ref.source), ref))


def held(source: Path | str, **settings) -> data.Dataset:
    ref = DataRef.model_validate({"source": str(source), "columns": COLUMNS, **settings})
    return data.load(ref)


def assert_same(mine: Rows, theirs: Rows) -> None:
    """Equal but for ids, and for the numbers of groups."""
    for key in ("inputs", "mask", "label", "valence"):
        assert np.array_equal(getattr(mine, key), getattr(theirs, key), equal_nan=key == "valence")
    together = {(a, b) for a, b in zip(mine.group.tolist(), theirs.group.tolist(), strict=True)}
    assert len(together) == len(set(mine.group.tolist())) == len(set(theirs.group.tolist()))


@pytest.mark.parametrize("settings", [{}, {"limit": 9}, {"steps": 8}, {"classes": "told"}])
def test_rows_in_parts_are_the_rows_in_memory(folder, settings):
    if "classes" in settings:
        settings = {"classes": [str(i) for i in reversed(range(12))]}
    source = parts_of(folder, **settings)
    table = source.table()
    whole = held(folder, **settings)
    assert table.classes == whole.classes
    assert table.shape == whole.shape
    assert list(table.notes) == whole.cautions
    numbers = [part.number for part in table.parts]
    assert numbers == sorted(set(numbers))
    for split in SPLITS:
        rows = read_split(source, split)
        assert_same(rows, whole.splits[split])
        assert (np.diff(rows.row_id) > 0).all()
        parts = table.of(split)
        assert table.rows(split) == len(rows) == sum(part.rows for part in parts)
        assert sum(part.labelled for part in parts) == rows.labelled.sum()
        ids = [part.number << PLACE_BITS | place for part in parts for place in range(part.rows)]
        assert rows.row_id.tolist() == ids


def test_a_part_reads_nothing_but_its_bytes(folder, monkeypatch):
    """And what a source has found out goes along with it to other processes."""
    source = parts_of(folder)
    table = source.table()
    away = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(type(source.rows.files), "listed", None)
    read = []
    original = type(source.rows.files).read

    def counted(files, file, first, count):
        read.append(count)
        return original(files, file, first, count)

    monkeypatch.setattr(type(source.rows.files), "read", counted)
    assert away.table() == table
    for part in table.of("train"):
        away.read(part)
    files = [f for f in folder.iterdir() if f.name.startswith("train")]
    assert sum(read) <= sum(file.stat().st_size for file in files)


def test_hidden_labels_are_an_exact_share_of_every_class(folder):
    whole = read_split(parts_of(folder), "train")
    kept = {}
    for fraction in (0.2, 0.5, 0.9):
        source = parts_of(folder, label_fraction=fraction)
        rows = read_split(source, "train")
        for label in range(12):
            count = (whole.label == label).sum()
            assert (rows.label == label).sum() == -(-count * int(fraction * 10) // 10)
        assert ((rows.label == whole.label) | (rows.label == UNLABELLED)).all()
        assert sum(part.labelled for part in source.table().of("train")) == rows.labelled.sum()
        kept[fraction] = set(rows.row_id[rows.labelled].tolist())
        assert read_split(source, "val").labelled.sum() == 10
    assert kept[0.2] < kept[0.5] < kept[0.9]
    other = read_split(parts_of(folder, label_fraction=0.5, label_seed=1), "train")
    assert set(other.row_id[other.labelled].tolist()) != kept[0.5]


def test_rows_of_one_length_are_not_looked_through(tmp_path, monkeypatch):
    for split, count in SIZES.items():
        write(tmp_path / f"split={split}" / "a.parquet", rows_of(split, count, ragged=False))
    monkeypatch.setattr(ParquetParts, "_longest", None)
    assert parts_of(tmp_path).table().shape == {"channels": 2, "classes": 12, "steps": 4}
    assert_same(read_split(parts_of(tmp_path), "train"), held(tmp_path).splits["train"])


def test_a_row_longer_than_the_stated_steps_is_named(folder):
    source = parts_of(folder, steps=5)
    with pytest.raises(DataError, match=r"train-00000.*: row 1 has 6 steps, and a row at most 5"):
        read_split(source, "train")
    with pytest.raises(DataError, match=r"row \d+ has 6 steps, and a row at most 5"):
        held(folder, steps=5)


@pytest.mark.parametrize("how", ["patterns", "folders", "column"])
def test_splits_are_told_by_patterns_folders_or_a_column(tmp_path, how):
    settings = {}
    for split, count in SIZES.items():
        rows = rows_of(split, count)
        if how == "column":
            rows = [row | {"split": split} for row in rows]
            write(tmp_path / f"{split[::-1]}.parquet", rows)
        elif how == "folders":
            write(tmp_path / f"split={split}" / "a.parquet", rows)
        else:
            write(tmp_path / f"part-{split[:2]}" / "a" / "x.parquet", rows)
            settings = {
                "splits": {"train": "part-tr/**", "val": "*va/*/*.parquet", "test": "part-te/a/*"}
            }
    source = parts_of(tmp_path, **settings)
    assert {split: source.table().rows(split) for split in SPLITS} == SIZES
    for split in SPLITS:
        assert_same(read_split(source, split), held(tmp_path, **settings).splits[split])


def test_many_rows_are_read_in_parts_and_few_are_held(folder, monkeypatch):
    ref = DataRef.model_validate({"source": str(folder), "columns": COLUMNS})
    assert isinstance(sources.open_source(ref), Held)
    monkeypatch.setattr(tables, "MOST_ROWS", 63)
    assert isinstance(sources.open_source(ref), ParquetParts)
    assert isinstance(sources.open_source(ref, "rows"), Held)


def test_the_digest_is_of_names_contents_and_settings(folder):
    first = parts_of(folder).table().digest
    assert parts_of(folder).table().digest == first
    assert parts_of(folder, limit=20).table().digest != first
    assert parts_of(folder, max_unfit=0.01).table().digest == first
    path = folder / "test-00000-of-00002.parquet"
    write(path, rows_of("test", 12))
    assert parts_of(folder).table().digest != first
    path.rename(folder / "test-1.parquet")
    assert parts_of(folder).table().digest != first


def test_rows_that_no_memory_holds_are_refused_by_their_footers(folder, monkeypatch):
    monkeypatch.setattr(room, "memory_bytes", lambda: 1000)
    monkeypatch.setattr(tables, "block_of", None)
    with pytest.raises(DataError, match=r'rows: to read all .* set optim\.order = "blocks"'):
        held(folder)
    assert read_split(parts_of(folder), "val").labelled.any()


# what cannot be read in parts


def test_a_disk_that_is_full_while_labels_are_counted_is_told(folder, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(label_scan, "TemporaryFile", Full)
    with pytest.raises(InfraError, match=r"No space left on device, while labels.*TMPDIR"):
        parts_of(folder, label_fraction=0.5).table()
    assert parts_of(folder).table().rows("train") == SIZES["train"]


def test_a_row_group_that_is_too_large_is_refused_by_its_footer(folder, monkeypatch):
    monkeypatch.setattr(parquet_parts, "GROUP_BYTES", 200)
    words = r"test-00000.*: row group 0 holds 5 rows of 0 MiB.*row_group_size=1\)"
    with pytest.raises(DataError, match=words.replace("test-00000", r"\.parquet")):
        parts_of(folder).table()


def test_a_row_group_of_two_splits_is_refused_by_its_footer(tmp_path):
    rows = [row | {"split": split} for split in SPLITS for row in rows_of(split, 12)]
    write(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"a\.parquet, row group 2: its footer does not say"):
        parts_of(tmp_path).table()


def test_what_is_no_parquet_is_not_read_in_place(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"train\.jsonl: only Parquet is read in parts"):
        parts_of(tmp_path).table()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"inputs": [[math.nan, 1.0]], "valence": None},
            r"row group 1: NaN or infinite inputs in rows 7;",
        ),
        ({"inputs": []}, r"row 7 has shape \(0,\), without any step"),
        ({"inputs": None}, r"row 7 has shape \(\), without any step"),
        ({"inputs": [[1.0]]}, r"row 7 has shape \(1, 1\) and row 5 \(6, 2\)"),
        ({"inputs": [[1.0, None]]}, r"row 7: inputs must be .*: a value is null"),
        ({"valence": [0.5]}, r"row 7 has 1 valence values for 4 steps"),
        ({"label": 99, "classes": True}, r"labels \['99'\] are outside"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_row(folder, change, words):
    settings = {"steps": 6}
    if change.pop("classes", False):
        settings["classes"] = [str(i) for i in range(12)]
    path = folder / "train-00000-of-00002.parquet"
    rows = rows_of("train", SIZES["train"])[:20]
    rows[7] |= change
    write(path, rows)
    source = parts_of(folder, **settings)
    with pytest.raises(DataError, match=words) as caught:
        read_split(source, "train")
    assert caught.value.exit_code == 3
    assert "train-00000-of-00002.parquet" in str(caught.value) or "classes" in settings


def test_a_file_that_changes_or_vanishes_after_the_listing_is_named(folder):
    source = parts_of(folder)
    part = source.table().of("test")[0]
    path = folder / part.file
    content = path.read_bytes()
    source.read(part)
    write(path, rows_of("test", 12))
    with pytest.raises(DataError, match=r"test-00000-of-00002\.parquet was changed after"):
        source.read(part)
    path.unlink()
    with pytest.raises(DataError, match=r"test-00000-of-00002\.parquet vanished after"):
        source.read(part)
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"00002\.parquet: not a readable Parquet file"):
        parts_of(folder).table()


def test_a_flipped_bit_in_a_part_is_found(folder):
    path = folder / "test-00000-of-00002.parquet"
    write(path, rows_of("test", 13), write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00002\.parquet: not a readable Parquet file"):
        read_split(parts_of(folder), "test")


def test_two_files_of_different_schema_are_refused(folder):
    rows = [row | {"label": f"word {row['label']}"} for row in rows_of("test", 13)]
    write(folder / "test-00000-of-00002.parquet", rows)
    words = r"columns differ in type: those of train-00000-of-00002\.parquet"
    with pytest.raises(DataError, match=words):
        parts_of(folder).table()


def test_training_files_without_labels_are_unlabelled(folder):
    """The column may be missing there, but for a name that is nearly right."""
    rows = [
        {k: v for k, v in row.items() if k != "label"} for row in rows_of("train", SIZES["train"])
    ]
    for number in range(2):
        write(folder / f"train-0000{number}-of-00002.parquet", rows[number * 20 : number * 20 + 20])
    source = parts_of(folder)
    assert not read_split(source, "train").labelled.any()
    assert sum(part.labelled for part in source.table().of("train")) == 0
    assert not held(folder).splits["train"].labelled.any()
    near = [row | {"labels": 1} for row in rows[:20]]
    write(folder / "train-00000-of-00002.parquet", near)
    with pytest.raises(DataError, match=r"train-00000.*no column 'label'.*Did you mean labels\?"):
        parts_of(folder).table()
