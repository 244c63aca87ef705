"""Code that a recipe names, as `module:function` or a dotted module: whether to trust it, and the
import of it.

A recipe, and the model.json of an artefact, can name any function of the machine. So only packages
under the current directory and packages that the user allows are imported, and of raykd itself
nothing: what it offers is named without a module. What a module only imports has another module's
leave to be called, or none. The checks run nothing.
"""

import functools
import importlib
import os
import sysconfig
from collections.abc import Collection
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raykd.errors import Problem, RecipeError
from raykd.recipe.user_code import current_directory_last, user_code

OURS = "raykd"
INSTALLED = {"site-packages", "dist-packages"}
TRUSTED = "RAYKD_ALLOW_IMPORT"  # a variable of packages, for the processes of run.py
_permitted = {package for package in os.environ.get(TRUSTED, "").split(",") if package}


def permit(packages: Collection[str]) -> None:
    """Let this process import these top-level packages, which its user trusts.

    A worker permits what its driver has asked about.
    """
    _permitted.update(packages)


def environment() -> dict[str, str]:
    """What lets another process import what this one may."""
    return {TRUSTED: ",".join(sorted(_permitted))}


def load(dotted: str, kind: str) -> Any:
    """The function of `module:function`, or the module of a dotted name.

    RecipeError, at the key `kind`, if it must not be imported or cannot be, or if the function is
    not the module's own and that of its own must not be imported. A module of the current directory
    is found, after all others, however Python was started.
    """
    if refused := problems(kind, dotted, _permitted):
        raise RecipeError(refused)
    name, sign, function = dotted.partition(":")
    with user_code(f"{kind} {dotted}"):
        try:
            module = importlib.import_module(name)
        except (ImportError, SyntaxError, TypeError, ValueError) as error:
            raise RecipeError([Problem(kind, f"{dotted!r} cannot be imported: {error}")]) from None
        found = getattr(module, function, None) if sign else module
    if sign and not callable(found):
        raise RecipeError(
            [Problem(kind, f"{dotted!r} cannot be imported: {name} has no function {function!r}")]
        )
    if sign and (refused := _borrowed(kind, dotted, found)):
        raise RecipeError(refused)
    return found


def _borrowed(key: str, dotted: str, found: Any) -> list[Problem]:
    """Why a function that a module has from elsewhere, such as shutil's rmtree, must not be called;
    none if it may be.
    """
    home = _home_of(found)
    if home.partition(".")[0] == dotted.partition(":")[0].partition(".")[0]:
        return []
    refused = problems(key, f"{home}:{dotted.partition(':')[2]}", _permitted)
    return [
        Problem(key, f"{dotted!r} is not that module's own: {problem.message}")
        for problem in refused
    ]


def _home_of(found: Any) -> str:
    """The name of the module that defines a function, a class, or the class of another callable."""
    while isinstance(found, functools.partial):
        found = found.func
    home = getattr(found, "__module__", None)
    return home if isinstance(home, str) else type(found).__module__


def problems(key: str, dotted: str, allowed: Collection[str] = ()) -> list[Problem]:
    """Why the code that `dotted` names must not be imported; none if it may be.

    `allowed` names top-level packages that the user trusts.
    """
    words = dotted.replace(":", ".").split(".")
    if dotted.count(":") > 1 or not all(word.isidentifier() for word in words):
        return [Problem(key, f"{dotted!r} is not the name of any code; write module:function")]
    package = words[0]
    spec = _top(package)
    if spec is None:
        text = f"{dotted!r}: no module {package!r} is installed or in the current directory"
        return [Problem(key, text)]
    if package == OURS:
        text = f"{dotted!r} is raykd's own code, of which only what is built in has a name here"
        return [Problem(key, f"{text}; write a function of yours that calls it")]
    if package in allowed or _is_here(spec):
        return []
    origin = spec.origin or "many folders"
    advice = f"add --allow-import {package} if you trust it"
    in_python = f'in Python allow_import=["{package}"]'
    text = f"{dotted!r} is code from outside the current directory ({origin})"
    return [Problem(key, f"{text}; {advice} ({in_python})")]


def source_of(dotted: str) -> Path | None:
    """The file of a module inside a package, without importing either; None if there is none."""
    top, *inner = dotted.split(".")
    spec = _top(top)
    if spec is None or not inner or not all(word.isidentifier() for word in inner):
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *inner)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _top(name: str) -> ModuleSpec | None:
    """The spec of a top-level module, which needs no import; None if there is no such module."""
    with current_directory_last():
        try:
            return find_spec(name) if name.isidentifier() else None
        except ValueError:  # __main__ has none
            return None


def _is_here(spec: ModuleSpec) -> bool:
    """Whether all of a module lies under the current directory and is neither Python's own code
    nor installed.
    """
    here = Path.cwd().resolve()
    python = Path(sysconfig.get_path("stdlib")).resolve()

    def is_own(path: Path) -> bool:
        if not path.is_relative_to(here) or path.is_relative_to(python):
            return False
        return not INSTALLED & set(path.relative_to(here).parts)

    locations = list(spec.submodule_search_locations or ())
    if spec.has_location and spec.origin:
        locations.append(spec.origin)
    paths = [Path(location).resolve() for location in locations]
    return bool(paths) and all(is_own(path) for path in paths)
