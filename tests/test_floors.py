"""The laws of the house, read from the source: who imports what, and what a light import loads.

Also what the public names are, and how dense a line may be.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raykd

ROOT = Path(__file__).parents[1]

# What each folder of the package, and each file at its root, may import from the others.
ROOT_FILES = {"errors", "signals", "targets", "console", "cli"}
GROUND = {"errors", "files", "recipe"}
TENSORS = {"signals", "targets"}
MAY_IMPORT = {
    "errors": set(),
    "targets": set(),
    "signals": {"targets"},
    "console": {"errors", "files"},
    "files": {"errors"},
    "recipe": {"errors", "files"},
    "data": GROUND | {"targets"},
    "quant": GROUND,
    "store": GROUND | {"targets", "console"},
    "losses": GROUND | TENSORS,
    "models": GROUND | TENSORS | {"quant"},
    "techniques": GROUND | TENSORS | {"losses"},
    "teacher": GROUND | TENSORS | {"data", "store", "losses", "models", "techniques"},
    "generation": GROUND | TENSORS | {"data", "store", "losses", "models"},
    "training": GROUND
    | TENSORS
    | {"console", "data", "quant", "store", "losses", "models", "techniques"}
    | {"teacher", "generation"},
    "deploy": GROUND | TENSORS | {"data", "quant", "models", "generation", "training"},
    "orchestration": GROUND
    | TENSORS
    | {"console", "data", "store", "models", "techniques", "teacher", "generation", "training"},
    "tracking": GROUND | {"data", "teacher", "training"},
    "reports": GROUND
    | TENSORS
    | {"console", "data", "store", "losses", "teacher", "generation", "training"},
}
MAY_IMPORT["stages"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# The only folders that may import a service, and there only inside functions.
SERVICES = {
    "ray": "orchestration",
    "mlflow": "tracking",
    "sqlalchemy": "tracking",
    "onnxruntime": "deploy.onnx",
    "obstore": "files",
}
HEAVY = {"torch", "pyarrow", "numpy", "matplotlib", "safetensors", "jinja2", "optuna", *SERVICES}
LIGHT = [
    "raykd",
    "raykd.errors",
    "raykd.recipe",
    "raykd.recipe.recipe",
    "raykd.recipe.digest",
    "raykd.recipe.toml",
    "raykd.recipe.imports",
    "raykd.techniques",
    "raykd.cli",
]

FACES = ["raykd", "raykd.recipe", "raykd.data", "raykd.models", "raykd.losses", "raykd.deploy"]
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
COLUMNS = 100
UNPACKED = 3  # names at once, of what one call returns
MOST_ENTRIES = 24
PRAGMA = re.compile(r"  # (type: |noqa|pyright: ).*")

# Shipped in artefacts, or in the digest of an example's run: their bytes stay as they are.
FROZEN = {"raykd/deploy/card", "examples/own/digits.py", "examples/own/gru.py"}


def is_frozen(path: Path) -> bool:
    """Whether a file's bytes may not change."""
    name = path.relative_to(ROOT).as_posix()
    return any(name == frozen or name.startswith(f"{frozen}/") for frozen in FROZEN)


FILES = [path for path in sorted((ROOT / "raykd").rglob("*.py")) if not is_frozen(path)]
SOURCES = [
    path
    for folder in ("raykd", "pipelines", "tests", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not is_frozen(path)
]
TEXTS = {path: path.read_text(encoding="utf-8") for path in SOURCES}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}


def dotted(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}
FOLDERS = sorted({name.split(".")[1] for name in MODULES if name != "raykd"})


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The dotted names that some nodes import; of `from a import b` both a and a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(names: Iterable[str]) -> set[str]:
    """The top-level packages of dotted names."""
    return {name.partition(".")[0] for name in names}


def folder_of(module: str) -> str:
    """The folder, or the file at the root, that a module of raykd is in."""
    return module.split(".")[1] if "." in module else ""


def folders_imported(module: str) -> set[str]:
    """The other folders that a module imports, at its top level or inside functions."""
    names = imported(ast.walk(TREES[MODULES[module]]))
    folders = {folder_of(name) for name in names if name.startswith("raykd.")}
    return (folders & set(FOLDERS)) - {folder_of(module)}


# layers


def test_every_folder_has_its_place_in_the_table():
    assert set(FOLDERS) == set(MAY_IMPORT)
    assert {name for name in FOLDERS if f"raykd.{name}" in MODULES} >= ROOT_FILES


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"raykd"}))
def test_a_module_imports_only_from_the_folders_below_its_own(module):
    assert folders_imported(module) <= MAY_IMPORT[folder_of(module)]


def test_the_table_of_folders_has_no_circle():
    below = {folder: set(others) - {folder, "cli"} for folder, others in MAY_IMPORT.items()}
    below["stages"] -= {"stages"}
    order = list(TopologicalSorter(below).static_order())
    assert order.index("recipe") < order.index("losses") < order.index("training")


def test_the_folders_have_no_circle():
    graph = {folder: set() for folder in FOLDERS}
    for module in MODULES:
        if module != "raykd":
            graph[folder_of(module)] |= folders_imported(module)
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_files_have_no_circle():
    """Of imports at the top level, those inside functions left out."""
    graph = {}
    for module, path in MODULES.items():
        needs = {name for name in imported(TREES[path].body) if name in MODULES}
        needs -= {module, "raykd"}
        # `from raykd.data import tables` needs tables, not the package around it.
        around = {name for name in needs if any(other.startswith(f"{name}.") for other in needs)}
        graph[module] = needs - around
    TopologicalSorter(graph).prepare()


# services and heavy packages


@pytest.mark.parametrize("package", SERVICES)
def test_a_service_is_imported_in_its_own_folder_only(package):
    importers = {
        module
        for module, path in MODULES.items()
        if package in packages(imported(ast.walk(TREES[path])))
    }
    home = f"raykd.{SERVICES[package]}."
    assert importers
    assert {module for module in importers if not module.startswith(home)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_service_before_it_is_needed(module):
    assert not packages(imported(TREES[MODULES[module]].body)) & set(SERVICES)


def loaded(code: str) -> list[str]:
    """The heavy packages that a new process has loaded after some code."""
    code = f"import sys\n{code}\nprint(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stderr.split()


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_import_loads_nothing_heavy(module):
    assert loaded(f"import {module}") == []


def test_help_loads_nothing_heavy():
    assert loaded("from raykd.cli import cli\ncli.main(['--help'], standalone_mode=False)") == []


# the public names


def public_names() -> list[tuple[str, str]]:
    """(face, name) of every public name."""
    return [(face, name) for face in FACES for name in importlib.import_module(face).__all__]


PUBLIC = public_names()


@pytest.mark.parametrize("face", FACES)
def test_the_public_names_of_a_face_are_sorted(face):
    names = importlib.import_module(face).__all__
    assert list(names) == sorted(set(names), key=_by_kind)


def _by_kind(name: str) -> tuple[int, str]:
    """Constants first, then classes, then functions, as ruff sorts them."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


@pytest.mark.parametrize(("face", "name"), PUBLIC)
def test_a_public_name_can_be_imported(face, name):
    space: dict[str, object] = {}
    exec(f"from {face} import {name}", space)
    assert space[name] is getattr(importlib.import_module(face), name)


@pytest.mark.parametrize("name", raykd.__all__)
def test_a_name_of_the_package_can_be_called(name):
    assert callable(getattr(raykd, name))


def test_the_names_of_the_package_are_the_same_in_each_place():
    homes = [name for names in raykd.HOMES.values() for name in names]
    body = TREES[ROOT / "raykd" / "__init__.py"].body
    guard = next(node for node in body if isinstance(node, ast.If))
    typed = {
        alias.name
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == sorted(typed) == sorted(raykd.__all__) == sorted(dir(raykd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raykd.nothing  # noqa: B018


@pytest.mark.parametrize("face", FACES)
def test_no_module_hides_a_public_name(face):
    """Importing a module m of a folder sets the folder's m, which would replace a function m."""
    inside = {module.rpartition(".") for module in MODULES}
    modules = {name for parent, _, name in inside if parent == face}
    assert not modules & set(importlib.import_module(face).__all__)


# the folder


def test_the_package_has_few_entries():
    """Those that hold more than compiled files."""

    def is_tracked(path: Path) -> bool:
        files = [path] if path.is_file() else path.rglob("*")
        return any(file.is_file() and "__pycache__" not in file.parts for file in files)

    entries = {path.name for path in (ROOT / "raykd").iterdir() if is_tracked(path)}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_has_a_docstring_and_a_name(path):
    assert path.stem not in EMPTY_NAMES
    assert TEXTS[path].isascii()
    assert ast.get_docstring(TREES[path])


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_nothing_is_caught_in_silence(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            is_broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            is_silent = all(isinstance(inner, ast.Pass) for inner in node.body)
            assert not (is_broad and is_silent), f"line {node.lineno}"


# what stands on a line


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_a_line_says_one_thing(path):
    """At most 100 columns, and no tuple assignment but a swap or a few names of one call."""
    lines = [PRAGMA.sub("", line) for line in TEXTS[path].splitlines()]
    wide = [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert wide == [], f"lines over {COLUMNS} columns"
    packed = [node.lineno for node in ast.walk(TREES[path]) if is_packed(node)]
    assert packed == [], "lines that assign several things"


def is_packed(node: ast.AST) -> bool:
    """Whether a node assigns several values, or unpacks many names, in one statement."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    targets = node.targets[0].elts
    if any(isinstance(value, ast.Tuple) for value in branches(node.value)):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else []
        return sorted(map(ast.unparse, targets)) != sorted(map(ast.unparse, values))
    kept = [t for t in targets if not isinstance(t, ast.Starred) and ast.unparse(t) != "_"]
    return len(kept) > UNPACKED


def branches(value: ast.expr) -> list[ast.expr]:
    """An expression, or what a conditional one chooses from."""
    if isinstance(value, ast.IfExp):
        return [*branches(value.body), *branches(value.orelse)]
    return [value]


def test_a_packed_line_is_seen():
    packed = ["a, b = 1, 2", "a, b = (1, 2) if c else (3, 4)", "a, b, c, d = f()", "a, a = a, b"]
    fine = ["a, b = b, a", "a, b = f()", "a, *b = f()", "a, b, c, _ = f()", "a = b = 1, 2"]
    assert all(is_packed(ast.parse(line).body[0]) for line in packed)
    assert not any(is_packed(ast.parse(line).body[0]) for line in fine)


def test_cannot_is_one_word():
    words = re.compile(r"can not", re.IGNORECASE)
    readable = {".py", ".md", ".j2", ".toml", ".txt"}
    files = [path for path in (ROOT / "raykd").rglob("*") if path.suffix in readable]
    files = [path for path in files if "shipped" not in path.parts]
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [ROOT / "README.md", *files]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert lines == []


# what texts name

# One part after raykd is a name in an import or a document; elsewhere it may be a tag of MLflow.
IMPORTED = re.compile(r"\b(?:from|import) (raykd\.[\w.]*\w)")
DOCUMENTED = re.compile(r"`(raykd\.[\w.]*\w)")
NAMED = re.compile(r"\b(raykd\.\w+\.[\w.]*\w)")
PATHED = re.compile(r"(?<![\w/.-])raykd/[\w/]+\.(?:py|md)\b")
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("README.md"), *ROOT.glob("*/**/*.md"), *ROOT.glob("*/**/*.toml")]
    if path.relative_to(ROOT).parts[0] in ("raykd", "pipelines", "examples", "cluster", "README.md")
)


def defined(module: str) -> set[str]:
    """The names at the top level of a module."""
    names = set(re.findall(r"^ *(\w+)(?:: [^=\n]+)? = ", TEXTS[MODULES[module]], re.MULTILINE))
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_there(name: str) -> bool:
    """Whether a dotted name of raykd is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in MODULES:
            return length == len(parts) or parts[length] in defined(module) | set(raykd.__all__)
    return False


@pytest.mark.parametrize(
    "path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_what_a_text_names_is_there(path):
    """Dotted names and paths, so that nothing keeps the name of what has moved."""
    text = path.read_text(encoding="utf-8")
    patterns = [NAMED, IMPORTED] if path.suffix == ".py" else [NAMED, IMPORTED, DOCUMENTED]
    names = {name for pattern in patterns for name in pattern.findall(text)}
    missing = {name for name in names if not is_there(name)}
    missing |= {name for name in PATHED.findall(text) if not (ROOT / name).exists()}
    assert missing == set()
