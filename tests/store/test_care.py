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
from raykd.files.digests import digest_of
from raykd.files.open import open_place
from raykd.orchestration import scoring
from raykd.recipe.recipe import Recipe
from raykd.stages import plan
from raykd.stages.load import resolve
from raykd.store import care
from raykd.store.manifest import seconds_of
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
        store / f"data/.part-00000-0123456789abcdef.parquet.{'0f' * 16}.tmp",
        store / f"_commits/.00001.json.{'0f' * 16}.tmp",
    ]
    notes = [store / "NOTES.md", store / "data/notes.parquet", store / "_commits/.x.tmp"]
    for path in left + notes:
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
    for path in notes:
        path.unlink()
    assert content(store) == before


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory) -> Path:
    """The store of another teacher over the same rows, finished and sound."""
    table = by_hand.teacher(tmp_path_factory.mktemp("other") / "teacher.safetensors", seed=1)
    _, found = stored.scored(folder, "fp16", teacher=table)
    assert isinstance(found.folder, Path)
    return found.folder


def test_another_teachers_store_under_this_name_is_refused(store, made, other):
    shutil.rmtree(store)
    shutil.copytree(other, store)
    assert typed("verify", other)[0] == 0
    for verb in ("verify", "show", "repair", "gc"):
        code, text = typed(verb, store)
        assert code == 3, verb
        assert f"{store} holds the store {other.name}" in text
        assert f"rename the folder to {other.name}" in text
    for read in (Store, lambda where: scoring.is_complete(where, [])):
        with pytest.raises(StoreError, match="holds the store"):
            read(store)
    with pytest.raises(StoreError, match="holds the store of another recipe"):
        by_hand.score(made[0], store.parent)
    assert content(store) == content(other)


def test_an_identity_that_is_not_the_manifests_is_named_and_repaired(store):
    before = content(store)
    for changed in (b'{"schema": 1}', b"[", b"[]"):
        (store / "_RECIPE.json").write_bytes(changed)
        code, text = typed("verify", store)
        assert code == 3
        assert "_RECIPE.json: not the manifest's identity" in text
        assert typed("repair", store)[0] == 0
        assert content(store) == before


def test_a_layer_of_another_store_is_refused(store, other):
    layer = store / "signals" / "hidden.blocks.0"
    shutil.copytree(other, layer)
    for verb in ("verify", "show", "repair", "gc"):
        code, text = typed(verb, store)
        assert code == 3, verb
        assert f"{layer} is a layer of another store; delete that folder" in text
    with pytest.raises(StoreError, match="is a layer of another store"):
        scoring.is_complete(store, ["hidden.blocks.0"])


VERBS = (
    care.verify,
    care.show,
    care.repair,
    lambda where: care.gc(where, older_than_s=0, force=True),
)


def layered(store: Path, name: str = "hidden.x") -> Path:
    """The store of a layer below a store, not finished: the records and files of that store."""
    layer = store / "signals" / name
    for folder in ("data", "_commits"):
        shutil.copytree(store / folder, layer / folder)
    write_json(layer / "_RECIPE.json", read_json(store / "_RECIPE.json") | {"signal": name})
    return layer


def later(path: Path) -> None:
    """Of another schema, by another rule of digests."""
    write_json(path, read_json(path) | {"schema": 2, "sha256": "of another kind"})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "name", ["_MANIFEST.json", "_RECIPE.json", "unfinished", "signals/hidden.x/_RECIPE.json"]
)
def test_a_store_of_another_schema_is_left_as_it_is(verb, name, store, tmp_path):
    """A later raykd may write other records and other names; here they look like leavings."""
    store = store.rename(tmp_path / "named")  # under another name than an id
    layered(store)
    if name == "unfinished":
        (store / "_MANIFEST.json").unlink()
    later(store / ("_RECIPE.json" if name == "unfinished" else name))
    for path in (store / "_commits").iterdir():
        path.write_text('{"shards": "of another kind"}')
    before = content(store)
    with pytest.raises(StoreError, match=r"is of schema 2, and this raykd reads 1; use the raykd"):
        verb(store)
    assert content(store) == before


def test_a_layer_has_no_layers_whatever_links_are_in_it(store):
    shards = care.verify(store)["shards"]
    layer = layered(store)
    (layer / "signals").symlink_to(store / "signals")
    assert care.verify(store) == {"complete": False, "shards": 2 * shards, "damaged": []}
    spoil(part(layer, 1))
    name = f"signals/hidden.x/data/{part(layer, 1).name}"
    assert [fault["file"] for fault in care.verify(store)["damaged"]] == [name]
    assert care.repair(store) == [name]
    old = time.time() - 48 * 3600
    (layer / "data/part-00000-0123456789abcdef.parquet").write_bytes(b"left behind")
    os.utime(layer / "data/part-00000-0123456789abcdef.parquet", (old, old))
    left = ["signals/hidden.x/data/part-00000-0123456789abcdef.parquet"]
    assert care.gc(store, older_than_s=3600) == left


def signed(store: Path, **changes: object) -> None:
    """Change keys of the manifest, whose digest is made to fit."""
    manifest = read_json(store / "_MANIFEST.json") | changes
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    write_json(store / "_MANIFEST.json", body | {"sha256": digest_of(body)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema": 99}, "is of schema 99, and this raykd reads 1"),
        ({"shards": {}}, "lacks what a manifest holds"),
        ({"shards": [1]}, "lacks what a manifest holds"),
        ({"identity": None}, "lacks what a manifest holds"),
        ({"statistics": []}, "lacks what a manifest holds"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(store, changes, told):
    signed(store, **changes)
    with pytest.raises(StoreError, match=told):
        Store(store)
    with pytest.raises(StoreError, match=told):
        scoring.is_complete(store, [])
    assert typed("verify", store)[0] == 3


def test_a_manifest_that_names_a_file_elsewhere_is_refused(store, tmp_path):
    record = Store(store).manifest["shards"][0] | {"file": "../../x"}
    signed(store, shards=[record])
    with pytest.raises(StoreError, match="lacks what a manifest holds"):
        scoring.is_complete(store, [])


@pytest.mark.parametrize("text", ["[]", "{}", "[", "1e999", '{"schema": NaN}', "[" * 100_000])
@pytest.mark.parametrize("name", ["_MANIFEST.json", "_TIMING.json", "_quarantine/00000.json"])
def test_other_json_in_a_stores_file_is_never_a_traceback(store, name, text):
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text(text)
    if name == "_MANIFEST.json":
        with pytest.raises(StoreError, match=r"_MANIFEST\.json"):
            scoring.is_complete(store, [])
    elif name == "_TIMING.json":
        with pytest.raises(StoreError, match=r"_TIMING\.json"):
            seconds_of(open_place(store))
    else:
        assert typed("verify", store)[0] == 0
    assert typed("repair", store)[0] == 0


@pytest.mark.parametrize("place", ["_RECIPE.json", "data", "_commits", "signals/hidden.x"])
def test_a_link_that_leads_out_of_a_store_is_refused(store, other, tmp_path, place):
    path = store / place
    target = tmp_path / "elsewhere"
    if path.exists():
        path.rename(target)
    else:
        path.parent.mkdir()
        shutil.copytree(other, target)
    path.symlink_to(target)
    before = content(target) if target.is_dir() else target.read_bytes()
    for verb in ("verify", "show", "repair", "gc"):
        code, text = typed(verb, store)
        assert code == 3, verb
        assert f"a link to {target}" in text
    assert before == (content(target) if target.is_dir() else target.read_bytes())


def test_a_store_may_itself_be_reached_by_a_link(store, tmp_path):
    moved = tmp_path / "disk" / store.name
    moved.parent.mkdir()
    store.rename(moved)
    store.symlink_to(moved)
    assert typed("verify", store)[0] == 0
    assert scoring.is_complete(store, [])


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
