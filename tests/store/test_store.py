"""Laws of the teacher store: each row once, the same bytes however it was made, and no damage taken
for truth.

The references are equality with the arrays that went in, and of manifests, byte for byte, between
stores made in different orders, processes and after different deaths. Ray only schedules shards, so
none is needed here.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from child import CONTEXT, start, wait
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from shards import IDENTITY, ROWS, SHARDS, fill, flip, manifest_of, race, read_all, table_of

from raykd import data, models
from raykd.errors import StoreError
from raykd.files.atomic import read_json
from raykd.files.folder import Folder
from raykd.losses.terms import needs_of
from raykd.models.adapter import Adapter
from raykd.stages.load import resolve
from raykd.store import columns
from raykd.store.commit import StoreWriter, plan_shards, store_id
from raykd.store.reader import Store
from raykd.targets import UNLABELLED
from raykd.teacher.identity import store_identity
from raykd.training.device_rows import to_device


@st.composite
def masked_values(draw):
    """(values (N, T, ...) float16, mask (N, T))."""
    mask = draw(hnp.arrays(bool, draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=5))))
    step = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=4))
    return draw(hnp.arrays(np.float16, (*mask.shape, *step), elements=st.floats(width=16))), mask


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


@settings(deadline=None)
@given(masked_values(), st.integers(0, 5))
def test_what_is_encoded_is_decoded_bit_for_bit(drawn, cut):
    values, mask = drawn
    column = columns.field("x", values, "steps")
    table = pa.table([columns.encode(values, mask)], schema=pa.schema([column]))
    shape = list(values.shape[2:])
    steps = mask.sum(1).astype(np.int32)
    for made in (
        table,
        through_parquet(table),
        pa.concat_tables([table.slice(0, cut), table.slice(cut)]),
    ):
        assert bits(columns.decode(made.column("x"), shape, steps)) == bits(values[mask])


def through_parquet(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


@settings(deadline=None)
@given(masked_values())
def test_a_stored_value_is_read_by_numpy_alone(drawn):
    values, mask = drawn
    for row, value in enumerate(columns.encode(values, mask).to_pylist()):
        assert bits(np.frombuffer(value, "<f2").reshape(-1, *values.shape[2:])) == bits(
            values[row][mask[row]]
        )


def test_a_column_of_another_length_is_refused():
    values = np.ones((2, 3, 4), np.float32)
    mask = np.ones((2, 3), bool)
    column = pa.chunked_array([columns.encode(values, mask)])
    with pytest.raises(StoreError, match="48 bytes where 5 steps of 8 bytes"):
        columns.decode(column, [4], np.array([3, 2], np.int32))


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["train", "val", "test"]), st.integers(0, 40)),
    st.integers(1, 50),
)
def test_shards_cover_every_row_once_and_none_spans_two_splits(rows, size):
    shards = plan_shards(rows, size)
    covered = [(s.split, i) for s in shards for i in range(s.first, s.last)]
    assert covered == [(split, i) for split, count in rows.items() for i in range(count)]
    assert [s.number for s in shards] == list(range(len(shards)))
    assert all(0 < s.last - s.first <= size for s in shards)


@given(
    st.dictionaries(st.sampled_from(["train", "val", "test"]), st.lists(st.integers(0, 40))),
    st.integers(1, 50),
)
def test_no_shard_spans_two_parts(parts, size):
    shards = plan_shards(parts, size)
    covered = [(s.split, i) for s in shards for i in range(s.first, s.last)]
    assert covered == [(split, i) for split, counts in parts.items() for i in range(sum(counts))]
    edges = {split: {0, *np.cumsum(counts).tolist()} for split, counts in parts.items()}
    for shard in shards:
        assert not edges[shard.split] & set(range(shard.first + 1, shard.last))


def test_what_is_not_scored_yet_is_found_by_listing_alone(tmp_path, monkeypatch):
    """A new store of many shards asks a bucket for none of their records."""
    writer = StoreWriter(tmp_path / "store", {"data": {}})
    shards = plan_shards({"train": 1000}, 1)
    asked: list[str] = []
    monkeypatch.setattr(Folder, "get", lambda place, name, **_: asked.append(name))
    assert writer.missing(shards) == shards
    assert writer.quarantined(shards) == {}
    assert asked == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished store that no test may change."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    fill(folder)
    return folder


@pytest.fixture
def store(whole, tmp_path) -> Path:
    """A finished store of the test's own."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "data").iterdir())


def test_a_store_gives_back_every_row_in_order(whole):
    for split, table in zip(ROWS, read_all(whole), strict=True):
        expected = pa.concat_tables([table_of(s) for s in SHARDS if s.split == split])
        assert table.equals(expected)
        assert Store(whole).row_id(split).tolist() == list(range(ROWS[split]))


def test_the_order_of_commits_leaves_no_trace(whole, tmp_path):
    fill(tmp_path / "store", backwards=True)
    assert manifest_of(tmp_path / "store") == manifest_of(whole)


def test_resuming_scores_only_what_is_missing(whole, tmp_path):
    writer = StoreWriter(tmp_path / "store", IDENTITY)
    assert writer.missing(SHARDS) == SHARDS
    for shard in SHARDS[::2]:
        writer.commit(shard, table_of(shard))
    kept = {path: path.stat().st_mtime_ns for path in parts(tmp_path / "store")}
    assert StoreWriter(tmp_path / "store", IDENTITY).missing(SHARDS) == SHARDS[1::2]
    fill(tmp_path / "store")
    assert manifest_of(tmp_path / "store") == manifest_of(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_finished_store_is_finished_again_without_a_change(store):
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    assert StoreWriter(store, IDENTITY).missing(SHARDS) == []
    fill(store)
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before


def test_a_shard_is_committed_once(store):
    writer = StoreWriter(store, IDENTITY)
    standing = read_json(store / "_commits" / "00000.json")
    assert writer.commit(SHARDS[0], table_of(SHARDS[0], salt=1)) == standing
    assert read_json(store / "_commits" / "00000.json") == standing


def test_other_statistics_do_not_pass_for_the_same_store(store):
    with pytest.raises(StoreError, match="differs from its manifest"):
        StoreWriter(store, IDENTITY).finish(SHARDS, {"rows": {}})


def test_the_folder_of_another_recipe_is_refused(store):
    with pytest.raises(StoreError, match="another recipe"):
        StoreWriter(store, {"teacher": "another"})


def test_an_incomplete_store_is_refused_and_names_its_missing_shards(store):
    (store / "_MANIFEST.json").unlink()
    with pytest.raises(StoreError, match="no manifest"):
        Store(store)
    for number in (2, 5):
        (store / "_commits" / f"{number:05d}.json").unlink()
    with pytest.raises(StoreError, match=r"shards \[2, 5\] are not scored"):
        StoreWriter(store, IDENTITY).finish(SHARDS, {"rows": ROWS})
    assert not (store / "_MANIFEST.json").exists()


def test_a_deleted_shard_is_named_and_alone_scored_again(store, whole):
    lost = parts(store)[3]
    lost.unlink()
    with pytest.raises(StoreError, match=rf"{lost.name} is missing"):
        read_all(store)
    assert StoreWriter(store, IDENTITY).missing(SHARDS) == [SHARDS[3]]
    fill(store)
    assert [t.num_rows for t in read_all(store)] == list(ROWS.values())
    assert manifest_of(store) == manifest_of(whole)


def test_a_signal_that_is_not_stored_is_refused_with_those_that_are(whole):
    with pytest.raises(StoreError, match=r"no 'hidden\.norm'; it has row_id, steps, logits"):
        Store(whole).column("hidden.norm", "train")


def test_steps_that_do_not_fit_the_data_are_refused(whole):
    column = Store(whole).column("logits", "train")
    mask = np.arange(6) < column.steps[:, None]
    assert np.array_equal(column.padded(mask)[mask], column.values)
    with pytest.raises(StoreError, match="other rows"):
        column.padded(mask[::-1])


def flips(paths: list[Path], count: int, seed: int) -> list[tuple[Path, int, int]]:
    """(file, byte, bit): the first and last eight bytes of every file, then random places over all
    of them.
    """
    draw = np.random.default_rng(seed)
    sizes = np.array([p.stat().st_size for p in paths])
    edges = [(i, k % int(sizes[i])) for i in range(len(paths)) for k in range(-8, 8)]
    while len(edges) < count:
        file = int(draw.choice(len(paths), p=sizes / sizes.sum()))
        edges.append((file, int(draw.integers(sizes[file]))))
    return [(paths[file], byte, int(draw.integers(8))) for file, byte in edges]


def test_a_flipped_bit_in_a_shard_is_never_accepted(store):
    places = flips(parts(store), 300, seed=0)
    assert len(places) >= 300
    for path, byte, bit in places:
        flip(path, byte, bit)
        with pytest.raises(StoreError, match=f"{path.name} is damaged"):
            read_all(store)
        flip(path, byte, bit)
    assert [t.num_rows for t in read_all(store)] == list(ROWS.values())


def test_a_damaged_shard_alone_is_scored_again(store, whole):
    for path, byte, bit in flips(parts(store), 100, seed=1)[::33]:
        flip(path, byte, bit)
        number = int(path.name.split("-")[1])
        assert StoreWriter(store, IDENTITY).missing(SHARDS) == [SHARDS[number]]
        fill(store)
        assert [t.num_rows for t in read_all(store)] == list(ROWS.values())
        assert manifest_of(store) == manifest_of(whole)


def accepted(folder: Path) -> dict[str, Any] | None:
    try:
        return Store(folder).manifest
    except StoreError:
        return None


def test_a_flipped_bit_in_the_manifest_is_never_accepted(store):
    for path, byte, bit in flips([store / "_MANIFEST.json"], 300, seed=2):
        flip(path, byte, bit)
        assert accepted(store) is None
        flip(path, byte, bit)
    assert accepted(store)


def test_a_flipped_bit_in_a_commit_record_costs_that_shard_alone(store, whole):
    (store / "_MANIFEST.json").unlink()
    writer = StoreWriter(store, IDENTITY)
    records = sorted((store / "_commits").iterdir())
    for path, byte, bit in flips(records, 300, seed=3):
        before = path.read_bytes()
        flip(path, byte, bit)
        writer.missing(SHARDS)
        assert not path.exists()
        assert sum(p.exists() for p in records) == len(SHARDS) - 1
        part = json.loads(before)["file"]
        assert not (store / part).exists()
        path.write_bytes(before)
        shutil.copy(whole / part, store / part)
    flip(records[2], 9, 0)
    assert writer.missing(SHARDS) == [SHARDS[2]]
    fill(store)
    assert manifest_of(store) == manifest_of(whole)


def test_a_flipped_bit_in_the_stores_identity_is_never_accepted(store):
    path = store / "_RECIPE.json"
    for byte in range(path.stat().st_size):
        flip(path, byte, 0)
        with pytest.raises(StoreError):
            StoreWriter(store, IDENTITY)
        flip(path, byte, 0)


@pytest.mark.parametrize("at", ["before_write", "before_commit"])
@pytest.mark.parametrize("shard", [0, len(SHARDS) - 1])
def test_a_scorer_killed_at_any_point_loses_nothing(at, shard, whole, tmp_path):
    fault = {
        "RAYKD_FAULT": f"score:shard={shard},at={at}",
        "RAYKD_FAULT_FIRED": str(tmp_path / "fired"),
    }
    folder = tmp_path / "store"
    assert wait([start(fill, folder, **fault)]) == [-signal.SIGKILL]
    assert (tmp_path / "fired").exists()
    with pytest.raises(StoreError, match="no manifest"):
        Store(folder)
    assert StoreWriter(folder, IDENTITY).missing(SHARDS) == SHARDS[shard:]
    assert wait([start(fill, folder, **fault)]) == [0]
    assert manifest_of(folder) == manifest_of(whole)
    assert [t.num_rows for t in read_all(folder)] == list(ROWS.values())


def test_two_processes_that_race_end_with_one_commit_a_shard(tmp_path):
    gate = CONTEXT.Barrier(2)
    told = [tmp_path / "a.json", tmp_path / "b.json"]
    assert wait([start(race, tmp_path / "store", salt, gate, told[salt]) for salt in (0, 1)]) == [
        0,
        0,
    ]
    first, second = (json.loads(path.read_text()) for path in told)
    assert first == second == Store(tmp_path / "store").manifest["shards"]
    assert [r["number"] for r in first] == list(range(len(SHARDS)))
    assert len(list((tmp_path / "store" / "_commits").iterdir())) == len(SHARDS)
    for split, table in zip(ROWS, read_all(tmp_path / "store"), strict=True):
        assert table.num_rows == ROWS[split]


def test_two_processes_that_race_on_the_same_rows_leave_no_trace(whole, tmp_path):
    gate = CONTEXT.Barrier(2)
    assert wait(
        [start(race, tmp_path / "store", 0, gate, tmp_path / name) for name in ("a", "b")]
    ) == [0, 0]
    assert manifest_of(tmp_path / "store") == manifest_of(whole)
    assert sorted(
        p.relative_to(tmp_path / "store") for p in (tmp_path / "store").rglob("*")
    ) == sorted(p.relative_to(whole) for p in whole.rglob("*"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict[str, Any]:
    """A recipe whose teacher is a tiny encoder with random weights."""
    return {
        "technique": "vanilla",
        "teacher": by_hand.teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors"),
        "data": {"stride": 256, "label_fraction": 0.5},
        "store": {"rows_per_shard": 100, "batch": 64},
        "scale": {"device": "cpu"},
    }


def test_two_scorings_in_other_folders_orders_and_processes_are_one_manifest(raw, tmp_path):
    found = resolve(raw)
    other = start(by_hand.score_backwards, found, tmp_path / "there")
    here = by_hand.score(found, tmp_path / "here")
    assert wait([other]) == [0]
    assert manifest_of(tmp_path / "there" / here.name) == manifest_of(here)
    assert Store(here).manifest["store_id"] == here.name


def test_what_is_read_is_what_the_teacher_said(raw, tmp_path):
    found = resolve(raw)
    store = Store(by_hand.score(found, tmp_path))
    dataset = data.load(found.data)
    module = models.build_model(found.teacher, **dataset.shape, key="teacher").eval()
    for split, rows in dataset.splits.items():
        read = to_device(
            rows, split, store, needs_of(found.terms) | {"trajectory"}, torch.device("cpu")
        )
        index = torch.tensor([len(rows) - 1, 0, 5])
        batch = read.batch(index)
        with torch.no_grad():
            said = Adapter(module)(batch.inputs, batch.mask)
        assert torch.equal(batch.row_id, torch.from_numpy(rows.row_id)[index])
        assert torch.equal(batch.teacher.mask, said.mask)
        # half a unit in the last place of fp16 is 2^-11 relative; batches of other sizes differ by
        # fp32 rounding
        torch.testing.assert_close(
            batch.teacher.logits.float(), said.logits, rtol=2**-10, atol=1e-5
        )
        torch.testing.assert_close(
            batch.teacher.valence.float(), said.valence, rtol=2**-10, atol=1e-5
        )


def test_the_stored_signals_do_not_know_a_hidden_label(raw):
    """Training rows whose labels are hidden are stored alike, whatever the labels were."""
    scorer, dataset = by_hand.scorer_of(resolve(raw))
    rows = dataset.splits["train"]
    hidden = np.flatnonzero(rows.label == UNLABELLED)
    assert 0 < len(hidden) < len(rows)
    before = scorer.table(rows)
    full = (
        data.load(scorer.recipe.data.model_copy(update={"label_fraction": 1.0}))
        .splits["train"]
        .label
    )
    rows.label[:] = np.where(np.isin(np.arange(len(rows)), hidden), rows.label, (full + 1) % 7)
    after = scorer.table(rows)
    for name in before.column_names:
        assert before.column(name).take(hidden).equals(after.column(name).take(hidden))
    assert not before.column("valence").equals(after.column("valence"))


def id_of(raw: dict[str, Any]) -> str:
    found = resolve(raw)
    return store_id(store_identity(found, data.load(found.data)))


def with_(raw: dict[str, Any], table: str, **values: Any) -> dict[str, Any]:
    return raw | {table: raw.get(table, {}) | values}


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("teacher", {"settings": {**by_hand.SETTINGS, "heads": 4}}),
        ("data", {"stride": 200}),
        ("data", {"split": "subject"}),
        ("data", {"label_fraction": 0.4}),
        ("data", {"label_seed": 1}),
        ("valence", {"discount": 0.9}),
        ("valence", {"min": 0.3}),
        ("store", {"batch": 32}),
        ("store", {"rows_per_shard": 50}),
        ("store", {"codec": "comb"}),
    ],
    ids=str,
)
def test_whatever_decides_the_content_changes_the_id(raw, table, values):
    assert id_of(with_(raw, table, **values)) != id_of(raw)


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("scale", {"workers": 3, "scorers": [1, 4], "retries": 0}),
        ("track", {"uri": "sqlite:///elsewhere.db", "experiment": "another"}),
        ("optim", {"steps": 7, "learning_rate": 1.0}),
        ("student", {"settings": {"width": 4}}),
        ("terms", {"kd": {"weight": 0.3, "temperature": 5.0}}),
        (
            "terms",
            {"kd": {"weight": 0.0}},
        ),  # what terms read decides which layers are added, below the store
    ],
    ids=str,
)
def test_whatever_does_not_decide_the_content_leaves_the_id(raw, table, values):
    assert id_of(with_(raw, table, **values)) == id_of(raw)


def test_names_and_seeds_leave_the_id(raw):
    assert id_of(
        raw | {"name": "another", "setting": "elsewhere", "seeds": [4, 5], "control": False}
    ) == id_of(raw)


def test_the_teachers_weights_change_the_id_and_their_path_does_not(raw, tmp_path):
    by_hand.teacher(tmp_path / "same.safetensors", 0)
    by_hand.teacher(tmp_path / "other.safetensors", 1)
    assert id_of(with_(raw, "teacher", weights=str(tmp_path / "same.safetensors"))) == id_of(raw)
    assert id_of(with_(raw, "teacher", weights=str(tmp_path / "other.safetensors"))) != id_of(raw)


def test_the_code_of_a_teacher_of_ones_own_changes_the_id(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = with_(raw, "teacher", model="own_teacher:make")
    found = []
    for text in ("def make(): pass\n", "def make(): return 1\n"):
        Path("own_teacher.py").write_text(text)
        found.append(id_of(own))
    assert found[0] != found[1]
