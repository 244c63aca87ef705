"""A node that shares no folder is named; one that is killed while it scores changes nothing."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command import ROOT, raykd, start, until

from raykd.errors import InfraError
from raykd.orchestration import cluster

pytestmark = pytest.mark.ray
SHARDS = ("--set", "store.rows_per_shard=32", "--set", "data.stride=16")
ACTORS = 3  # one on each of the CPUs: two of this process's node and one of the other


def living(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it that have not ended."""
    family = [process, *process.children(recursive=True)]
    return [member for member in family if member.status() != psutil.STATUS_ZOMBIE]


def is_scorer(process: psutil.Process) -> bool:
    try:
        return any("MapWorker" in part for part in process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def node(session) -> Iterator[psutil.Process]:
    """A second node of the run's cluster, with one CPU, in processes that can be killed."""
    import ray

    # a folder of its own, or Ray keeps this cluster as the last one of the whole machine; a short
    # name, because sockets lie below it
    folder = tempfile.mkdtemp(prefix="rk")
    options = ("--num-cpus", "1", "--node-name", "second", "--dashboard-agent-listen-port", "0")
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *options]
    before = len([n for n in ray.nodes() if n["Alive"]])
    with subprocess.Popen(
        [*command, "--address", session["RAY_ADDRESS"], "--temp-dir", folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as started:
        found = psutil.Process(started.pid)
        until(lambda: len([n for n in ray.nodes() if n["Alive"]]) > before)
        try:
            yield found
        finally:
            for process in living(found):
                process.send_signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs a folder for each process")
def test_a_node_that_does_not_see_the_folder_is_named_before_any_work(node, tmp_path, monkeypatch):
    """It scored every row into its own, and was then asked to score again."""
    cluster.check_shared([tmp_path])
    monkeypatch.chdir(tmp_path)
    own = Path("/proc/self/cwd/out")  # which every process reads as a folder of its own
    with pytest.raises(InfraError, match=r"node second \(.*\) does not see .*cwd/out; .*--out"):
        cluster.check_shared([tmp_path, own])
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert not list((tmp_path / "out").iterdir())


def test_a_node_killed_while_scoring_changes_no_byte_of_the_manifest(node, tiny, session, tmp_path):
    """One loss costs one restart, however often tasks fail until Ray knows of the dead node."""
    out = tmp_path / "out"
    scale = ("--set", f"scale.scorers={ACTORS}", "--set", "scale.retries=1")
    running = start(
        tmp_path,
        "score",
        tiny,
        "--out",
        out,
        *scale,
        *SHARDS,
        **session,
    )
    until(lambda: any(map(is_scorer, living(node))) and list(out.glob("stores/*/_commits/*.json")))
    for process in living(node):
        process.send_signal(signal.SIGKILL)
    assert not list(out.glob("stores/*/_MANIFEST.json")), "the kill came too late"
    done = running.wait()
    assert done.code == 0, done.err
    assert "constructor arguments" not in done.err  # an error of Ray's at the start of each scoring
    alone = tmp_path / "alone"
    reference = raykd(tmp_path, "score", tiny, "--out", alone, *SHARDS, **session)
    assert reference.code == 0, reference.err
    (manifest,) = out.glob("stores/*/_MANIFEST.json")
    (wanted,) = alone.glob("stores/*/_MANIFEST.json")
    assert manifest.parent.name == wanted.parent.name
    assert manifest.read_bytes() == wanted.read_bytes()
