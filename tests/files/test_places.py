"""Laws of where a store stands: in a folder or a bucket the bytes, the deaths survived and the
faults told are alike.

The reference is the store in a folder, byte for byte. The bucket is on a real S3 server of this
machine.
"""

import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import by_hand
import objects
import pytest
import stored
from by_hand import typed
from child import CONTEXT, start, wait
from command import in_workers, raykd, trained
from digests import recipe_digest
from shards import IDENTITY, ROWS, SHARDS, fill, race, read_all, table_of

from raykd.errors import InfraError, RecipeError, StoreError
from raykd.files import bucket
from raykd.files.address import Address, checked_address
from raykd.files.bucket import Bucket
from raykd.files.open import address_below, open_place
from raykd.files.place import read_json_in
from raykd.orchestration import scoring
from raykd.stages import plan
from raykd.stages.load import load, resolve
from raykd.store import care, layer_signals
from raykd.store.commit import StoreWriter, record_of, to_parquet
from raykd.store.reader import Store

KINDS = ("folder", "bucket")
POINTS = ("before_write", "before_commit", "after_commit", "before_manifest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module", autouse=True)
def server():
    """The environment of the server, set for this process too."""
    with objects.served() as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield environment


def new(kind: str, tmp_path: Path) -> Address:
    """The address of a store that does not exist; its last part is the same everywhere, as it is in
    the manifest.
    """
    return (
        tmp_path / "stores" / "store"
        if kind == "folder"
        else f"s3://bucket/{uuid.uuid4().hex}/stores/store"
    )


@pytest.fixture(params=KINDS)
def store(request, tmp_path) -> Address:
    return new(request.param, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished store in a folder, which no test may change."""
    where = tmp_path_factory.mktemp("whole") / "store"
    fill(where)
    return where


def content(where: Address) -> dict[str, bytes | None]:
    place = open_place(where)
    return {name: place.get(name) for name in place.listed()}


def spoil(where: Address, name: str) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(open_place(where).get(name) or b"")
    data[len(data) // 2] ^= 16
    open_place(where).put(name, bytes(data))


def test_one_of_sixteen_creates_a_name(store):
    place = open_place(store)
    gate = threading.Barrier(16)
    told = {}

    def create(number: int) -> None:
        gate.wait(300)
        told[number] = place.put_once("_commits/00000.json", str(number).encode())

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    (winner,) = [number for number, created in told.items() if created]
    assert len(told) == 16
    assert place.get("_commits/00000.json") == str(winner).encode()


def test_a_place_gives_what_was_put(store):
    place = open_place(store)
    assert (place.get("a"), place.listed(), place.folders(), place.name) == (None, {}, [], "store")
    place.delete("a")
    assert place.put_once("data/x", b"first")
    assert not place.put_once("data/x", b"second")
    assert (place.get("data/x"), place.get("data/x", last=2), place.get("data/x", last=99)) == (
        b"first",
        b"st",
        b"first",
    )
    place.put("data/x", b"third.")
    place.below("signals/h").put("y", b"")
    assert {name: found.bytes for name, found in place.listed().items()} == {
        "data/x": 6,
        "signals/h/y": 0,
    }
    assert abs(place.listed("data")["data/x"].written_s - time.time()) < 60
    assert (place.folders(), place.folders("signals"), list(place.listed("signals"))) == (
        ["data", "signals"],
        ["h"],
        ["signals/h/y"],
    )
    place.delete("data/x")
    assert content(store) == {"signals/h/y": b""}
    assert content(address_below(store, "signals/h")) == {"y": b""}


def test_a_store_has_the_same_bytes_wherever_it_stands(store, whole):
    fill(store)
    assert content(store) == content(whole)
    assert [
        ours.equals(theirs) for ours, theirs in zip(read_all(store), read_all(whole), strict=True)
    ] == [True] * 3
    assert care.verify(store) == care.verify(whole)
    assert care.show(store) | {"store": ""} == care.show(whole) | {"store": ""}
    fill(store)
    assert content(store) == content(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_race_end_with_one_commit_a_shard(kind, server, tmp_path):
    where = new(kind, tmp_path)
    gate = CONTEXT.Barrier(2)
    told = [tmp_path / "a.json", tmp_path / "b.json"]
    assert wait([start(race, where, salt, gate, told[salt], **server) for salt in (0, 1)]) == [0, 0]
    assert told[0].read_bytes() == told[1].read_bytes()
    assert len(open_place(where).listed("_commits")) == len(SHARDS)
    assert [table.num_rows for table in read_all(where)] == list(ROWS.values())


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_scorer_resumes_to_the_same_manifest(point, store, whole, server, tmp_path):
    fault = {"RAYKD_FAULT": f"score:at={point}", "RAYKD_FAULT_FIRED": str(tmp_path / "fired")}
    if point != "before_manifest":
        fault["RAYKD_FAULT"] += ",shard=3"
    assert wait([start(fill, store, **fault, **server)]) == [-signal.SIGKILL]
    with pytest.raises(StoreError, match="no manifest"):
        Store(store)
    stood = {name: data for name, data in content(store).items() if name.startswith("_commits/")}
    assert len(stood) == {"before_write": 3, "before_commit": 3, "after_commit": 4}.get(
        point, len(SHARDS)
    )
    assert wait([start(fill, store, **fault, **server)]) == [0]
    assert content(store) == content(whole)


@pytest.mark.parametrize("kind", ["data", "record", "manifest"])
def test_a_flipped_bit_is_named_and_repaired(kind, store, whole):
    fill(store)
    part = Store(store).manifest["shards"][2]["file"]
    spoil(
        store, {"data": part, "record": "_commits/00002.json", "manifest": "_MANIFEST.json"}[kind]
    )
    code, text = typed("verify", store)
    assert code == 3
    assert f"type: raykd store repair {store}" in text
    if kind == "data":
        with pytest.raises(StoreError, match=rf"{part} is damaged"):
            read_all(store)
        assert typed("show", store)[0] == 0
    assert typed("repair", store)[0] == 0
    assert typed("verify", store)[0] == (0 if kind == "record" else 3)
    fill(store)
    assert content(store) == content(whole)
    assert typed("verify", store) == (0, f"{len(SHARDS)} shards, complete and sound\n")


def test_a_lost_or_cut_file_is_scored_again(store, whole):
    fill(store)
    files = [record["file"] for record in Store(store).manifest["shards"]]
    assert scoring.is_complete(store, [])
    open_place(store).delete(files[1])
    assert not scoring.is_complete(store, [])
    assert StoreWriter(store, IDENTITY).missing(SHARDS) == [SHARDS[1]]
    fill(store)
    open_place(store).put(files[4], b"cut")
    assert not scoring.is_complete(store, [])
    assert StoreWriter(store, IDENTITY).missing(SHARDS) == [SHARDS[4]]
    fill(store)
    assert content(store) == content(whole)


def test_what_a_killed_writer_left_behind_is_collected(store, whole):
    fill(store)
    half = f".part-00001-0123456789abcdef.parquet.{'0f' * 16}.tmp"
    left = [f"data/{half}", "data/part-00000-0123456789abcdef.parquet"]
    kept = ["NOTES.md", "data/notes.parquet", "data/part-1.parquet", "data/.x.tmp"]
    for name in left + kept:
        open_place(store).put(name, b"left behind")
    assert care.gc(store, older_than_s=3600) == []
    assert care.gc(store, older_than_s=0, force=True) == left
    for name in kept:
        assert open_place(store).get(name) == b"left behind"
        open_place(store).delete(name)
    assert content(store) == content(whole)


def test_a_live_writers_shard_is_never_collected(store):
    writer = StoreWriter(store, IDENTITY)
    data = to_parquet(table_of(SHARDS[0]))
    part = record_of(SHARDS[0], data)["file"]
    writer.place.put_once(part, data)  # as `commit` does before it writes the record
    for hours in (0, 0.99, -100, float("nan")):
        code, text = typed("gc", store, "--older-than", hours)
        assert code == 2
        assert "give at least 1, or with --force" in text
    for hours in (-1, float("nan")):
        assert typed("gc", store, "--older-than", hours, "--force")[0] == 2
    assert typed("gc", store, "--older-than", 0, "--force") == (0, "nothing to remove\n")
    assert writer.place.get(part) == data


def test_a_layer_is_a_store_below_the_first(store):
    for name, writer in layer_signals.writers(store, IDENTITY, ["hidden.a"]).items():
        for shard in SHARDS:
            writer.commit(shard, table_of(shard))
        assert not scoring.is_complete(store, ["hidden.a"])
        writer.finish(SHARDS, {"rows": ROWS} if not name else {})
    assert scoring.is_complete(store, ["hidden.a"])
    assert care.verify(store) == {"complete": True, "shards": 2 * len(SHARDS), "damaged": []}
    spoil(address_below(store, "signals/hidden.a"), "_commits/00001.json")
    assert [d["file"] for d in care.verify(store)["damaged"]] == [
        "signals/hidden.a/_commits/00001.json"
    ]
    assert care.repair(store) == ["signals/hidden.a/_commits/00001.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_read_back_alike(kind, folder, tmp_path):
    recipe, local = stored.scored(folder, "comb")
    where = by_hand.score(recipe, new(kind, tmp_path))
    assert read_json_in(open_place(where), "_MANIFEST.json") == local.manifest
    for split in ("train", "val", "test"):
        assert Store(where).table(split).equals(local.table(split))


@pytest.mark.parametrize("kind", KINDS)
def test_check_finds_the_nearest_store(kind, folder, tmp_path):
    recipe, _ = stored.scored(folder, "comb")
    home = str(new(kind, tmp_path))
    where = by_hand.score(recipe, home)
    raw = recipe.model_dump(mode="json", exclude_none=True)
    same = resolve(raw | {"scale": {"store": f"{home}/"}})
    assert recipe_digest(same) == recipe_digest(recipe), "a place is no part of what is made"
    score = plan.plan(same, tmp_path)["stages"][0]
    assert score["done"]
    assert str(where) in score["what"]
    other = raw | {"scale": {"store": home}, "store": raw["store"] | {"batch": 16}}
    found = plan.plan(resolve(other), tmp_path)["nearest_store"]
    assert found == {"store": str(where), "differences": ["store.batch: 16 wanted, 32 stored"]}


def test_a_folder_of_stores_is_relative_to_the_recipe(tmp_path):
    for text, wanted in (("stores", str(tmp_path / "stores")), ("s3://bucket/a", "s3://bucket/a")):
        (tmp_path / "r.toml").write_text(f'technique = "none"\n[scale]\nstore = "{text}"\n')
        assert load(tmp_path / "r.toml").scale.store == wanted


@pytest.mark.parametrize("bucket", ["ab", "B" * 3, "a" * 64, "-ab", "ab.", ""])
def test_the_rule_of_bucket_names_is_told(bucket):
    with pytest.raises(ValueError, match=f"a bucket's name, here '{bucket}', has 3 to 63"):
        checked_address(f"s3://{bucket}/prefix")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the next line says which
        checked_address("s3://bucket/a b")
    assert "bucket's name" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://", "s3://B", "s3://bucket/../x", "s3://bucket//x", "s3://bucket/a b", "gs://b/x"]
)
def test_a_url_that_can_not_be_one_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match="must be a folder or s3://bucket/prefix"):
        open_place(url)
    (tmp_path / "r.toml").write_text(f'technique = "none"\n[scale]\nstore = "{url}"\n')
    with pytest.raises(RecipeError, match=r"scale.store: must be a folder or s3://bucket/prefix"):
        load(tmp_path / "r.toml")
    assert typed("verify", url)[0] == 2


def test_a_creation_that_collides_is_tried_again():
    place = Bucket("bucket", uuid.uuid4().hex)
    assert place.put_once("collided.json", b"1")
    assert place.get("collided.json") == b"1"


def test_a_server_that_creates_a_name_twice_is_refused():
    with pytest.raises(InfraError, match=r"creates an object twice.*honours If-None-Match"):
        StoreWriter("s3://forgetful/stores/store", IDENTITY)


def test_a_bucket_that_is_not_there_is_named():
    for do in (
        lambda: StoreWriter("s3://nobodys/store", IDENTITY),
        lambda: care.verify("s3://nobodys/store"),
    ):
        with pytest.raises(InfraError, match=r"there is no bucket 'nobodys'; create it"):
            do()


def test_a_server_that_is_down_is_told_soon(tmp_path, server):
    started = time.monotonic()
    away = server | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = raykd(tmp_path, "store", "verify", "s3://bucket/stores/store", **away)
    assert done.code == 5
    assert "s3://bucket/stores/store/_RECIPE.json: " in done.err
    assert "check the server and AWS_ENDPOINT_URL" in done.err
    assert len(done.err.splitlines()) == 1
    assert time.monotonic() - started < 90


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(bucket, "CLIENT", bucket.CLIENT | {"timeout": "1s"})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        for do in (lambda: Bucket("bucket").get("x"), lambda: Bucket("bucket").put_once("x", b"")):
            with pytest.raises(InfraError, match="check the server and AWS_ENDPOINT_URL"):
                do()
        assert time.monotonic() - started < 90


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        InfraError, match=r"needs the package obstore; type: pip install 'raykd\[s3\]'"
    ):
        care.verify("s3://bucket/stores/store")


@pytest.mark.ray
def test_a_student_is_the_same_from_a_bucket(session, tiny, scored, stocked, server, tmp_path):
    home = f"s3://bucket/{uuid.uuid4().hex}"
    command: tuple[Any, ...] = (
        "train",
        tiny,
        "--set",
        f"scale.store={home}",
        "--out",
        tmp_path / "out",
    )
    done = raykd(tmp_path, *command, **session, **server, **in_workers(server))
    assert done.code == 0, done.err
    assert not (tmp_path / "out" / "stores").exists()
    (name,) = open_place(home).folders()
    assert (
        open_place(home).get(f"{name}/_MANIFEST.json")
        == (scored / "stores" / name / "_MANIFEST.json").read_bytes()
    )
    local = stocked("local")
    assert raykd(tmp_path, "train", tiny, "--out", local, **session).code == 0
    assert trained(tmp_path / "out") == trained(local)
    done = raykd(tmp_path, "score", *command[1:], "--json", **server)
    assert done.out == f'{{"store": "{home}/{name}"}}\n'
