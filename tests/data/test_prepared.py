"""Laws of prepared rows: they are those that are held in memory, whatever was killed meanwhile."""

import csv
import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import END, sentence, tokenizer

from raykd import data
from raykd.data import SPLITS, sources, tables
from raykd.data.parquet_parts import ParquetParts
from raykd.data.prepared import series_parts, text_parts, units, work
from raykd.data.prepared.parts import PreparedParts
from raykd.data.table import Held, read_split
from raykd.errors import DataError, InfraError, RecipeError, StoreError
from raykd.files import atomic
from raykd.orchestration.preparing import prepare_rows
from raykd.recipe.tables import DataRef
from raykd.stages import walk
from raykd.stages.load import resolve
from raykd.stages.run_folder import RunFolder
from raykd.targets import UNLABELLED

WINDOW = 24
SIZES = (
    (text_parts, "PART_TOKENS", 200),
    (series_parts, "PART_BYTES", 600),
    (units, "UNIT_BYTES", 3000),
    (units, "LINE_BYTES", 64),
    (units, "BATCH_BYTES", 500),
    (work, "FUNCTION_BYTES", 2000),
)
OF_SERIES = {"group": "group", "valence": "valence"}


def prepared(home: Path, ref: DataRef, **settings) -> PreparedParts:
    """The source of rows that are prepared now."""
    ref = ref.model_copy(update=settings)
    source = sources.open_source(ref, "blocks", home)
    assert isinstance(source, PreparedParts)
    prepare_rows(source.work)
    return source


def assert_same(source: PreparedParts, held: data.Dataset) -> None:
    """Equal but for ids, and for the numbers of groups."""
    table = source.table()
    assert (table.classes, table.shape, table.labels) == (held.classes, held.shape, held.labels)
    assert len(table.cautions) == len(held.cautions)
    assert [(one.why) for one in table.unfit] == [one.why for one in held.unfit]
    for split in SPLITS:
        mine = read_split(source, split)
        theirs = held.splits[split]
        for key in ("inputs", "mask", "label"):
            np.testing.assert_array_equal(getattr(mine, key), getattr(theirs, key), strict=True)
        assert (mine.valence is None) == (theirs.valence is None)
        if mine.valence is not None:
            np.testing.assert_array_equal(mine.valence, theirs.valence, strict=True)
        together = set(zip(mine.group.tolist(), theirs.group.tolist(), strict=True))
        assert len(together) == len(set(mine.group.tolist())) == len(set(theirs.group.tolist()))
        assert (np.diff(mine.row_id) > 0).all()
        assert sum(part.labelled for part in table.of(split)) == mine.labelled.sum()


# texts


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokens"))


def records(*, prompts: bool) -> list[dict[str, Any]]:
    """Texts of 0 to 200 words, some in groups; or prompts and completions, one of them empty."""
    rows = []
    for i in range(120):
        row: dict[str, Any] = {
            "split": {5: "val", 6: "test"}.get(i % 7, "train"),
            "group": None if i % 3 == 0 else i // 4,
        }
        if prompts:
            row["prompt"] = sentence(i, 1 + i % 4)
            row["completion"] = "" if i == 50 else sentence(i + 1000, 1 + i % 13)
        else:
            row["text"] = sentence(i, (i * 37) % 200 if i % 10 else i // 10)
        rows.append(row)
    return rows


def ref_of(folder: Path, tokens: Path, *, prompts: bool, **settings) -> DataRef:
    columns: dict[str, Any] = {"group": "group"}
    if prompts:
        columns |= {"prompt": "prompt", "completion": "completion"}
    raw = {"source": str(folder), "tokenizer": str(tokens), "end": END, "window": WINDOW}
    return DataRef.model_validate(raw | {"columns": columns} | settings)


def write_lines(folder: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def small(monkeypatch) -> None:
    """Parts and units of a few rows."""
    for module, name, value in SIZES:
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("settings", [{}, {"limit": 7}])
def test_texts_are_the_rows_in_memory(small, tokens, tmp_path, prompts, settings):
    ref = ref_of(write_lines(tmp_path / "rows", records(prompts=prompts)), tokens, prompts=prompts)
    ref = ref.model_copy(update=settings)
    source = prepared(tmp_path / "home", ref)
    assert len(source.work.units) > 3
    assert len(source.table().of("train")) > 3
    assert_same(source, data.load(ref))


def test_hidden_labels_are_an_exact_share_of_the_rows(small, tokens, tmp_path):
    ref = ref_of(write_lines(tmp_path / "rows", records(prompts=True)), tokens, prompts=True)
    kept = {}
    for fraction in (0.3, 0.6):
        table = (source := prepared(tmp_path / "home", ref, label_fraction=fraction)).table()
        rows = read_split(source, "train")
        assert rows.labelled.sum() == -(-len(rows) * int(fraction * 10) // 10)
        assert table.labels == (rows.label != UNLABELLED).sum()
        assert table.labelled("train") == rows.labelled.sum()
        kept[fraction] = set(rows.row_id[rows.labelled].tolist())
        assert read_split(source, "test").labelled.all()
    assert kept[0.3] < kept[0.6]
    [_] = (tmp_path / "home").iterdir()  # neither share prepares anew


def test_tokens_take_two_bytes_or_four(small, tokens, tmp_path, monkeypatch):
    rows = [{"split": split, "text": sentence(i, 50)} for i, split in enumerate(SPLITS * 9)]
    ref = ref_of(write_lines(tmp_path / "rows", rows), tokens, prompts=False)
    ref = ref.model_copy(update={"columns": ref.columns.model_copy(update={"group": None})})
    for most, kind in ((text_parts.SMALL, pa.uint16()), (9, pa.uint32())):
        monkeypatch.setattr(text_parts, "SMALL", most)
        source = prepared(tmp_path / str(most), ref)
        part = source.table().parts[0]
        table = pq.read_table(source.work.folder.address / part.file)
        assert table.schema.field("tokens").type == pa.list_(kind)
        assert_same(source, data.load(ref))


# series


def series(count: int = 150) -> list[dict[str, Any]]:
    """Rows of 1 to 5 steps of 2 channels in all splits, some without label, group or valence."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        steps = 1 + (i * 7) % 5
        row = {
            "inputs": rng.normal(size=(steps, 2)).astype(np.float32).tolist(),
            "label": None if i % 11 == 10 else i % 12,
            "split": {5: "val", 6: "test"}.get(i % 7, "train"),
            "group": None if i % 9 == 8 else f"g{i // 3}",
            "valence": None if i % 4 == 0 else rng.uniform(-1, 1, steps).round(3).tolist(),
        }
        rows.append(row)
    rows[100]["inputs"] = []
    rows[100]["valence"] = None
    return rows


def write_series(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        return write_lines(folder, rows)
    if kind == "parquet":  # of all splits in each row group
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=40)
        return folder
    for number in range(2):
        with (folder / f"{number}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            for row in rows[number * 70 : 70 if number == 0 else None]:
                told = {k: "" if v is None else v for k, v in row.items()}
                writer.writerow(
                    {
                        k: json.dumps(v) if k in ("inputs", "valence") and v != "" else v
                        for k, v in told.items()
                    }
                )
    return folder


def series_ref(source: Path | str, **settings) -> DataRef:
    return DataRef.model_validate({"source": str(source), "columns": OF_SERIES} | settings)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("settings", [{}, {"limit": 9, "steps": 8}])
def test_series_are_the_rows_in_memory(small, tmp_path, kind, settings):
    ref = series_ref(write_series(tmp_path / "rows", kind, series()), **settings)
    source = prepared(tmp_path / "home", ref)
    assert len(source.table().of("train")) > 3
    held = data.load(ref)
    assert_same(source, held)
    assert [one.place for one in source.table().unfit] != [""]
    with pytest.raises(DataError, match=r"teach nothing, and data\.max_unfit = 0"):
        prepared(tmp_path / "home", ref, max_unfit=0.0).table()


def test_a_folder_and_a_function_give_one_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = series()
    (tmp_path / "given_series.py").write_text(
        f"def rows():\n    nan = float('nan')\n    yield from {rows!r}\n"
    )
    ref = series_ref(write_series(tmp_path / "rows", "jsonl", rows))
    there = series_ref("given_series:rows")
    found = [prepared(tmp_path / "home", one).table() for one in (ref, there)]
    assert found[0].digest == found[1].digest
    assert_same(prepared(tmp_path / "home", there), data.load(there))


# what is killed, damaged or changed


def contents(home: Path) -> dict[str, bytes]:
    """Every file below a folder but what its time is."""
    return {
        path.relative_to(home).as_posix(): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file()
    }


CHILD = """
import os
import random
import signal
import sys
import threading
from pathlib import Path

from raykd.data.prepared import series_parts, text_parts, units, work
from raykd.recipe.tables import DataRef

for told in sys.argv[1].split():
    module, name, value = told.split(":")
    setattr(globals()[module], name, int(value))


def do(source, fault):
    home, ref = source
    os.environ["RAYKD_FAULT"] = fault
    os.environ["RAYKD_FAULT_FIRED"] = f"{home}-{fault}".replace("/", "_")
    if not fault:
        dies = (os.getpid(), signal.SIGKILL)
        threading.Timer(random.uniform(0, 0.3), os.kill, dies).start()
    asked = work.Work(DataRef.model_validate_json(ref), Path(home))
    asked.folder.begin()
    for unit in asked.missing():
        asked.do(unit)
    if asked.files is None:
        asked.do_function(lambda rows: None)
    asked.finish()


for source in zip(sys.argv[2:6:2], sys.argv[3:6:2]):
    for fault in sys.argv[6:]:
        child = os.fork()
        if not child:
            do(source, fault)
            os._exit(0)
        print(fault, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
KILLS = [  # each ends a process, and the next one goes on
    "prepare:unit=0,part=0,at=before_write",
    "prepare:unit=1,part=0,at=written",
    "file:folder=data,at=staged",
    "file:folder=_commits,at=linked",
    "prepare:unit=3,at=after_commit",
    "prepare:at=before_manifest",
    "file:name=_MANIFEST.json,at=linked",
]


def test_killed_processes_cost_time_alone(small, tokens, tmp_path, monkeypatch):
    """At each point, and at a random moment, of a folder of texts and of a function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "killed_series.py").write_text(f"def rows():\n    yield from {series()!r}\n")
    folder = write_lines(tmp_path / "rows", records(prompts=False))
    refs = {
        "texts": ref_of(folder, tokens, prompts=False),
        "series": series_ref("killed_series:rows"),
    }
    sizes = " ".join(f"{module.__name__.split('.')[-1]}:{name}:{n}" for module, name, n in SIZES)
    told = [word for name, ref in refs.items() for word in (name, ref.model_dump_json())]
    child = [sys.executable, "-c", CHILD, sizes, *told, *KILLS, ""]
    done = subprocess.run(child, cwd=tmp_path, capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.strip() not in ("0", "-9")]
    assert codes == [f"{fault} -9" for fault in KILLS] * 2, done.stderr
    for name, ref in refs.items():
        prepared(tmp_path / name, ref)
        prepared(tmp_path / f"undisturbed-{name}", ref)
        mine = contents(tmp_path / name)
        whole = {n: content for n, content in mine.items() if not n.endswith(".tmp")}
        assert whole == contents(tmp_path / f"undisturbed-{name}")


def test_a_part_that_was_cut_or_changed_is_named_and_prepared_again(small, tokens, tmp_path):
    ref = ref_of(write_lines(tmp_path / "rows", records(prompts=False)), tokens, prompts=False)
    source = prepared(tmp_path / "home", ref)
    whole = contents(tmp_path / "home")
    part = source.table().of("val")[0]
    path = source.work.folder.address / part.file
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    fresh = PreparedParts(source.work)
    with pytest.raises(StoreError, match=rf"{path.name} is damaged.*delete it, then give the same"):
        read_split(fresh, "val")
    path.unlink()
    with pytest.raises(StoreError, match=rf"{path.name} is missing"):
        source.read(part)
    assert not PreparedParts(source.work).is_ready
    prepared(tmp_path / "home", ref)
    assert contents(tmp_path / "home") == whole
    path.write_bytes(flipped[:-9])
    prepared(tmp_path / "home", ref)
    assert contents(tmp_path / "home") == whole


def test_a_source_that_changes_while_it_is_prepared_is_named(small, tokens, tmp_path):
    folder = write_lines(tmp_path / "rows", records(prompts=False))
    write_lines(folder, records(prompts=False), "b.jsonl")
    ref = ref_of(folder, tokens, prompts=False)
    source = sources.open_source(ref, "blocks", tmp_path / "home")
    assert isinstance(source, PreparedParts)
    work = source.work
    work.folder.begin()
    work.do(work.units[0])
    write_lines(folder, records(prompts=False)[:-1], "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl was changed after it was listed") as caught:
        prepare_rows(work)
    assert caught.value.exit_code == 3
    assert not source.is_ready
    with pytest.raises(DataError, match=r"not prepared yet.*type: raykd score RECIPE"):
        source.table()
    later = prepared(tmp_path / "home", ref)  # what it is now
    assert later.work.folder.address != work.folder.address
    assert_same(later, data.load(ref))


def test_a_full_disk_leaves_nothing_that_is_trusted(small, tokens, tmp_path, monkeypatch):
    ref = ref_of(write_lines(tmp_path / "rows", records(prompts=False)), tokens, prompts=False)
    real = atomic.os.fsync
    calls = iter(range(1000))

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and next(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(InfraError, match=r"No space left.*free that disk and give the same comm"):
        prepared(tmp_path / "home", ref)
    monkeypatch.setattr(atomic.os, "fsync", real)
    assert not list((tmp_path / "home").rglob("*.tmp"))
    assert_same(prepared(tmp_path / "home", ref), data.load(ref))


@pytest.mark.parametrize("change", ["fewer", "others"])
def test_a_function_that_gives_other_rows_is_refused(small, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    rows = series()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    name = f"changed_{change}"
    (tmp_path / f"{name}.py").write_text(
        "import json, pathlib\ndef rows():\n"
        "    yield from json.loads(pathlib.Path('rows.json').read_text())\n"
    )
    ref = series_ref(f"{name}:rows")
    source = prepared(tmp_path / "home", ref)
    (source.work.folder.address / "_MANIFEST.json").unlink()
    rows = rows[:20] if change == "fewer" else [row | {"label": 0} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"gives other rows than when they began to be prepared"):
        prepared(tmp_path / "home", ref)


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("label", [1, "one"], r"each row's label is of type number here and text there"),
        ("group", [1, "one"], r"each row's group is of type int here and str there"),
        ("inputs", [[[0.0, 1.0]], [[0.0]]], r"steps of 1 channels and others of 2"),
    ],
)
def test_pieces_of_a_file_that_differ_in_type_are_refused(small, tmp_path, key, values, words):
    rows = [row | {"valence": None} for row in series()]
    for value, name in zip(values, ("a.jsonl", "b.jsonl"), strict=True):
        write_lines(tmp_path / "rows", [row | {key: value} for row in rows], name)
    ref = series_ref(tmp_path / "rows")
    with pytest.raises(DataError, match=words):
        prepared(tmp_path / "home", ref)


def test_prepared_rows_never_lie_among_the_rows_that_are_read(tokens, tmp_path):
    write_lines(tmp_path / "rows", records(prompts=False))
    raw = ref_of(tmp_path / "rows", tokens, prompts=False).model_dump(exclude_none=True)
    recipe = resolve({"technique": "none", "data": raw, "optim": {"order": "blocks"}})
    with pytest.raises(RecipeError, match=r"--out: .*rows lies below data\.source .*rows"):
        assert RunFolder(recipe, tmp_path).source


def test_a_student_that_no_text_fits_is_refused_before_the_rows_are_prepared(tokens, tmp_path):
    write_lines(tmp_path / "rows", records(prompts=False))
    raw = ref_of(tmp_path / "rows", tokens, prompts=False).model_dump(exclude_none=True)
    student = {"model": "llama", "settings": {"width": 9, "heads": 2}}
    recipe = resolve(
        {"technique": "none", "data": raw, "student": student, "optim": {"order": "blocks"}}
    )
    with pytest.raises(RecipeError, match=r"student"):
        walk.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "rows").exists()


def test_many_rows_are_prepared_and_few_are_held(tokens, tmp_path, monkeypatch):
    """Of texts, lines and functions; Parquet of parts stays where it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many_series.py").write_text(f"def rows():\n    return {series()!r}\n")
    mixed = write_series(tmp_path / "mixed", "parquet", series())
    refs = [
        ref_of(write_lines(tmp_path / "rows", records(prompts=False)), tokens, prompts=False),
        series_ref(write_series(tmp_path / "lines", "jsonl", series())),
        series_ref(mixed),
        series_ref("many_series:rows"),
    ]
    home = tmp_path / "home"
    for ref in refs:
        assert isinstance(sources.open_source(ref, "auto", home), Held)
    monkeypatch.setattr(tables, "MOST_BYTES", 1000)
    monkeypatch.setattr(tables, "MOST_ROWS", 99)
    for ref in refs:
        assert isinstance(sources.open_source(ref, "auto", home), PreparedParts)
        assert isinstance(sources.open_source(ref, "rows", home), Held)
        with pytest.raises(
            DataError, match=r"has to be prepared.*open_source\(\.\.\., home=\.\.\."
        ):
            sources.open_source(ref, "blocks")
    for split in SPLITS:
        rows = [row for row in series() if row["split"] == split]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixed" / f"{split}.parquet")
    (mixed / "a.parquet").unlink()
    assert isinstance(sources.open_source(series_ref(mixed), "auto", home), ParquetParts)
    assert not home.exists()
    with pytest.raises(DataError, match=r"watch_gestures is small and in memory; leave it out"):
        sources.open_source(DataRef(), "blocks", home)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("split", None, "split"),
        ("inputs", [[1.0, float("nan")]], "NaN or infinite inputs in row 0"),
    ],
)
def test_what_is_foretold_refuses_what_preparing_would(tmp_path, monkeypatch, key, value, words):
    """A check said that such rows would be prepared, and the command refused them."""
    rows = [{"inputs": [[1.0, 2.0]], "label": "a", "split": "train"}]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"foretold_{key}.py").write_text(
        f"from math import nan\n\ndef rows():\n    yield {rows[0] | {key: value}!r}\n"
    )
    monkeypatch.chdir(tmp_path)
    asked = work.Work(DataRef(source=f"foretold_{key}:rows"), tmp_path / "home")
    with pytest.raises(DataError, match=words):
        asked.estimate()
    assert not (tmp_path / "home").exists()
