"""Names in a recipe that stand for code: of raykd itself, of Python, of what is installed."""

import re
from functools import partial

from hostile.harness import PLANT, ROOT, Asked, Home, add, hostile

OUTSIDE = {
    "os:system": '{ command = "touch ../victim/touched" }',
    "subprocess:getoutput": '{ cmd = "touch ../victim/touched" }',
    "builtins:exec": "{ source = \"open('../victim/touched', 'w')\" }",
    "importlib:import_module": '{ name = "planted" }',
    "ctypes:CDLL": '{ name = "libc.so.6" }',
    "torch.hub:load": '{ repo_or_dir = ".", model = "x", source = "local" }',
    "__main__:main": "{}",
    "planted_pkg.technique:rows": "{}",
}
OURS = {  # function: (a part of its module's path, settings)
    "StoreWriter": ("store", '{ where = "../victim", identity = {} }'),
    "gc": ("store/care", '{ where = "../victim", older_than_s = -100.0 }'),
    "repair": ("store/care", '{ where = "../victim" }'),
    "write_bytes": ("files", '{ path = "../victim/secret.txt", data = "x" }'),
    "load": ("recipe/imports", '{ dotted = "planted", kind = "x" }'),
    "main": ("cli", "{}"),
    "rows": ("", "{}"),
}
NO_NAMES = [
    "mine:rows:more",
    ".mine:rows",
    "mine:os.system",
    "*:rows",
]


def ours(function: str, part: str) -> str:
    """A function of raykd as a recipe names it, wherever it lies now."""
    for path in sorted((ROOT / "raykd").rglob("*.py")):
        inside = path.relative_to(ROOT).with_suffix("")
        defined = re.search(rf"^(def|class) {function}\b", path.read_text(), re.M)
        if str(inside).startswith(f"raykd/{part}") and defined:
            return f"{'.'.join(inside.parts)}:{function}"
    raise LookupError(f"raykd/{part} has no {function}")


def of_raykd(function: str, part: str, settings: str, home: Home) -> Asked:
    (home.victim / "_RECIPE.json").write_text("{}")
    name = ours(function, part) if function != "rows" else "raykd.nowhere:rows"
    text = f'technique = "none"\n[data]\nsource = "{name}"\nsettings = {settings}\n'
    path = home.write("recipe.toml", text)
    return home.asked("check", path, code=2, words="data.source")


def outside(table: str, name: str, settings: str, home: Home) -> Asked:
    key = "source" if table == "data" else "model"
    tables = {"data": 'source = "./rows"'} | {table: f'{key} = "{name}"\nsettings = {settings}'}
    text = "".join(f"[{own}]\n{content}\n" for own, content in tables.items())
    path = home.write("recipe.toml", f'technique = "none"\n{text}')
    return home.asked("check", path, code=2, words=(f"{table}.{key}", name))


for _function, (_part, _settings) in OURS.items():
    add("names", f"raykd's {_function} as data", partial(of_raykd, _function, _part, _settings))
for _name, _settings in OUTSIDE.items():
    add("names", f"{_name} as data", partial(outside, "data", _name, _settings))
for _name in ("os:system", "torch.hub:load", "planted:build", "builtins:eval"):
    for _table in ("student", "teacher"):
        add("names", f"{_name} as {_table}", partial(outside, _table, _name, "{}"))


def raykds_as_model(table: str, home: Home) -> Asked:
    name = ours("load", "recipe/imports")
    path = home.write(
        "recipe.toml",
        f'technique = "none"\n[data]\nsource = "./rows"\n[{table}]\nmodel = "{name}"\n'
        'weights = "teacher.safetensors"\n'
        'settings = { dotted = "planted", kind = "x" }\n',
    )
    return home.asked("check", path, code=2, words=table)


for _table in ("student", "teacher"):
    add("names", f"raykd's load as {_table}", partial(raykds_as_model, _table))


def no_name(name: str, home: Home) -> Asked:
    return home.asked("check", "own.toml", f"data.source={name}", code=2, words="data.source")


for _name in NO_NAMES:
    add("names", f"no name {_name}", partial(no_name, _name))


@hostile("names")
def a_link_to_a_module_elsewhere(home: Home) -> Asked:
    (home.victim / "linked.py").write_text(PLANT)
    (home.here / "linked.py").symlink_to(home.victim / "linked.py")
    return home.asked(
        "check", "own.toml", "data.source=linked:rows", code=2, words="--allow-import linked"
    )


@hostile("names")
def a_link_to_a_package_elsewhere(home: Home) -> Asked:
    (home.here / "linked").symlink_to(home.installed / "planted_pkg")
    return home.asked(
        "check", "own.toml", "student.model=linked.technique:build", code=2, words="student.model"
    )


@hostile("names")
def a_technique_that_is_installed(home: Home) -> Asked:
    return home.asked(
        "check", "own.toml", "technique=planted_pkg.technique", code=2, words="technique"
    )


@hostile("names")
def a_search_over_models(home: Home) -> Asked:
    text = (home.here / "own.toml").read_text()
    text += '[search]\n"student.model" = { choice = ["series_encoder", "planted:build"] }\n'
    return home.asked("check", home.write("search.toml", text), code=2, words="planted")


@hostile("names")
def a_module_that_exits_when_it_is_imported(home: Home) -> Asked:
    home.write("leaves.py", "import sys\nsys.exit(0)\n")
    return home.asked(
        "check", "own.toml", "data.source=leaves:rows", code=(2, 3), words="data.source"
    )


@hostile("names")
def a_module_that_raises_when_it_is_imported(home: Home) -> Asked:
    home.write("raises.py", "1 / 0\n")
    return home.asked(
        "check", "own.toml", "data.source=raises:rows", code=(2, 3), words="data.source"
    )


@hostile("names")
def a_model_that_raises_when_it_is_imported(home: Home) -> Asked:
    home.write("raises.py", "1 / 0\n")
    return home.asked(
        "check", "own.toml", "student.model=raises:build", code=(2, 3), words="student.model"
    )


@hostile("names")
def a_module_with_an_error_of_syntax(home: Home) -> Asked:
    home.write("wrong.py", "def rows(:\n")
    return home.asked(
        "check", "own.toml", "data.source=wrong:rows", code=(2, 3), words="data.source"
    )


@hostile("names")
def a_technique_with_a_deep_literal(home: Home) -> Asked:
    home.write("deep/__init__.py", "")
    home.write("deep/technique.py", f'"""Deep."""\nRECIPE = {"[" * 5000}{"]" * 5000}\n')
    return home.asked("check", "own.toml", "technique=deep.technique", code=2, words="technique")
