"""Files of the current directory that are called as libraries: none is run in a library's place."""

from functools import partial
from typing import Any

from hostile.harness import Asked, Home, add, hostile

SHADOW = "import os\nopen(os.environ['CANARY'], 'a').write(__name__ + ' ')\n"
LIBRARIES = (
    "random", "secrets", "json", "tomllib", "difflib",
    "platform", "statistics", "queue", "typing_extensions", "pydantic",
    "annotated_types", "click", "numpy", "torch", "safetensors",
    "pyarrow", "ray", "mlflow", "sqlalchemy", "jinja2",
    "tokenizers", "onnxruntime", "packaging", "tomli_w", "yaml",
    "sitecustomize", "usercustomize", "readline",
)  # fmt: skip


def shadowed(name: str, verb: tuple[str, ...], home: Home) -> Asked:
    home.write(f"{name}.py", SHADOW)
    return Asked(verb, 0, fresh="")


for _name in ("pydantic",):
    add(
        "shadow",
        f"{_name}.py beside a list of techniques",
        partial(shadowed, _name, ("techniques",)),
    )


def all_shadowed(argv: tuple[Any, ...], code: Any, home: Home) -> Asked:
    for name in LIBRARIES:
        home.write(f"{name}.py", SHADOW)
    home.write("raykd/__init__.py", SHADOW)
    return Asked(tuple(part(home) if callable(part) else part for part in argv), code, fresh="")


ALL: dict[str, tuple[tuple[Any, ...], Any]] = {
    "help": (("--help",), 0),
    "check": (("check", "done.toml", "--out", lambda home: home.out), 0),
}
for _name, (_argv, _code) in ALL.items():
    add("shadow", f"all libraries beside {_name}", partial(all_shadowed, _argv, _code))


@hostile("shadow")
def libraries_not_yet_imported(home: Home) -> Asked:
    """In a process that has torch already, over a module of the user's own."""
    (home.run() / "report.json").unlink()
    for name in ("jinja2", "tokenizers", "onnxruntime", "mlflow", "xml", "html"):
        home.write(f"{name}.py", SHADOW)
    return home.asked("report", "done.toml", code=0)
