"""Teacher stores that are damaged, forged and signed, exchanged, or lead elsewhere."""

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hostile.harness import MIB, Asked, Done, Home, add, hostile
from hostile.runs import GARBAGE, same_or_refused

MANIFEST = "_MANIFEST.json"
RECIPE = "_RECIPE.json"
COMMIT = "_commits/00000.json"
JSON = ("an empty list", "null", "cut short", "100,000 lists")


def canonical(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sign(store: Path, edit: Callable[[Any], Any]) -> None:
    """The manifest with a change, and a digest that fits it."""
    body = json.loads((store / MANIFEST).read_bytes())
    body.pop("sha256")
    body = edit(body)
    (store / MANIFEST).write_text(json.dumps(body | {"sha256": canonical(body)}))


def garbage(name: str, content: bytes, verb: str, home: Home) -> Asked:
    store = home.store()
    (store / name).write_bytes(content)
    code: Any = (0, 3) if verb in ("repair", "show") else 3
    return Asked(("store", verb, store), code)


for _file in (MANIFEST, RECIPE, COMMIT):
    for _kind in JSON:
        if (_file, _kind) != (MANIFEST, "null"):  # no store lacks a manifest that is half there
            add("store", f"{_kind} as {_file}", partial(garbage, _file, GARBAGE[_kind], "verify"))
for _kind in ("100,000 lists",):
    for _file in (MANIFEST, RECIPE, COMMIT):
        add(
            "store",
            f"repaired with {_kind} as {_file}",
            partial(garbage, _file, GARBAGE[_kind], "repair"),
        )


def _first(**changes: Any) -> Callable[[Any], Any]:
    """A change of the first shard's record."""

    def edit(body: Any) -> Any:
        shards = [body["shards"][0] | changes, *body["shards"][1:]]
        return body | {"shards": shards}

    return edit


SIGNED: dict[str, Callable[[Any], Any]] = {
    "schema 99": lambda body: body | {"schema": 99},
    "no shards": lambda body: body | {"shards": []},
    "shards that are a number": lambda body: body | {"shards": 7},
    "shards that are null": lambda body: body | {"shards": None},
    "a file that climbs": _first(file="../../../victim/secret.txt"),
    "minus one rows": _first(rows=-1),
    "rows of a quadrillion": _first(rows=10**18, last=10**18),
    "a number that is a text": _first(number="../../victim/x"),
    "a split of another name": _first(split="../victim"),
    "another teacher": lambda body: body | {"identity": {"teacher": "another"}},
}


def signed(edit: Callable[[Any], Any], home: Home) -> Asked:
    store = home.store()
    sign(store, edit)
    return Asked(("store", "verify", store), 3)


for _name, _edit in SIGNED.items():
    add("store", f"signed with {_name}", partial(signed, _edit))


def unreadable(edit: Callable[[Any], Any], home: Home) -> Asked:
    """A report over a store whose manifest was forged and signed."""
    store = home.store()
    (next(home.out.glob("done-*")) / "report.json").unlink()
    sign(store, edit)
    return home.asked("report", "done.toml", code=(0, 3), check=same_or_refused)


for _name, _statistics in {
    "no statistics": {},
    "short quantiles": {"saliency": {"quantiles": []}},
}.items():
    add(
        "store",
        f"reported with {_name}",
        partial(unreadable, lambda body, s=_statistics: body | {"statistics": s}),
    )


def exchange(home: Home) -> Path:
    """A store of another teacher, whole in itself, under this recipe's name."""
    store = home.store()
    identity = json.loads((store / RECIPE).read_bytes())
    identity["teacher"]["weights"] = "sha256:" + "0" * 64
    (store / RECIPE).write_text(json.dumps(identity))
    sign(store, lambda body: body | {"identity": identity})
    return store


@hostile("store")
def another_teachers_is_not_sound(home: Home) -> Asked:
    return Asked(("store", "verify", exchange(home)), 3)


@hostile("store")
def another_teachers_is_not_trained_from(home: Home) -> Asked:
    exchange(home)
    shutil.rmtree(next(home.out.glob("done-*")) / "arms")
    return home.asked("train", "done.toml", code=3)


@hostile("store")
def another_teachers_is_not_reported(home: Home) -> Asked:
    exchange(home)
    (next(home.out.glob("done-*")) / "report.json").unlink()
    return home.asked("report", "done.toml", code=3)


@hostile("store")
def one_under_another_name(home: Home) -> Asked:
    store = home.store()
    moved = store.rename(store.with_name("0" * 16))
    return Asked(("store", "verify", moved), 3)


def bombed(data: bytes, rows: int, home: Home) -> Asked:
    """A shard's file exchanged for one that unfolds, every digest made to fit."""
    store = home.store()
    record = json.loads((store / MANIFEST).read_bytes())["shards"][0]
    sha = hashlib.sha256(data).hexdigest()
    record |= {"file": f"data/part-00000-{sha[:16]}.parquet", "bytes": len(data), "sha256": sha}
    record |= {"rows": rows, "last": record["first"] + rows}
    (store / record["file"]).write_bytes(data)
    (store / COMMIT).write_text(json.dumps(record))
    sign(store, _first(**record))
    return Asked(("store", "verify", store), 3, check=lean)


def lean(_home: Home, done: Done) -> list[str]:
    """Little memory was taken, where it is known."""
    return [f"{done.peak_mib} MiB of memory"] if (done.peak_mib or 0) > 500 else []


def zeros(home: Home) -> Asked:
    sink = io.BytesIO()
    table = pa.table({"row_id": np.zeros(MIB, np.int64)})
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(128):
            writer.write_table(table)
    return bombed(sink.getvalue(), 128 * MIB, home)


def unfolding(home: Home) -> Asked:
    sink = io.BytesIO()
    blob = pa.array([bytes(MIB)], pa.binary())
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1024, np.int32)), blob)
    pq.write_table(pa.table({"logits": values}), sink, compression="zstd", store_schema=False)
    return bombed(sink.getvalue(), 1024, home)


def wrong_types(home: Home) -> Asked:
    sink = io.BytesIO()
    pq.write_table(pa.table({"row_id": [[{"a": 1}]] * 8}), sink)
    return bombed(sink.getvalue(), 8, home)


add("store", "a signed bomb of a GiB of zeros", zeros)
add("store", "a signed bomb in a dictionary", unfolding)
add("store", "a signed shard of structs in lists", wrong_types)


@hostile("store")
def a_flipped_bit(home: Home) -> Asked:
    store = home.store()
    path = next((store / "data").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return Asked(("store", "verify", store), 3, ("repair",))


@hostile("store")
def a_shard_that_is_a_fifo(home: Home) -> Asked:
    store = home.store()
    path = next((store / "data").iterdir())
    path.unlink()
    os.mkfifo(path)
    return Asked(("store", "verify", store), 3)


@hostile("store")
def a_shard_that_is_a_folder(home: Home) -> Asked:
    store = home.store()
    path = next((store / "data").iterdir())
    path.unlink()
    path.mkdir()
    return Asked(("store", "verify", store), 3)


@hostile("store")
def a_shard_that_is_a_link(home: Home) -> Asked:
    store = home.store()
    path = next((store / "data").iterdir())
    moved = home.victim / path.name
    shutil.move(path, moved)
    path.symlink_to(moved)
    return Asked(("store", "verify", store), 3)


@hostile("store")
def data_that_are_a_link_are_not_swept(home: Home) -> Asked:
    store = home.store()
    for path in (store / "data").iterdir():
        shutil.move(path, home.victim / path.name)
    (store / "data").rmdir()
    (store / "data").symlink_to(home.victim)
    return Asked(("store", "gc", store), (0, 2, 3))


@hostile("store")
def a_folder_of_layers_that_is_a_link_is_not_swept(home: Home) -> Asked:
    store = home.store()
    (home.victim / RECIPE).write_text("{}")
    (store / "signals").symlink_to(home.root)
    return Asked(("store", "gc", store), (0, 2, 3))


@hostile("store")
def commits_that_are_a_link_are_not_repaired(home: Home) -> Asked:
    store = home.store()
    shutil.rmtree(store / "_commits")
    (home.victim / "00000.json").write_text("{}")
    (store / "_commits").symlink_to(home.victim)
    return Asked(("store", "repair", store), (0, 2, 3))


@hostile("store")
def a_record_that_climbs_is_not_repaired(home: Home) -> Asked:
    store = home.store()
    record = json.loads((store / COMMIT).read_bytes()) | {"file": "../../../victim/secret.txt"}
    (store / COMMIT).write_text(json.dumps(record))
    (store / MANIFEST).unlink()
    return Asked(("store", "repair", store), (0, 3))


def notes(store: Path, age_s: float) -> Path:
    """A user's own file in a store, and a live writer's."""
    path = store / "NOTES.md"
    path.write_text("mine")
    old = time.time() - age_s
    os.utime(path, (old, old))
    return path


def swept(hours: str, code: Any, home: Home) -> Asked:
    """Whatever the hours, a user's own file stays, and so does what a writer has just begun."""
    store = home.store()
    mine = notes(store, 30 * 24 * 3600)
    young = store / "data" / f"part-00000-{'0' * 16}.parquet"
    young.write_bytes(b"PAR1")

    def check(_home: Home, _done: Done) -> list[str]:
        return [f"{path.name} is gone" for path in (mine, young) if not path.exists()]

    return Asked(("store", "gc", store, "--older-than", hours), code, check=check)


for _hours, _code in {
    "24": 0,
    "0": 2,
    "-100": 2,
    "nan": 2,
    "1e308": (0, 2),
}.items():
    add("store", f"gc --older-than {_hours}", partial(swept, _hours, _code))


@hostile("store")
def gc_of_a_folder_that_only_says_it_is_a_store(home: Home) -> Asked:
    (home.victim / RECIPE).write_text("{}")
    return Asked(("store", "gc", home.victim), (0, 3))


@hostile("store")
def gc_of_a_folder_of_other_things(home: Home) -> Asked:
    return Asked(("store", "gc", home.victim), 3, (RECIPE,))


def addressed(address: str, home: Home) -> Asked:
    return Asked(("store", "verify", address), 2)


for _address in (
    "/dev/null",
    "nowhere",
    "s3://../x",
    "s3://bucket/../x",
    "s3://",
    "ftp://x/y",
    "a\x1b[2J",
):
    add("store", f"at {_address!r}", partial(addressed, _address))


@hostile("store")
def a_shown_store_with_a_garbled_footer(home: Home) -> Asked:
    store = home.store()
    path = next((store / "data").iterdir())
    path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1")
    return Asked(("store", "show", store), (0, 3))


@hostile("store")
def a_shown_store_with_an_empty_shard(home: Home) -> Asked:
    store = home.store()
    next((store / "data").iterdir()).write_bytes(b"")
    return Asked(("store", "show", store), (0, 3))


@hostile("sound")
def a_sound_store(home: Home) -> Asked:
    return Asked(("store", "verify", home.store()), 0)


@hostile("sound")
def a_sound_store_shown(home: Home) -> Asked:
    return Asked(("store", "show", home.store()), 0)
