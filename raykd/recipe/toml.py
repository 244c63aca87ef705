"""A recipe before it is checked: plain values read from TOML, merged, and set key by key."""

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from raykd.errors import Problem, RecipeError
from raykd.files.address import is_url
from raykd.files.reading import DEEPEST, check_depth, read_bounded

PATHS = (
    ("teacher", "weights"),
    ("student", "weights"),
    ("data", "tokenizer"),
    ("scale", "store"),
    ("source", "log"),
)


def is_path(source: str) -> bool:
    """Whether a data source names a folder: it holds a slash or starts with a dot."""
    return "/" in source or source.startswith(".")


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; RecipeError if it cannot be read."""
    try:
        values = tomllib.loads(read_bounded(path).decode())
        check_depth(values)
        return values
    except OSError as error:
        raise RecipeError(
            f"recipe {path} cannot be read: {error.strerror}; name an existing TOML file"
        ) from None
    except ValueError as error:  # not UTF-8, not TOML, or a number too long for Python
        raise RecipeError(f"recipe {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"recipe {path} is not valid TOML: it is nested too deeply") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top: tables merge key by key, everything else is replaced whole."""
    merged = base | over
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = merge(base[key], value)
    return merged


def set_key(raw: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """`raw` with one dotted key set; `search` keeps its dotted keys whole."""
    keys = dotted.split(".")
    if keys[0] == "search" and len(keys) > 2:
        keys = ["search", ".".join(keys[1:])]
    for key in reversed(keys):
        value = {key: value}
    return merge(raw, value)


def parse_set(text: str) -> tuple[str, Any]:
    """`a.b=value` as ("a.b", value); the value is TOML where it parses, else a string."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {text!r}: write --set table.key=value")
    if key.count(".") > DEEPEST:
        raise RecipeError(f"--set {key[:40]!r}...: its key has too many parts")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
        check_depth(parsed)
        return key.strip(), parsed
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
    except (ValueError, RecursionError):  # a number too long for Python, or nested too deeply
        raise RecipeError(f"--set {key.strip()}: its value is too long or too deep") from None


def resolve_paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` with file paths, but not URLs, made absolute against the recipe's folder."""

    problems = []
    for table, key in (*PATHS, ("data", "source")):
        value = raw[table].get(key) if isinstance(raw.get(table), dict) else None
        if not isinstance(value, str) or is_url(value) or (key == "source" and not is_path(value)):
            continue
        try:
            raw = merge(raw, {table: {key: _absolute(folder / value)}})
        except ValueError as error:
            problems.append(Problem(f"{table}.{key}", f"{error}; name another file or folder"))
    if problems:
        raise RecipeError(problems)
    return raw


def _absolute(path: Path) -> str:
    """A path, which need not exist, with its links followed; ValueError if there can be none."""
    try:
        whole = path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            whole.stat()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a NUL
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:100]!r} is no path: {reason}") from None
    return str(whole)
