"""What tests share: a local Ray cluster for the whole run, a recipe over the shipped gestures, an
environment apart.
"""

import gc
import importlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from command import PATIENT
from hypothesis import HealthCheck, settings
from recipes import TINY

from raykd.orchestration.session import QUIET
from raykd.recipe import imports

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes share the cores
settings.register_profile("laws", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laws")  # how long an example takes is the machine's matter, and no law
COMMANDS = {"test_forms", "test_jobs", "test_readme"}  # start Ray by other means than `command`
# share a new environment, or files of encoders
TOGETHER = dict.fromkeys(("test_alone", "test_text_artefact", "test_onnx_write"), "apart")
LONGEST = (  # the first to be given to a process, so that all end together
    "ray",
    "commands",
    "apart",
    "test_onnx_write_decoder",
    "test_onnx_write_stream",
    "test_source",
    "test_techniques",
    "test_loop",
    "test_speculative",
    "test_phases",
    "test_store_chaos",
    "test_stored_logits",
    "test_embedding",
    "test_row_activations",
    "test_own_rows",
    "test_store",
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its group for pytest -n with --dist loadgroup, and sort, longest first.

    A module's tests stay together. Those on the shared Ray cluster are one group and those that
    start clusters of their own another, so that at most two clusters run beside each other.
    """
    modules = {name: list(tests) for name, tests in groupby(items, key=_module)}
    groups = {name: _group(name, tests) for name, tests in modules.items()}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[_module(item)]))
    rank = {group: place for place, group in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(groups[_module(item)], len(rank)))


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how long each process of pytest -n was busy; all should end together."""
    busy_s: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "node"):
                busy_s[report.node.gateway.id] += report.duration
    if busy_s:
        told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in sorted(busy_s.items()))
        terminalreporter.write_line(f"busy: {told}")


def _module(item: pytest.Item) -> str:
    return item.path.stem


def _group(module: str, tests: list[Any]) -> str:
    """By the shared cluster, or by a command line of its own."""
    if any("cluster" in test.fixturenames for test in tests):
        return "ray"
    imported = {getattr(value, "__module__", None) for value in vars(tests[0].module).values()}
    if module in COMMANDS or "command" in imported:
        return "commands"
    return TOGETHER.get(module, module)


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory) -> None:
    """For every process of the tests: a cache of their own, and Ray's token and settings before
    anything imports Ray.

    Ray settles on a way to authenticate when it is first imported.
    """
    os.environ["RAYKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for key, value in (QUIET | PATIENT).items():
        os.environ.setdefault(key, value)


@pytest.fixture(scope="session", autouse=True)
def _one_registry() -> None:
    """One registry of ONNX operators for all exports of this process."""
    importlib.import_module("exporter")


@pytest.fixture(autouse=True)
def _no_left_imports(tmp_path_factory) -> Iterator[None]:
    """No module that a test imports from a temporary folder answers to its name in a later test,
    and no package that it permits stays permitted.
    """
    before = set(sys.modules)
    permitted = set(imports._permitted)
    yield
    imports._permitted.clear()
    imports._permitted.update(permitted)
    temporary = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(temporary):
            del sys.modules[name]


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
def session(cluster) -> dict[str, str]:
    """The environment that leads a command to the shared cluster."""
    return {"RAY_ADDRESS": cluster} | {
        key: os.environ[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A recipe of tens of steps; `SEARCH` added to it makes one of three trials."""
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
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    if done.returncode and re.search(r"No matching distribution|Connection|resolve", done.stderr):
        pytest.skip("no package index to install numpy and onnxruntime from")
    assert done.returncode == 0, done.stderr
    return where / "bin" / "python"
