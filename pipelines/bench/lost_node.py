"""Whether a job outlives a node: one of three is killed while they score and while they train.

    python -m pipelines.bench.lost_node [--smoke] [--rounds N] [--seed N]

Three Ray nodes of one CPU each start on this machine, each with an address of loopback and a folder
of its own, behind one token. A recipe is scored and trained once undisturbed, and trained once more
to see how far two undisturbed trainings lie apart. Then, N times each, `raykd score` and `raykd
train` are disturbed: at a random moment of the work, one node that takes part in it and is not the
command's own is killed by SIGKILL, with every process below it. Another takes its place for the
next round. The last line is a JSON object: how many jobs ended with 0, how many manifests are equal
to the byte, and the greatest distance of a weight from the undisturbed training's.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from pipelines.bench.table import machine

ROOT = Path(__file__).parents[2]
HEAD = "127.0.0.2"  # Ray takes 127.0.0.1 for this machine's address outside loopback
OTHERS = ("127.0.0.3", "127.0.0.4")
APART = 1e-3  # a lost or repeated step moves weights by the learning rate, 2e-3
LIMIT_S = 900.0
STORE_BYTES = 200_000_000
SCORER = "MapWorker"
WORKER = "RayTrainWorker"
RECIPE = f"""
name = "lost"
[data]
stride = 4
[teacher]
weights = "{ROOT / "examples" / "gesture" / "teacher.safetensors"}"
settings = {{ width = 96, layers = 3, heads = 4 }}
[student.settings]
width = 16
layers = 1
[store]
rows_per_shard = 64
[optim]
steps = 150
batch = 512
evaluate_every = 10
[scale]
scorers = 3
workers = 2
checkpoint_every = 10
"""

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one round, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="of scoring and of training")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the moments")
    options = parser.parse_args()
    rounds = 1 if options.smoke else options.rounds
    print(f"{machine()}, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as place, three_nodes() as nodes:
        bench = Bench(Path(place), nodes, np.random.default_rng(options.seed))
        bench.prepare()
        scored = [bench.disturbed_scoring(number) for number in range(rounds)]
        trained = [bench.disturbed_training(number) for number in range(rounds)]
    told = {
        "score.nodes_killed": len(scored),
        "score.jobs_that_succeeded": sum(each["code"] == 0 for each in scored),
        "score.manifests_equal": sum(each["is_equal"] for each in scored),
        "train.nodes_killed": len(trained),
        "train.jobs_that_succeeded": sum(each["code"] == 0 for each in trained),
        "train.weights_apart": max(each["apart"] for each in trained),
        "train.weights_apart_undisturbed": bench.apart,
        "train.stated_error": APART,
    }
    print(json.dumps(told))
    good = [each["code"] == 0 and each["is_equal"] for each in (*scored, *trained)]
    if not all(good):
        sys.exit("a job did not outlive a node, or gave something else")


@dataclass
class Node:
    """A Ray node: the process that started it, which is above all of its others."""

    ip: str
    process: psutil.Process
    folder: Path

    def living(self) -> list[psutil.Process]:
        """Its processes that have not ended."""
        try:
            family = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [member for member in family if _is_alive(member)]

    def runs(self, kind: str) -> bool:
        """Whether one of its processes is an actor of a kind."""
        return any(kind in word for member in self.living() for word in _words(member))

    def kill(self) -> None:
        """End all of it at once, as a machine does that loses its power."""
        family = self.living()
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)


class Nodes:
    """Three nodes of one cluster; the first is the head, on which commands run."""

    def __init__(self) -> None:
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.port = _free_port()
        self.all: dict[str, Node] = {}

    @property
    def address(self) -> str:
        return f"{HEAD}:{self.port}"

    def start(self, ip: str) -> None:
        """A node in the place of one that was, or of none; returns once the cluster has it."""
        folder = Path(tempfile.mkdtemp(prefix="rk"))  # short: Ray's sockets lie below it
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += ["--num-cpus", "1", "--node-ip-address", ip, "--node-name", ip]
        command += ["--object-store-memory", str(STORE_BYTES), "--temp-dir", str(folder)]
        command += ["--dashboard-agent-listen-port", str(_free_port())]
        if ip == HEAD:
            command += ["--head", "--port", str(self.port), "--dashboard-host", HEAD]
            command += ["--dashboard-port", str(_free_port())]
            command += ["--ray-client-server-port", str(_free_port())]
        else:
            command += ["--address", self.address]
        with (folder / "log").open("w") as log:
            started = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.all[ip] = Node(ip, psutil.Process(started.pid), folder)
        _until(lambda: "Ray runtime started" in (folder / "log").read_text(), started)

    def command(self, *words: Path | str, log: Path) -> subprocess.Popen[bytes]:
        """`raykd WORDS` on the head's node, under way; what it says goes to a file."""
        asked = [sys.executable, "-m", "raykd.cli", *map(str, words)]
        with log.open("w") as file:
            return subprocess.Popen(
                asked,
                env=self.environment | {"RAY_ADDRESS": self.address},
                cwd=log.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
            )


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """The nodes, which end with the block."""
    nodes = Nodes()
    try:
        for ip in (HEAD, *OTHERS):
            nodes.start(ip)
        yield nodes
    finally:
        for node in reversed(nodes.all.values()):
            node.kill()


class Bench:
    """Undisturbed results in a folder, and disturbed ones that are compared with them."""

    def __init__(self, place: Path, nodes: Nodes, draws: np.random.Generator):
        self.place = place
        self.nodes = nodes
        self.draws = draws
        self.recipe = place / "recipe.toml"
        self.recipe.write_text(RECIPE)
        self.shards = 0  # of the undisturbed store
        self.steps = 0  # of all arms together
        self.apart = 0.0  # of two undisturbed trainings

    def prepare(self) -> None:
        """Score and train undisturbed, and train once more."""
        out = self.place / "alone"
        self._undisturbed("score", out)
        self.shards = len(_commits(out))
        shutil.copytree(out / "stores", self.place / "again" / "stores")
        self._undisturbed("train", out)
        self.steps = _done(out)
        self._undisturbed("train", self.place / "again")
        self.apart = distance(self.place / "again", out)
        print(
            f"undisturbed: {self.shards} shards, {self.steps} steps, weights of two trainings "
            f"{self.apart:.1e} apart",
            flush=True,
        )

    def disturbed_scoring(self, number: int) -> Record:
        """Kill a node while it scores, once a random share of the shards is done."""
        share = self.draws.uniform(0, 0.8)

        def is_time(out: Path) -> bool:
            return 1 + share * self.shards <= len(_commits(out))

        out, told = self._disturbed("score", number, is_time, SCORER)
        found = [path.read_bytes() for path in out.glob("stores/*/_MANIFEST.json")]
        alone = [path.read_bytes() for path in self.place.glob("alone/stores/*/_MANIFEST.json")]
        told["is_equal"] = found == alone
        print(f"score: {json.dumps(told)}", flush=True)
        return told

    def disturbed_training(self, number: int) -> Record:
        """Kill a node while it trains, once a random share of all arms' steps is done."""
        share = self.draws.uniform(0, 0.8)
        wait_s = self.draws.uniform(0, 1)  # workers tell their steps at evaluations
        reached: list[float] = []

        def is_time(out: Path) -> bool:
            if not reached and share * self.steps < _done(out):
                reached.append(time.monotonic())
            return bool(reached) and time.monotonic() - reached[0] >= wait_s

        out, told = self._disturbed("train", number, is_time, WORKER)
        told["apart"] = distance(out, self.place / "alone")
        told["is_equal"] = told["apart"] <= APART
        print(f"train: {json.dumps(told)}", flush=True)
        return told

    def _undisturbed(self, verb: str, out: Path) -> None:
        log = self.place / f"{out.name}-{verb}.log"
        code = self.nodes.command(verb, self.recipe, "--out", out, log=log).wait(LIMIT_S)
        if code:
            sys.exit(f"raykd {verb} ended with {code}, undisturbed:\n{log.read_text()}")

    def _disturbed(
        self, verb: str, number: int, is_time: Callable[[Path], bool], kind: str
    ) -> tuple[Path, Record]:
        """Carry a verb out and kill one of the nodes that run a kind of actor when it is time."""
        out = self.place / f"{verb}-{number}"
        if verb == "train":
            shutil.copytree(self.place / "alone" / "stores", out / "stores")
        log = self.place / f"{out.name}.log"
        began = time.monotonic()
        running = self.nodes.command(verb, self.recipe, "--out", out, log=log)
        victims: list[str] = []

        def has_victim() -> bool:
            if is_time(out):
                victims[:] = [ip for ip in OTHERS if self.nodes.all[ip].runs(kind)]
            return bool(victims)

        _until(has_victim, running)
        lost = str(self.draws.choice(victims))
        at = len(_commits(out)) if verb == "score" else _done(out)
        told: Record = {"node": lost, "shards" if verb == "score" else "steps": at}
        self.nodes.all[lost].kill()
        told["was_running"] = running.poll() is None
        killed = time.monotonic()
        told["code"] = running.wait(LIMIT_S)
        ended = time.monotonic()
        told["seconds_before"] = round(killed - began, 1)
        told["seconds_after"] = round(ended - killed, 1)
        if told["code"]:
            print(log.read_text()[-2000:], flush=True)
        if not told["was_running"]:
            sys.exit(f"raykd {verb} had ended before the node was killed; try again")
        self.nodes.start(lost)
        return out, told


def distance(out: Path, reference: Path) -> float:
    """The greatest difference of any weight of any arm; infinite where one lacks an arm."""
    greatest = 0.0
    paths = [sorted(folder.glob("*/arms/*/weights.safetensors")) for folder in (out, reference)]
    names = [[path.parts[-4:] for path in found] for found in paths]
    if names[0] != names[1] or not names[0]:
        return float("inf")
    for one, other in zip(*(map(load_file, found) for found in paths), strict=True):
        for name, tensor in one.items():
            greatest = max(greatest, float(np.abs(tensor - other[name]).max()))
    return greatest


def _commits(out: Path) -> list[Path]:
    return list(out.glob("stores/*/_commits/*.json"))


def _done(out: Path) -> int:
    """The steps of all arms that the workers have told of, in whole lines; 0 without workers."""
    lines = [
        json.loads(line)
        for path in out.glob("lost-*/progress.jsonl")
        for line in path.read_text().split("\n")[:-1]
    ]
    arms = {line["arm"] for line in lines}
    return sum(max(line["step"] for line in lines if line["arm"] == arm) for arm in arms)


def _until(true: Callable[[], Any], running: subprocess.Popen[bytes]) -> None:
    """Wait for something to become true while a process runs."""
    end = time.monotonic() + LIMIT_S
    while not true():
        if running.poll() is not None:
            sys.exit(f"{running.args} ended too early, with {running.returncode}")
        if time.monotonic() > end:
            sys.exit(f"nothing came within {LIMIT_S:.0f} s of {running.args}")
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
