"""What is said before Ray is started or asked for anything: a dead address, a name that is too
long, a device that is not there, workers that will never fit, results where Ray deletes them.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import ROOT

from raykd import data
from raykd.errors import DataError, Diverged, InfraError, Problem, RecipeError
from raykd.files import waiting
from raykd.models.device import device_of
from raykd.orchestration import cluster, session, training, tuning
from raykd.orchestration.scoring import ShardActor
from raykd.recipe.recipe import Recipe
from raykd.stages import doctor
from raykd.stages.load import load
from raykd.stages.run_folder import RunFolder
from raykd.teacher.scorer import Header, Scorer
from raykd.training.arm import ONE_PROCESS

LIMIT_S = 200  # Ray's own tries go on for minutes


def recipe_of(**scale: Any) -> Recipe:
    return Recipe.model_validate({"terms": {"ce": {}}, "scale": scale})


@pytest.fixture
def loopback(monkeypatch) -> None:
    """As `cluster/local.sh env` has it: an address on loopback is taken as it is."""
    import ray._private.services as services

    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("speaks", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_where_no_head_answers_is_told_at_once(speaks, monkeypatch):
    """A closed port, a server that says nothing, and one of another kind."""
    monkeypatch.setattr(session, "KNOCK_S", 2)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answering = Thread(target=answer, args=(server, speaks), daemon=True)
        if speaks is None:
            server.close()
        else:
            answering.start()
        with pytest.raises(InfraError, match=rf"no Ray head answers at 127\.0\.0\.1:{port}"):
            session.knock(f"127.0.0.1:{port}")
        if answering.ident:
            answering.join(LIMIT_S)
    assert time.monotonic() - started < LIMIT_S


@pytest.mark.usefixtures("loopback")
def test_the_last_cluster_of_the_machine_is_knocked_at_too(monkeypatch, tmp_path):
    """`auto` is the last that began here, or one that runs; Ray tried the dead for minutes."""
    import ray._private.services as services

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    with pytest.raises(InfraError, match=r"auto names no Ray head: Could not find any"):
        session.knock("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    with pytest.raises(InfraError, match=rf"no Ray head answers at 127\.0\.0\.1:{port}"):
        session.knock("auto")
    with pytest.raises(InfraError, match=rf"no Ray head answers at ray://127\.0\.0\.1:{port}"):
        session.knock(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999", "127.0.0.1:x", "//"])
def test_what_is_no_address_is_told(address, monkeypatch):
    with pytest.raises(InfraError, match=r"names no Ray head.*name HOST:PORT"):
        session.knock(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert not doctor._cluster()["ok"]


def test_the_doctor_knocks_as_commands_do(monkeypatch):
    """It took RAY_ADDRESS=local for a cluster, and any open port for a head."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert doctor._cluster()["ok"]
    assert doctor._auth()["ok"]
    monkeypatch.setattr(session, "KNOCK_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        found = doctor._cluster()
    assert not found["ok"]
    assert "cluster/local.sh start" in found["do"]


def answer(server: socket.socket, words: bytes) -> None:
    """Take one connection, say something, and wait until the other side closes."""
    connection, _ = server.accept()
    with connection, suppress(ConnectionError):
        connection.sendall(words)
        while connection.recv(4096):
            continue


def test_a_command_at_a_dead_address_ends_with_code_5(tiny, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PYTHONPATH": str(ROOT),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    command = [sys.executable, "-m", "raykd.cli", "score", str(tiny), "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 5, done.stderr
    assert f"no Ray head answers at 127.0.0.1:{port}" in done.stderr
    assert "unset RAY_ADDRESS" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(variable, monkeypatch):
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "/tmp/" + "x" * 90)
    with pytest.raises(InfraError, match=rf"^{variable}: .* 95 bytes.* 107 bytes"):
        session.prepare()
    monkeypatch.setenv(variable, "/tmp")
    session.prepare()


@pytest.mark.parametrize(
    "inherited",
    [
        {},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "k8s", "RAY_AUTH_TOKEN": ""},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "one's own"},
    ],
)
def test_an_embedded_cluster_has_a_token_whatever_was_inherited(inherited, monkeypatch):
    """With RAY_AUTH_MODE=disabled any user of the machine could run code in it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    tokens = []
    for _ in range(2):
        session.prepare()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.append(os.environ["RAY_AUTH_TOKEN"])
    assert tokens[0] == tokens[1]
    assert tokens[0] == inherited.get("RAY_AUTH_TOKEN") or len(tokens[0]) == 64
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    session.prepare("127.0.0.1:6379")  # whose head decides
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_what_ray_was_imported_for_first_does_not_settle_its_token(tmp_path):
    """Training in this process imports Ray without a cluster; a search then starts one.

    None of its processes runs what lies beside the recipe under a name of Python's library.
    """
    for name in ("random", "secrets", "queue", "platform", "packaging"):
        (tmp_path / f"{name}.py").write_text("import sys\nopen('ran', 'a').write(__name__)\n")
    (tmp_path / "mine.py").write_text("def seven(): return 7")
    code = (
        "import ray.train\n"
        "from raykd.orchestration.session import connect\n"
        "connect()\n"
        "import ray\n"
        "seven = ray.remote(num_cpus=0)(lambda: __import__('mine').seven())\n"
        "assert ray.get(seven.remote()) == 7\n"
        "import os\n"
        "assert 'PYTHONSAFEPATH' not in os.environ\n"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=plain | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_an_embedded_cluster_is_nobody_elses(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert session.named_cluster() is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert session.named_cluster() == "10.0.0.1:6379"
    assert session.named_cluster("local") is None


def test_results_are_not_put_where_ray_deletes_them(monkeypatch, tmp_path):
    unpacked = tmp_path / "session" / "runtime_resources/working_dir_files/_ray_pkg_1/deep"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    with pytest.raises(RecipeError, match=r"--out runs: .*name a folder that stays"):
        RunFolder(recipe_of(), Path("runs"))
    assert RunFolder(recipe_of(), tmp_path / "runs").out == tmp_path / "runs"
    with pytest.raises(RecipeError, match=r"scale\.store .*/deep/stores: .*folder that stays"):
        RunFolder(recipe_of(store=str(unpacked / "stores")), tmp_path / "runs")
    RunFolder(recipe_of(store="s3://bucket/stores"), tmp_path / "runs")


@pytest.mark.parametrize("store", ["stores", Path("stores"), "s3://bucket/stores"])
def test_what_nodes_must_share_is_asked_of_every_folder(store, monkeypatch, tmp_path):
    """A folder of `scale.store` is a string, which was taken for a bucket."""
    asked: list[Path] = []
    for name in ("connect", "check_device", "check_room"):
        monkeypatch.setattr(cluster, name, lambda *_, **__: None)
    monkeypatch.setattr(cluster, "check_shared", asked.extend)
    cluster.begin(recipe_of(), None, store, tmp_path)
    folders = [] if "s3" in str(store) else [Path("stores")]
    assert asked == [*folders, tmp_path]


# devices


def test_cuda_where_there_is_none_is_refused_by_its_key(monkeypatch, tiny):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = load(tiny, ("scale.device=cuda",))
    with pytest.raises(RecipeError, match=r"scale\.device: \"cuda\", but torch sees no CUDA"):
        device_of(recipe)
    with pytest.raises(RecipeError, match=r"scale\.device"):
        cluster.check_here(recipe, None)
    cluster.check_here(recipe, "10.0.0.1:6379")  # the cluster may have one
    header = Header.of(recipe, data.load(recipe.data))
    Scorer.check(recipe, header)  # and this process then only reads the teacher


class FakeRay(SimpleNamespace):
    """A cluster of nodes with these resources."""

    def __init__(self, *resources: dict[str, float]):
        self.listed = [
            {"Alive": True, "NodeID": str(number), "Resources": found}
            for number, found in enumerate(resources)
        ]

    def nodes(self) -> list[dict[str, Any]]:
        return self.listed

    def cluster_resources(self) -> dict[str, float]:
        kinds = {kind for node in self.listed for kind in node["Resources"]}
        return {k: sum(n["Resources"].get(k, 0) for n in self.listed) for k in kinds}

    available_resources = cluster_resources


@pytest.fixture
def pretend(monkeypatch) -> Any:
    """Let Ray's public questions be answered by a cluster of given nodes."""
    import ray

    def answer(*resources: dict[str, float]) -> None:
        fake = FakeRay(*resources)
        for name in ("nodes", "cluster_resources", "available_resources"):
            monkeypatch.setattr(ray, name, getattr(fake, name))
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(session, "_embedded", False)
        monkeypatch.setattr(cluster, "_greatest", dict)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return answer


def test_the_clusters_gpus_decide_not_this_process(pretend):
    pretend({"CPU": 4}, {"CPU": 4, "GPU": 2})
    assert cluster.placed(recipe_of()).scale.device == "cuda"
    assert cluster.placed(recipe_of(device="cpu")).scale.device == "cpu"
    cluster.check_device(recipe_of(device="cuda"))
    pretend({"CPU": 4})
    assert cluster.placed(recipe_of()).scale.device == "cpu"
    with pytest.raises(RecipeError, match=r"scale\.device: \"cuda\", but no node"):
        cluster.check_device(recipe_of(device="cuda"))


def test_one_worker_goes_where_the_gpu_is(pretend):
    pretend({"CPU": 4}, {"CPU": 4, "GPU": 1})
    assert training._workers(cluster.placed(recipe_of())) == 1
    assert not cluster.is_here(recipe_of(), "10.0.0.1:6379")
    assert cluster.is_here(recipe_of(), "local")
    assert training._workers(cluster.placed(recipe_of(device="cpu"))) == 0


def test_more_workers_than_will_ever_fit_are_refused_by_their_key(pretend):
    pretend({"CPU": 2}, {"CPU": 1.5})
    cluster.check_room(recipe_of(workers=3))
    cluster.check_room(recipe_of(workers=[3, 9]))
    cluster.check_room(recipe_of(workers=1))
    with pytest.raises(
        RecipeError, match=r"scale\.workers: 4 workers of 1 CPU each, .* room for 3 \(2 nodes"
    ):
        cluster.check_room(recipe_of(workers=4))
    pretend({"CPU": 8}, {"CPU": 8, "GPU": 1})
    with pytest.raises(RecipeError, match=r"2 workers of 1 CPU and 1 GPU each, .* room for 1"):
        cluster.check_room(recipe_of(workers=2))


def test_an_autoscaler_may_still_bring_room(pretend, monkeypatch):
    pretend({"CPU": 1})
    monkeypatch.setattr(cluster, "_greatest", lambda: {"CPU": 64, "GPU": 8})
    cluster.check_room(recipe_of(workers=64))
    cluster.check_device(recipe_of(device="cuda"))


# folders and faults of nodes


def test_a_busy_node_is_waited_for_aloud_and_not_for_ever(monkeypatch, capsys):
    """A node under load took more than the minute that it had."""
    import ray
    from ray.exceptions import GetTimeoutError

    asked: list[float] = []

    def get(call: list[str], timeout: float) -> list[str]:
        asked.append(timeout)
        if call:
            return call.pop()
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(cluster, "described", lambda: "3 nodes")
    monkeypatch.setattr(cluster, "WAITING_S", 0.0)
    end = time.monotonic() + 0.2
    with pytest.raises(GetTimeoutError):
        cluster._answer([], "n2 (10.0.0.2)", end)
    assert time.monotonic() >= end
    assert "waits for node n2 (10.0.0.2)" in capsys.readouterr().err
    assert cluster._answer([["absent"]], "n2", end) == ["absent"]
    assert min(asked) >= 0


def test_a_node_reads_what_another_has_written(tmp_path):
    seen = tmp_path / "seen"
    seen.write_text("word")
    stale = tmp_path / "stale"
    stale.write_text("another")
    absent = tmp_path / "absent"
    files = [str(file) for file in (seen, stale, absent)]
    assert waiting.unseen_files(files, "word", 0) == [str(stale), str(absent)]


@pytest.mark.parametrize(
    "fault", [DataError("bad"), Diverged("bad"), RecipeError([Problem("a.b", "bad")])]
)
def test_a_fault_says_its_node_and_survives_ray(fault, monkeypatch):
    import pickle

    monkeypatch.setattr(session, "node_name", lambda: "n2, 10.0.0.2")
    carried = pickle.loads(pickle.dumps(session.at_node(fault)))
    assert type(carried) is type(fault)
    assert str(carried).endswith("bad (on node n2, 10.0.0.2)")
    wrapped = RuntimeError("workers failed")
    wrapped.worker_failures = {0: ConnectionError("gone"), 1: carried}
    assert session.own_fault(wrapped) is carried
    assert session.plain_error(wrapped, "train") is carried
    assert session.own_fault(InfraError("an actor is lost")) is None


def test_a_scorer_that_cannot_start_tells_why_once(tiny, monkeypatch, tmp_path):
    """Its start succeeds, because Ray would start it anew; its first shard ends the job."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(session, "node_name", lambda: "n2, 10.0.0.2")
    recipe = load(tiny, ("scale.device=cuda",))
    header = Header.of(recipe, data.load(recipe.data))
    actor = ShardActor(recipe, header, str(tmp_path), {})
    with pytest.raises(RecipeError, match=r"scale\.device: .*on node n2"):
        actor({})


def test_a_node_that_came_late_and_does_not_see_the_folders_says_so(tiny, monkeypatch, tmp_path):
    """It wrote a store of its own that nobody read, and lacked progress.jsonl four times."""
    import ray.train

    monkeypatch.setattr(session, "node_name", lambda: "n2, 10.0.0.2")
    absent = tmp_path / "absent"
    recipe = load(tiny)
    header = Header.of(recipe, data.load(recipe.data))
    actor = ShardActor(recipe, header, str(absent), {})
    with pytest.raises(InfraError, match=r"absent is not seen here; .*--out.*on node n2"):
        actor({})
    here = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: here)
    config = {"recipe": load(tiny).model_dump(mode="json"), "folder": str(absent)}
    with pytest.raises(InfraError, match="absent is not seen here"):
        training.train_worker(config)
    with pytest.raises(InfraError, match="absent is not seen here"):
        tuning._train_trial({}, config | {"trial": "t1"}, ONE_PROCESS, lambda _: None)
    assert not absent.exists()


def test_workers_that_never_start_are_told_by_the_recipes_key():
    class WorkerGroupStartupTimeoutError(Exception):
        pass

    told = str(session.plain_error(WorkerGroupStartupTimeoutError("set RAY_TRAIN_..."), "train"))
    assert "scale.start_timeout_s" in told
    assert "RAY_TRAIN" not in told


@pytest.mark.parametrize("url", ["s3://lab/runs", "gs://lab/runs", "https://lab.example/runs"])
def test_an_address_as_out_is_refused_with_what_to_type(url, tmp_path, monkeypatch):
    """It made a folder of that name, `s3:`, on whichever node the command was."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=f"--out {url}: .* --set scale.store={url}"):
        RunFolder(recipe_of(), Path(url))
    assert not list(tmp_path.iterdir())
