"""What is asked of a cluster before any work: its devices, its room, and that its nodes share the
folders.
"""

import re
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from raykd.console import say
from raykd.errors import InfraError, Problem, RecipeError
from raykd.files import waiting
from raykd.files.address import Address, is_url
from raykd.models.device import on_device, training_device
from raykd.orchestration import session
from raykd.orchestration.session import connect, last_line, named_cluster
from raykd.recipe.recipe import Recipe

SHARE = (
    "nodes must share --out: name a folder of a shared disk, or, to score only, put scale.store in "
    "a bucket"
)
SEEN_S = 300  # for all nodes to look into a folder: a busy one starts a process in minutes
WAITING_S = 30  # between words of what is waited for
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # how a path begins that was a URL
UNPACKED = "runtime_resources/working_dir_files"  # where Ray unpacks a job's working directory


def begin(recipe: Recipe, address: str | None, stores: Address, run: Path | None = None) -> None:
    """Be connected to a cluster that can carry a recipe out.

    `run` is the run folder where workers are to train. RecipeError names the key that asks for more
    than the cluster has. InfraError names a node that does not see a folder that it needs.
    """
    connect(address, dashboard=recipe.scale.workers[1] > 1)
    check_device(recipe)
    folders = [Path(folder) for folder in (stores, run) if folder and not is_url(folder)]
    if run:
        check_room(recipe)
    check_shared(folders)


def trains_elsewhere(recipe: Recipe) -> bool:
    """Whether training is given to workers: several, or one where this process has no GPU."""
    if recipe.scale.workers[1] > 1:
        return True
    return not torch.cuda.is_available() and placed(recipe).scale.device == "cuda"


def is_here(recipe: Recipe, address: str | None) -> bool:
    """Whether training can do without a cluster: one worker, with the device that it asks for."""
    if recipe.scale.workers[1] > 1:
        return False
    if named_cluster(address) is None or recipe.scale.device == "cpu":
        return True
    return torch.cuda.is_available()


def check_here(recipe: Recipe, address: str | None) -> None:
    """RecipeError where there is no cluster but this machine, and it lacks the device or the
    compiler asked for.
    """
    if named_cluster(address) is None:
        training_device(recipe)


def placed(recipe: Recipe) -> Recipe:
    """The recipe with the device that the cluster's workers will run it on.

    What counts is the cluster's GPUs: this process may be on a node without one.
    """
    device = recipe.scale.device
    if device == "auto":
        device = "cuda" if _has_gpus() else "cpu"
    return on_device(recipe, device)


def check_device(recipe: Recipe) -> None:
    """RecipeError where `scale.device` is "cuda" and the cluster has no GPU, now or ever."""
    if recipe.scale.device == "cuda" and not _has_gpus() and not _greatest().get("GPU"):
        text = '"cuda", but no node of the cluster has a GPU; set it to "auto" or "cpu"'
        raise RecipeError([Problem("scale.device", text)])


def check_room(recipe: Recipe) -> None:
    """RecipeError where the least number of workers is more than the cluster will ever have room
    for.
    """
    least, most = recipe.scale.workers
    if most == 1:
        return
    share = {"CPU": 1.0}
    if placed(recipe).scale.device == "cuda":
        share["GPU"] = 1.0
    room = fitting(share)
    if room >= least:
        return
    needs = " and ".join(f"1 {kind}" for kind in share)
    text = (
        f"{least} workers of {needs} each, but the cluster has room for {room} ({described()}); "
        "lower it, or add nodes"
    )
    raise RecipeError([Problem("scale.workers", text)])


def fitting(share: dict[str, float]) -> int:
    """How many actors of these resources the nodes have room for, were they idle."""
    now = sum(_fitting_in(node["Resources"], share) for node in nodes())
    return max(now, _fitting_in(_greatest(), share))


def described() -> str:
    """The cluster's nodes and resources, and what of them is free."""
    import ray

    everything = ray.cluster_resources()
    free = ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if kind == "CPU" or everything.get(kind)]
    amounts = [f"{free.get(kind, 0):g} of {everything.get(kind, 0):g} {kind}s" for kind in kinds]
    count = len(nodes())
    return f"{count} node{'s' if count != 1 else ''}, {' and '.join(amounts)} free"


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _fitting_in(resources: dict[str, Any], share: dict[str, float]) -> int:
    return min(int(resources.get(kind, 0) / amount) for kind, amount in share.items())


def _greatest() -> dict[str, Any]:
    """What an autoscaler may bring the cluster to; nothing where none has said so."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def _has_gpus() -> bool:
    """Whether workers can have a GPU."""
    import ray

    if not ray.is_initialized():
        return torch.cuda.is_available()
    has_any = ray.cluster_resources().get("GPU", 0) > 0
    return has_any and (torch.cuda.is_available() or not session.is_embedded())


def check_shared(folders: list[Path]) -> None:
    """InfraError names a node that does not see what this one writes into a folder."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    own = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes() if node["NodeID"] != own and node["Resources"].get("CPU")]
    if not others or not folders:
        return
    word = secrets.token_hex(16)
    files = [folder / f".raykd-{word}" for folder in folders]
    calls = {}
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(word)
        for node in others:
            calls[node["NodeID"]] = _at(node["NodeID"]).remote([str(file) for file in files], word)
        end = time.monotonic() + SEEN_S
        for node in others:
            where = f"{node['NodeName']} ({node['NodeManagerAddress']})"
            try:
                unseen = _answer(calls[node["NodeID"]], where, end)
            except RayError as error:
                if node["NodeID"] not in {other["NodeID"] for other in nodes()}:
                    continue  # it was lost just before, and is not worked with
                if isinstance(error, GetTimeoutError):
                    raise InfraError(f"node {where} did not answer within {SEEN_S} s") from None
                raise InfraError(f"node {where} cannot run raykd: {last_line(error)}") from None
            if unseen:
                raise InfraError(_unseen(where, unseen))
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _answer(call: Any, node: str, end: float) -> list[str]:
    """What a node says; that it is waited for is said every half minute."""
    import ray
    from ray.exceptions import GetTimeoutError

    while True:
        left = end - time.monotonic()
        try:
            return ray.get(call, timeout=max(0, min(left, WAITING_S)))
        except GetTimeoutError:
            if left <= WAITING_S:
                raise
            say("nodes", f"waits for node {node} to look into shared folders: {described()}")


def _unseen(node: str, files: list[str]) -> str:
    folders = ", ".join(str(Path(file).parent) for file in files)
    return f"node {node} does not see what is written to {folders}; {SHARE}"


def check_seen(folder: Path) -> None:
    """InfraError where this node does not see a folder that the command has made.

    A node may have joined after all were asked.
    """
    if not folder.is_dir():
        raise InfraError(f"{folder} is not seen here; {SHARE}")


def _at(node: str) -> Any:
    """The task that looks for files, on one node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=1)(waiting.unseen_files)
    return task.options(scheduling_strategy=there)


def check_stays(name: str, folder: Path) -> None:
    """RecipeError where results would lie in a folder that Ray unpacks a job into, and deletes, or
    where an address was given for a folder.

    `name` is what names the folder: an option, or a key of the recipe.
    """
    scheme = SCHEME.match(folder.as_posix())
    if scheme:
        url = folder.as_posix().replace(":/", "://", 1)
        raise RecipeError(
            f"{name} {url}: a run lies in a folder that all nodes share, which no address names; "
            "stores and prepared rows may be in a bucket: --out /shared/runs --set "
            f"scale.store={url}"
        )
    if UNPACKED in folder.absolute().as_posix():
        raise RecipeError(
            f"{name} {folder}: lies in the folder that Ray unpacked this job's working directory "
            "into and will delete; name a folder that stays, such as --out /shared/runs"
        )
