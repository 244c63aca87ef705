"""Laws of the layout, read from the source: who imports what, what a light import leaves alone, how
long files are.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raykd

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p for p in (ROOT / "raykd").rglob("*.py") if p.parent.name != "card"
)  # its scripts run elsewhere
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
ALLOWED = {
    "ray": {
        f"orchestration.{name}" for name in ("session", "scoring", "training", "tuning", "teachers")
    },
    "mlflow": {"tracking.mlflow_mirror"},
    "sqlalchemy": {"tracking.mlflow_mirror"},
    "onnxruntime": {"deploy.onnx.session"},
    "obstore": {"files.bucket"},
}
HEAVY = ["torch", *ALLOWED, "pyarrow", "numpy", "matplotlib", "safetensors", "jinja2", "optuna"]
LIGHT = [
    "raykd",
    "raykd.errors",
    "raykd.recipe.recipe",
    "raykd.recipe.digest",
    "raykd.recipe",
    "raykd.recipe.toml",
    "raykd.recipe.imports",
    "raykd.techniques",
    "raykd.cli",
]
LONGEST = 350
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}


def dotted(path: Path) -> str:
    """The module that a file of the package is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """The dotted names that some nodes import; of `from a import b` both a and a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_service_is_imported_only_on_its_own_floor(package):
    found = {
        dotted(path)
        for path, tree in TREES.items()
        if package in packages(imported(ast.walk(tree)))
    }
    assert found == {f"raykd.{name}" for name in ALLOWED[package]}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_service_before_it_is_needed(module):
    assert not packages(imported(TREES[MODULES[module]].body)) & set(ALLOWED)


def test_the_imports_of_the_package_have_no_circle():
    graph = {
        module: {name for name in imported(TREES[path].body) if name in MODULES and name != "raykd"}
        - {module}
        for module, path in MODULES.items()
    }
    for (
        module,
        needs,
    ) in graph.items():  # `from raykd.data import tables` needs tables, not the package around it
        needs -= {name for name in needs if any(other.startswith(f"{name}.") for other in needs)}
        assert all(need in graph for need in needs), module
    order = list(TopologicalSorter(graph).static_order())
    assert (
        order.index("raykd.recipe.tables")
        < order.index("raykd.losses.shared_terms")
        < order.index("raykd.training.run_arms")
    )


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", raykd.__all__)
def test_a_public_name_can_be_imported(name):
    space: dict[str, object] = {}
    exec(f"from raykd import {name}", space)
    assert space[name] is getattr(raykd, name)
    assert callable(space[name])


def test_the_public_names_are_told_once_in_each_place():
    homes = [name for names in raykd.HOMES.values() for name in names]
    guard = next(
        node for node in TREES[ROOT / "raykd" / "__init__.py"].body if isinstance(node, ast.If)
    )
    typed = {
        alias.name
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == sorted(typed) == sorted(raykd.__all__) == sorted(dir(raykd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raykd.nothing  # noqa: B018


def test_no_module_hides_a_public_name():
    """`import raykd.x` sets raykd.x, so a module x would replace a function x."""
    assert not {module.rpartition(".")[2] for module in MODULES if module.count(".") == 1} & set(
        raykd.__all__
    )


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_is_one_idea_with_a_docstring_and_a_name(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST
    assert path.stem not in EMPTY_NAMES
    assert path.read_text(encoding="utf-8").isascii()
    assert ast.get_docstring(TREES[path])


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_nothing_is_caught_in_silence(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            silent = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            assert not (silent and all(isinstance(n, ast.Pass) for n in node.body)), (
                f"line {node.lineno}"
            )
