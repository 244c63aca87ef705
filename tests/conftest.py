"""What tests share: a local Ray cluster for the whole run, a recipe over the shipped gestures, an
environment apart.
"""

import os
import re
import secrets
import shutil
import subprocess
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from recipes import TINY

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: two processes share the cores
RAY = {"test_forms", "test_jobs", "test_readme"}  # start it by other means
TOGETHER = {"test_alone": "apart", "test_text_artefact": "apart"}  # ask for one new environment


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest -n and --dist loadgroup a module's tests stay together, and all that start Ray in
    one process.
    """
    rays = {name for name, own in groupby(items, key=_module) if any(map(_starts_ray, own))}
    for item in items:
        group = "ray" if _module(item) in rays else TOGETHER.get(_module(item), _module(item))
        item.add_marker(pytest.mark.xdist_group(group))


def _module(item: pytest.Item) -> str:
    return item.path.stem


def _starts_ray(item: Any) -> bool:
    """By the cluster, or by a command line of its own."""
    imported = {getattr(value, "__module__", None) for value in vars(item.module).values()}
    return "cluster" in item.fixturenames or "command" in imported or _module(item) in RAY


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory) -> None:
    """For every process of the tests: a cache of their own, and Ray's token before anything imports
    Ray.

    Ray settles on a way to authenticate when it is first imported.
    """
    os.environ["RAYKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of the run's one Ray cluster: on loopback, behind a token, in and with this
    process.
    """
    import ray

    from raykd.orchestration.session import connect

    connect()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A recipe of tens of steps; `SEARCH` added to it makes one of four trials."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def scored(cluster, tiny, tmp_path_factory) -> Path:
    """An --out that holds nothing but the tiny recipe's teacher store."""
    from raykd.stages import walk
    from raykd.stages.load import load

    out = tmp_path_factory.mktemp("scored")
    assert walk.score(load(tiny), out)
    shutil.rmtree(next(out.glob("tiny-*")))
    return out


@pytest.fixture
def stocked(scored, tmp_path) -> Callable[[str], Path]:
    """New --out folders by name, each with a copy of the store: equal recipes are trained apart in
    them.
    """

    def new(name: str) -> Path:
        return Path(shutil.copytree(scored, tmp_path / name))

    return new


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Path:
    """The interpreter of a new environment with numpy, onnxruntime and nothing of ours, in the
    versions of this one.
    """
    where = tmp_path_factory.mktemp("alone") / "venv"
    venv.create(where, with_pip=True)
    wanted = [f"{name}=={metadata.version(name)}" for name in ("numpy", "onnxruntime")]
    install = [where / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted]
    done = subprocess.run(install, capture_output=True, text=True, timeout=240)
    if done.returncode and re.search(r"No matching distribution|Connection|resolve", done.stderr):
        pytest.skip("no package index to install numpy and onnxruntime from")
    assert done.returncode == 0, done.stderr
    return where / "bin" / "python"
