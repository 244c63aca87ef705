"""What kills, full disks, flipped bits and hostile files cost a store: time, or an error, and never
a wrong row.

The kills are real (SIGKILL, at every named point and at random times), the full disk is a real one
where this user may mount it, and every manifest is compared byte for byte with that of a run left
alone. No Ray: it only schedules.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import start, wait
from shards import IDENTITY, flip, manifest_of, table_of

from raykd.errors import InfraError, StoreError
from raykd.files.atomic import read_json
from raykd.store.commit import StoreWriter, plan_shards
from raykd.store.reader import Store

ROWS = {"train": 900, "val": 32, "test": 32}
SHARDS = plan_shards(ROWS, 16)
FORK = multiprocessing.get_context("fork")  # from a child without threads
KILLS = 10  # a run
POINTS = [
    "file:name=_RECIPE.json,at=staged",
    "file:name=_RECIPE.json,at=linked",
    "score:at=before_write",
    "file:folder=data,at=staged",
    "file:folder=data,at=linked",
    "score:at=before_commit",
    "file:folder=_commits,at=staged",
    "file:folder=_commits,at=linked",
    "score:at=after_commit",
    "score:at=before_manifest",
    "file:name=_MANIFEST.json,at=staged",
    "file:name=_MANIFEST.json,at=linked",
]


def work(folder: Path, *, backwards: bool = False, die_s: float | None = None) -> None:
    """A worker: commit every shard that is missing; its own SIGKILL comes after `die_s` of that, if
    given.
    """
    writer = StoreWriter(folder, IDENTITY)
    missing = writer.missing(SHARDS)
    if die_s is not None:
        threading.Timer(die_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for shard in reversed(missing) if backwards else missing:
        writer.commit(shard, table_of(shard))
        time.sleep(0.002)  # the teacher's
    if die_s is not None:
        time.sleep(60)


def drive(folder: Path) -> None:
    """A driver: two workers at once, then the manifest."""
    workers = [
        FORK.Process(target=work, args=(folder,), kwargs={"backwards": back})
        for back in (False, True)
    ]
    for worker in workers:
        worker.start()
    assert wait(workers) == [0, 0]
    StoreWriter(folder, IDENTITY).finish(SHARDS, {"rows": ROWS})


def _doomed(folder: Path, die_s: float, backwards: bool) -> None:
    work(folder, backwards=backwards, die_s=die_s)


def finish(folder: Path) -> None:
    work(folder)
    StoreWriter(folder, IDENTITY).finish(SHARDS, {"rows": ROWS})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A store that was made in one go."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    finish(folder)
    return folder


def check_whole(folder: Path, whole: Path) -> None:
    """The same manifest, and every row once."""
    assert manifest_of(folder) == manifest_of(whole)
    found = Store(folder)
    for split, count in ROWS.items():
        ids = np.concatenate([shard.column("row_id").to_numpy() for shard in found.shards(split)])
        assert ids.tolist() == list(range(count))


@pytest.mark.parametrize("run", range(4))
def test_ten_kills_of_two_workers_leave_no_trace_in_the_manifest(run, whole, tmp_path):
    draw = random.Random(run)
    folder = tmp_path / "store"
    named = POINTS[:6] if run % 2 else POINTS[6:]
    working = [p for p in named if "ANIFEST" not in p and "manifest" not in p]
    plans: list[Any] = working + [draw.uniform(0.001, 0.04) for _ in range(KILLS - len(named))]
    killed = 0
    for at in range(0, len(plans), 2):
        both = [
            _victim(folder, plan, tmp_path / f"fired-{at}-{i}", i)
            for i, plan in enumerate(plans[at : at + 2])
        ]
        killed += sum(code == -signal.SIGKILL for code in wait(both))
    assert not (folder / "_MANIFEST.json").exists()
    for number, plan in enumerate(p for p in named if p not in working):
        killed += wait([_victim(folder, plan, tmp_path / f"last-{number}", 0)]) == [-signal.SIGKILL]
    assert killed == KILLS
    assert wait([start(finish, folder)]) == [0]
    check_whole(folder, whole)


def _victim(folder: Path, plan: Any, fired: Path, number: int) -> Any:
    """A process that kills itself at a named point, or after so many seconds of work."""
    if isinstance(plan, float):
        return start(_doomed, folder, plan, bool(number))
    return start(finish, folder, RAYKD_FAULT=plan, RAYKD_FAULT_FIRED=str(fired))


def test_every_named_point_of_the_protocol_is_killed_at():
    source = "".join(
        (Path(__file__).parents[2] / "raykd" / f).read_text()
        for f in ("files/atomic.py", "store/commit.py")
    )
    assert source.count("faults.point(") == len({p.partition("at=")[2] for p in POINTS})


def test_a_driver_killed_three_times_has_every_row_once(whole, tmp_path):
    folder = tmp_path / "store"
    for share in (0.1, 0.4, 0.7):
        driver = start(drive, folder)
        end = time.monotonic() + 30
        while len(list(folder.glob("_commits/*.json"))) < share * len(SHARDS):
            assert time.monotonic() < end
            time.sleep(0.001)
        driver.kill()  # its workers live on, as on other nodes
        assert wait([driver]) == [-signal.SIGKILL]
        assert not (folder / "_MANIFEST.json").exists()
        kept = {p: p.stat().st_mtime_ns for p in folder.glob("data/part-*")}
    assert wait([start(drive, folder)]) == [0]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "a shard was written again"
    check_whole(folder, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for little, or None where this user may mount none."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(place)], capture_output=True
    )
    yield place if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_full_disk_is_told_and_the_next_call_completes(
    seed, whole, small_disk, tmp_path, monkeypatch
):
    draw = random.Random(seed)
    folder = (small_disk or tmp_path) / "store"
    StoreWriter(folder, IDENTITY)
    for shard in SHARDS[: draw.randrange(20)]:
        StoreWriter(folder, IDENTITY).commit(shard, table_of(shard))
    if small_disk:
        filler = small_disk / "other"
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(room.f_bavail * room.f_bsize - draw.randrange(1, 40_000), 0)))
    else:
        calls = iter([False] * draw.randrange(1, 40) + [True])
        sync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda handle: _full() if next(calls, False) else sync(handle)
        )
    with pytest.raises(
        InfraError, match=r"No space left on device.*free that disk and give the same command"
    ):
        finish(folder)
    left = {p for p in folder.rglob("*") if p.is_file()}
    assert not [p for p in left if p.suffix == ".tmp"], "what did not fit stays and fills the disk"
    assert not (folder / "_MANIFEST.json").exists()
    if small_disk:
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    finish(folder)
    check_whole(folder, whole)


def _full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["data", "footer"])
def test_three_hundred_flipped_bits_are_never_accepted(where, whole):
    """Each shard by itself, so that the place of a flip is known: the pages, or the footer and its
    length.
    """
    draw = np.random.default_rng(0)
    seen = 0
    for record in (Store(whole).manifest["shards"][i] for i in draw.integers(0, len(SHARDS), 300)):
        path = whole / record["file"]
        size = path.stat().st_size
        footer = int.from_bytes(path.read_bytes()[-8:-4], "little") + 8
        end_of_data = size - footer
        first = 0 if where == "data" else end_of_data
        last = end_of_data if where == "data" else size
        byte = int(draw.integers(first, last))
        bit = int(draw.integers(8))
        flip(path, byte, bit)
        view = Store.of_shards(whole, [record])
        with pytest.raises(StoreError, match="is damaged"):
            list(view.shards(record["split"]))
        flip(path, byte, bit)
        seen += 1
    assert seen == 300
    assert read_json(whole / "_MANIFEST.json")["shards"][0] == Store(whole).manifest["shards"][0]
