"""Laws of looking after a store: what is wrong is named, what is mended is what was, and nothing
sound is touched.

The reference is the store itself before it was damaged, byte for byte.
"""

import json
import os
import shutil
import time
from pathlib import Path

import by_hand
import pytest
import stored
from by_hand import typed

from raykd.errors import StoreError
from raykd.files.atomic import read_json, write_json
from raykd.recipe.recipe import Recipe
from raykd.stages import plan
from raykd.stages.load import resolve
from raykd.store import care
from raykd.store.reader import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> tuple[Recipe, Path]:
    """(recipe, its finished store) that no test may change."""
    recipe, _ = stored.scored(folder, "fp16")
    return recipe, by_hand.score(recipe, tmp_path_factory.mktemp("out") / "stores")


@pytest.fixture
def store(made, tmp_path) -> Path:
    """A finished store of the test's own."""
    return Path(shutil.copytree(made[1], tmp_path / "stores" / made[1].name))


def content(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def part(store: Path, number: int) -> Path:
    return next((store / "data").glob(f"part-{number:05d}-*"))


DAMAGE = {
    "a flipped bit": (
        lambda s: spoil(part(s, 1)),
        "sha256 is not the manifest's",
        "data/part-00001",
    ),
    "a missing file": (lambda s: part(s, 2).unlink(), "is missing", "data/part-00002"),
    "a cut file": (
        lambda s: os.truncate(part(s, 0), 99),
        "sha256 is not the manifest's",
        "data/part-00000",
    ),
    "a lost record": (
        lambda s: (s / "_commits/00001.json").unlink(),
        "not the manifest's record",
        "_commits/00001",
    ),
    "a bad record": (
        lambda s: spoil(s / "_commits/00001.json"),
        "not the manifest's record",
        "_commits/00001",
    ),
    "a bad manifest": (lambda s: spoil(s / "_MANIFEST.json"), "damaged", "_MANIFEST.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_repaired_to_what_was(damage, store, made):
    before = content(store)
    assert typed("verify", store) == (
        0,
        f"{len(care.shards(store)[0])} shards, complete and sound\n",
    )
    do, fault, name = DAMAGE[damage]
    do(store)
    code, text = typed("verify", store)
    assert code == 3
    assert fault in text
    assert f"type: raykd store repair {store}" in text
    found = care.verify(store)
    assert [d["file"].startswith(name) for d in found["damaged"]] == [True]
    assert not found["complete"]
    assert typed("show", store)[0] == 0
    code, text = typed("repair", store)
    assert code == 0
    assert name in text
    by_hand.score(made[0], store.parent)
    assert content(store) == before
    assert typed("repair", store) == (0, "nothing is damaged\n")
    assert content(store) == before


def test_a_store_without_a_manifest_is_incomplete_and_not_damaged(store):
    (store / "_MANIFEST.json").unlink()
    code, text = typed("verify", store)
    assert code == 3
    assert "not complete; type: raykd score" in text
    assert typed("repair", store) == (0, "nothing is damaged\n")
    assert "incomplete" in typed("show", store)[1]


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    for verb in ("verify", "show", "repair", "gc"):
        code, text = typed(verb, tmp_path)
        assert code == 3, verb
        assert "not a teacher store" in text


def test_show_tells_rows_bytes_and_columns(store, made):
    found = json.loads(typed("show", store, "--json")[1])
    manifest = Store(store).manifest
    assert found["complete"]
    assert {n: p["rows"] for n, p in found["splits"].items()} == manifest["statistics"]["rows"]
    assert sum(p["bytes"] for p in found["splits"].values()) == manifest["bytes"]
    assert {"row_id", "steps", "logits", "valence"} <= found["columns"].keys()
    stored = sum(c["bytes_per_row"] for c in found["columns"].values()) * sum(
        manifest["statistics"]["rows"].values()
    )
    assert 0.3 * manifest["bytes"] < stored < manifest["bytes"]  # the rest is footers
    assert found["identity"] == manifest["identity"]


def test_gc_takes_only_old_files_that_no_record_names(store):
    before = content(store)
    left = [
        store / "data/part-00000-0123456789abcdef.parquet",
        store / "data/.x.tmp",
        store / "_commits/.00001.tmp",
    ]
    for path in left:
        path.write_bytes(b"left behind")
    assert json.loads(typed("gc", store, "--json")[1]) == {"removed": []}
    old = time.time() - 48 * 3600
    for path in store.rglob("*"):
        os.utime(path, (old, old))
    spoil(store / "_commits/00002.json")  # its file is still the manifest's
    assert sorted(care.gc(store, older_than_s=3600)) == sorted(
        str(p.relative_to(store)) for p in left
    )
    spoil(store / "_commits/00002.json")
    assert content(store) == before


def test_a_record_that_names_a_file_elsewhere_is_not_followed(store, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (store / "_MANIFEST.json").unlink()
    record = read_json(store / "_commits/00000.json")
    write_json(store / "_commits/00000.json", record | {"file": "../../mine"})
    assert [d["file"] for d in care.verify(store)["damaged"]] == ["_commits/00000.json"]
    care.repair(store)
    assert (tmp_path / "mine").exists()
    with pytest.raises(StoreError, match="no shard's file"):
        list(Store.of_shards(store, [record | {"file": "../../mine"}]).shards(record["split"]))


def test_differences_name_each_field():
    ours = {"a": {"b": 1, "c": 2}, "d": [1]}
    theirs = {"a": {"b": 1, "c": 3}, "e": 5}
    told = ["a.c: 2 wanted, 3 stored", "d: [1] wanted, None stored", "e: None wanted, 5 stored"]
    assert care.differences(ours, theirs) == told
    assert care.differences(ours, ours) == []


def test_check_names_the_nearest_store_and_what_differs(made, tmp_path):
    recipe, stored = made
    out = tmp_path / "out"
    shutil.copytree(stored, out / "stores" / stored.name)
    write_json(out / "stores" / ("0" * 16) / "_RECIPE.json", {"schema": 0})
    assert plan.plan(recipe, out)["nearest_store"] is None
    raw = recipe.model_dump(mode="json", exclude_none=True)
    raw["store"] |= {"batch": 16}
    found = plan.plan(resolve(raw), out)
    assert found["nearest_store"] == {
        "store": str((out / "stores" / stored.name).resolve()),
        "differences": ["store.batch: 16 wanted, 32 stored"],
    }
    assert "store.batch: 16 wanted, 32 stored" in plan.table(found)
    assert plan.plan(recipe, tmp_path / "empty")["nearest_store"] is None
