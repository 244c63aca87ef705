"""A node of the cluster is killed while it scores: the job ends as an undisturbed one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command import ROOT, raykd, start, until

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


@pytest.fixture
def node(session) -> Iterator[psutil.Process]:
    """A second node of the run's cluster, with one CPU, in processes that can be killed."""
    import ray

    options = ("--num-cpus", "1", "--node-name", "second", "--dashboard-agent-listen-port", "0")
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *options]
    before = len([n for n in ray.nodes() if n["Alive"]])
    with subprocess.Popen(
        [*command, "--address", session["RAY_ADDRESS"]],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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


def test_a_node_killed_while_scoring_changes_no_byte_of_the_manifest(node, tiny, session, tmp_path):
    """Its tasks were tried again at once, three times each, and the job failed."""
    out = tmp_path / "out"
    running = start(
        tmp_path,
        "score",
        tiny,
        "--out",
        out,
        "--set",
        f"scale.scorers={ACTORS}",
        *SHARDS,
        **session,
    )
    until(lambda: any(map(is_scorer, living(node))) and list(out.glob("stores/*/_commits/*.json")))
    for process in living(node):
        process.send_signal(signal.SIGKILL)
    assert not list(out.glob("stores/*/_MANIFEST.json")), "the kill came too late"
    done = running.wait()
    assert done.code == 0, done.err
    alone = tmp_path / "alone"
    reference = raykd(tmp_path, "score", tiny, "--out", alone, *SHARDS, **session)
    assert reference.code == 0, reference.err
    (manifest,) = out.glob("stores/*/_MANIFEST.json")
    (wanted,) = alone.glob("stores/*/_MANIFEST.json")
    assert manifest.parent.name == wanted.parent.name
    assert manifest.read_bytes() == wanted.read_bytes()
