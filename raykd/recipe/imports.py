"""Code that a recipe names, as `module:function` or a dotted module: whether to trust it, where it
lies, and itself.

A recipe can name any function of the machine, so only raykd's own packages, those under the current
directory and those that the user allows are imported. The checks run nothing.
"""

import importlib
import os
import sys
import sysconfig
from collections.abc import Collection
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raykd.errors import Problem, RecipeError

INSTALLED = {"site-packages", "dist-packages"}


def load(dotted: str, kind: str) -> Any:
    """The function of `module:function`, or the module of a dotted name; RecipeError at `kind`, the
    key that says it.

    A module of the current directory is found, after all others, however Python was started.
    """
    name, sign, function = dotted.partition(":")
    _see_current_directory()
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise RecipeError([Problem(kind, f"{dotted!r} cannot be imported: {error}")]) from None
    if sign and not callable(getattr(module, function, None)):
        raise RecipeError(
            [Problem(kind, f"{dotted!r} cannot be imported: {name} has no function {function!r}")]
        )
    return getattr(module, function) if sign else module


def problems(key: str, dotted: str, allowed: Collection[str] = ()) -> list[Problem]:
    """Why the code that `dotted` names must not be imported; `allowed` names trusted top-level
    packages.
    """
    words = dotted.replace(":", ".").split(".")
    if dotted.count(":") > 1 or not all(word.isidentifier() for word in words):
        return [Problem(key, f"{dotted!r} is not the name of any code; write module:function")]
    spec = _top(words[0])
    if spec is None:
        return [
            Problem(
                key, f"{dotted!r}: no module {words[0]!r} is installed or in the current directory"
            )
        ]
    if words[0] == "raykd" or words[0] in allowed or _is_here(spec):
        return []
    outside = (
        f"{dotted!r} is code from outside the current directory ({spec.origin or 'many folders'})"
    )
    return [Problem(key, f"{outside}; add --allow-import {words[0]} if you trust it")]


def source_of(dotted: str) -> Path | None:
    """The file of a module inside a package; neither is imported."""
    top, *inner = dotted.split(".")
    spec = _top(top)
    if spec is None or not inner or not all(word.isidentifier() for word in inner):
        return None
    paths = [Path(folder, *inner) for folder in spec.submodule_search_locations or ()]
    files = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))]
    return next((file for file in files if file.is_file()), None)


def _top(name: str) -> ModuleSpec | None:
    """The spec of a top-level module, which needs no import; None if there is no such module."""
    _see_current_directory()
    try:
        return find_spec(name) if name.isidentifier() else None
    except ValueError:  # __main__ has none
        return None


def _see_current_directory() -> None:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def _is_here(spec: ModuleSpec) -> bool:
    """Whether all of a module lies under the current directory, Python's own and installed code
    apart.
    """
    here, python = Path.cwd().resolve(), Path(sysconfig.get_path("stdlib")).resolve()
    places = [
        *(spec.submodule_search_locations or ()),
        *([spec.origin] if spec.has_location and spec.origin else []),
    ]
    paths = [Path(place).resolve() for place in places]
    return bool(paths) and all(
        path.is_relative_to(here)
        and not path.is_relative_to(python)
        and not INSTALLED & set(path.relative_to(here).parts)
        for path in paths
    )
