"""Laws of a node's copy of a store: the same rows as the shards, made once, never trusted
unverified, held by no one.

The references are the shards themselves, and a training that reads its rows from memory and on one
thread.
"""

import errno
import json
import resource
import signal
import zlib
from dataclasses import replace
from pathlib import Path

import by_hand
import numpy as np
import pyarrow as pa
import pytest
import stored
import torch
from child import CONTEXT, start, wait

from raykd import data
from raykd.data import Dataset
from raykd.errors import DataError, InfraError, StoreError
from raykd.recipe.tables import DataRef
from raykd.store import node_copy
from raykd.store.logits import codec_of
from raykd.store.reader import Store
from raykd.training.arms import arms_of
from raykd.training.device_rows import to_device
from raykd.training.run_arms import ArmRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("RAYKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=["comb", "topk", "fp16"])
def scored(request, folder):
    return stored.scored(folder, request.param)


@pytest.fixture(scope="module")
def comb(folder):
    return stored.scored(folder, "comb")


def copy_of(cache: Path, store: Store, split: str = "train") -> Path:
    return cache / store.manifest["sha256"] / f"{split}.arrow"


def test_the_copy_has_the_rows_of_the_shards_one_batch_a_shard(scored, cache):
    _, store = scored
    fresh = Store(store.folder)
    table = fresh.table("train")
    shards = list(fresh.shards("train"))
    assert [len(c) for c in table.column("logits").chunks] == [s.num_rows for s in shards]
    for name in set(table.column_names) - {"logits"}:
        assert table.column(name).equals(
            pa.chunked_array([c for s in shards for c in s.column(name).chunks])
        )
    first = 0
    stored = fresh.logits("train")
    for shard in shards:
        found = stored.take(np.arange(first, first + shard.num_rows))
        codec, layout = codec_of(shard.schema.field("logits").metadata)
        temperature = getattr(codec, "grid", (1.0,))[0]
        ours = found.decode(temperature)
        theirs = codec.decode(shard.column("logits"), found.steps, temperature, layout)
        for a, b in zip(
            *(vars(x).values() if hasattr(x, "ids") else [x] for x in (ours, theirs)), strict=True
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        first += shard.num_rows


def test_the_copy_is_mapped_and_not_held(comb, cache):
    table = Store(comb[1].folder).table("train")
    before = pa.total_allocated_bytes()
    again = Store(comb[1].folder).table("train")
    assert again.equals(table)
    assert pa.total_allocated_bytes() - before < table.nbytes / 10


def test_shards_whose_layouts_differ_are_read_alike(comb, cache, monkeypatch):
    """Each shard's file has its own smallest layout; the column is one."""
    monkeypatch.setattr(
        "raykd.store.codecs.layout.compressed", lambda column: zlib.crc32(str(column[0]).encode())
    )
    recipe, store = comb
    mixed = by_hand.score(recipe, cache / "mixed")
    assert (
        len({s.schema.field("logits").metadata[b"layout"] for s in Store(mixed).shards("train")})
        > 1
    )
    ours = Store(mixed).logits("train").decode(2.0)
    theirs = Store(store.folder).logits("train").decode(2.0)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.weight, theirs.weight)


def open_it(store: str, gate, told: str) -> None:
    """Open a store's copy with others, and write down whether this process made it."""
    made = []
    make = node_copy._make
    node_copy._make = lambda *a: made.append(1) or make(*a)
    gate.wait(300)
    table = Store(Path(store)).table("train")
    Path(told).write_text(json.dumps([len(made), table.num_rows]))


def test_one_process_makes_the_copy_and_others_wait(comb, cache, tmp_path):
    gate = CONTEXT.Barrier(3)
    told = [tmp_path / f"{i}.json" for i in range(3)]
    env = {"RAYKD_CACHE": str(cache)}
    assert wait([start(open_it, str(comb[1].folder), gate, str(t), **env) for t in told]) == [
        0,
        0,
        0,
    ]
    found = [json.loads(t.read_text()) for t in told]
    assert sorted(made for made, _ in found) == [0, 0, 1]
    assert len({rows for _, rows in found}) == 1


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "other store", "no record", "bad record", "half made"]
)
def test_a_copy_that_is_not_what_was_written_is_made_again(damage, comb, cache):
    folder = comb[1].folder
    good = Store(folder).table("train").combine_chunks()
    path = copy_of(cache, comb[1])
    content = path.read_bytes()
    record = json.loads(path.with_suffix(".json").read_bytes())
    path.unlink()
    match damage:
        case "flip":
            path.write_bytes(content[:999] + bytes([content[999] ^ 4]) + content[1000:])
        case "truncate":
            path.write_bytes(content[:-50])
        case "other store":
            path.write_bytes(content)
            path.with_suffix(".json").write_text(json.dumps(record | {"manifest": "0" * 64}))
        case "no record":
            path.write_bytes(content)
            path.with_suffix(".json").unlink()
        case "bad record":
            path.write_bytes(content)
            path.with_suffix(".json").write_text("{")
        case "half made":
            path.with_suffix(".tmp").write_bytes(content[:100])
    assert Store(folder).table("train").combine_chunks().equals(good)
    assert path.read_bytes() == content
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.arrow", "train.json"]


def test_a_full_disk_is_told_and_leaves_nothing(comb, cache, monkeypatch):
    store = Store(comb[1].folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # then a write beyond the limit is an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(InfraError, match=r"cannot be written: .*RAYKD_CACHE"):
            store.table("train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(copy_of(cache, store).parent.iterdir()) == []
    assert store.table("train").num_rows > 0
    monkeypatch.setattr(
        node_copy,
        "_write",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")),
    )
    with pytest.raises(InfraError, match="No space left"):
        store.table("val")


def test_a_cache_that_others_can_write_is_not_trusted(comb, cache):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(InfraError, match="set RAYKD_CACHE"):
        Store(comb[1].folder).table("train")


def test_a_batch_made_ahead_is_the_batch_made_in_turn_bit_for_bit(scored, cache):
    recipe, store = scored
    shop = ArmRunner(recipe, store.folder, CPU)
    arm = next(a for a in arms_of(recipe) if a.name == "student")
    runs = []
    for mapped in (True, False):
        shop.train = replace(shop.train, mapped=mapped)
        runs.append(shop.train_arm(arm, shop.student(arm)))
    ours, theirs = (run.learner.student.module.state_dict() for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [h["loss"] for h in runs[0].history] == [h["loss"] for h in runs[1].history]


def mapped_rows(folder: Path, dataset: Dataset, mode: str = "r") -> Dataset:
    """The same rows, their inputs and masks in files."""
    splits = {}
    for name, rows in dataset.splits.items():
        kept = {}
        for key in ("inputs", "mask"):
            np.save(folder / f"{name}.{key}.npy", getattr(rows, key))
            kept[key] = np.load(folder / f"{name}.{key}.npy", mmap_mode=mode)  # type: ignore[call-overload]
        splits[name] = replace(rows, **kept)
    return replace(dataset, splits=splits)


def test_rows_in_files_are_the_same_rows(comb, cache, tmp_path):
    recipe, store = comb
    dataset = data.load(recipe.data)
    mapped = mapped_rows(tmp_path, dataset)
    assert mapped.digest == dataset.digest
    data.rows.check_dataset(mapped)
    ours, theirs = (
        to_device(d.splits["train"], "train", store, frozenset({"logits"}), CPU)
        for d in (mapped, dataset)
    )
    assert ours.mapped
    index = torch.tensor([7, 0, 3])
    assert torch.equal(ours.batch(index).inputs, theirs.batch(index).inputs)
    assert torch.equal(ours.batch(index).mask, theirs.batch(index).mask)


def test_a_function_may_give_a_dataset_of_files(comb, tmp_path, monkeypatch):
    dataset = data.load(comb[0].data)
    given = mapped_rows(tmp_path, dataset)
    (tmp_path / "given_rows.py").write_text("given = None\ndef rows(): return given\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import given_rows  # type: ignore[import-not-found]

    given_rows.given = given
    found = data.load(DataRef(source="given_rows:rows"))
    assert isinstance(found.splits["train"].inputs, np.memmap)
    assert found.digest == dataset.digest
    train = given.splits["train"]
    for wrong, match in (
        ({"inputs": train.inputs.astype(np.float64)}, "inputs must be float32 with 3 axes"),
        ({"label": train.label[1:]}, "label must be int64"),
        ({"mask": train.mask[:, 1:]}, "equal N and T"),
        ({"row_id": train.row_id[::-1]}, "row ids must ascend"),
    ):
        given_rows.given = replace(given, splits=given.splits | {"train": replace(train, **wrong)})
        with pytest.raises(DataError, match=match):
            data.load(DataRef(source="given_rows:rows"))
    given_rows.given = given
    with pytest.raises(DataError, match=r"are not data\.classes"):
        data.load(DataRef(source="given_rows:rows", classes=["a"]))


def test_a_store_of_other_rows_is_refused(comb, cache):
    rows = data.load(comb[0].data).splits["train"]
    with pytest.raises(StoreError, match="other rows"):
        to_device(rows.take(slice(1, None)), "train", comb[1], frozenset(), CPU)
