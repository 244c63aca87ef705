"""Every key of a recipe: its type, its default and one line, read from the tables themselves."""

import json
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from raykd.errors import RecipeError
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import MOST, TermSpec
from raykd.recipe.validation import suggestion

TABLE = "table"
TABLES = "list of tables"
NAMED = "tables by name"
HEADINGS = {TABLE: "[{}]", TABLES: "[[{}]]", NAMED: "[{}.NAME]"}
NAME = "NAME"  # stands for the name that a recipe gives a table
REQUIRED = ", required"
WORDS = {bool: "boolean", int: "integer", float: "number", str: "string", JsonValue: "any value"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
UNTOLD = (MOST, 2**63)  # which nobody meets
COLUMNS = 100

# Models of what a recipe may set of each term, by the term's name.
TermTables = Mapping[str, type[BaseModel]]


@dataclass(frozen=True)
class Key:
    """One key or table of a recipe.

    key      its dotted name; of a list of tables without the number
    type     what it takes, in words
    default  its value where a recipe has none; None where it then has no value
    doc      one line
    """

    key: str
    type: str
    default: Any
    doc: str


def recipe_keys(terms: TermTables | None = None) -> list[Key]:
    """Every key in the order of the tables, each table before what is in it.

    With `terms`, those of each term by its name. Otherwise `terms.NAME` stands for any of them.
    """
    keys = []
    for name, field in Recipe.model_fields.items():
        if name == "terms" and terms is not None:
            keys += [_key(name, field), *_of_terms(terms)]
        else:
            keys += _of_field(name, field)
    return keys


def select(keys: Sequence[Key], name: str) -> list[Key]:
    """The key or table of this name with all that is in it; RecipeError where there is none.

    The number of a phase is left out, so that the `phases.0.until` of an error is found, too.
    """
    wanted = re.sub(r"\.\d+(?=\.|$)", "", name)
    chosen = [key for key in keys if _is_in(key.key, wanted)]
    if not chosen:
        raise RecipeError(_missing(keys, wanted))
    return chosen


def text(keys: Sequence[Key]) -> str:
    """The keys for a terminal, as a recipe would have them, each with its line below it."""
    lines = []
    for key in keys:
        if key.type in HEADINGS:
            lines += ["", HEADINGS[key.type].format(key.key)]
        else:
            value = "" if key.default is None else f" = {toml_value(key.default)}"
            lines.append(f"{key.key}{value}    ({key.type})")
        lines += textwrap.wrap(key.doc, COLUMNS, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).strip("\n")


def toml_value(value: Any) -> str:
    """A default as a recipe writes it; "none" where there is none."""
    return "none" if value is None else json.dumps(value)


# selecting


def _is_in(key: str, table: str) -> bool:
    return key == table or key.startswith(f"{table}.")


def _missing(keys: Sequence[Key], wanted: str) -> str:
    """Which part of a dotted name is not there, and what is near it."""
    parts = wanted.split(".")
    depth = 0
    while parts[depth] in _names(keys, parts[:depth]):
        depth += 1
    table = ".".join(parts[:depth])
    known = _names(keys, parts[:depth])
    if not known:
        return f"{table} is a key, not a table: it has no {'.'.join(parts[depth:])!r}"
    place = table or "a recipe"
    return f"no key or table {parts[depth]!r} in {place}.{suggestion(parts[depth], known)}"


def _names(keys: Sequence[Key], table: Sequence[str]) -> set[str]:
    """The names of what is in a table, of which the dotted name comes in parts."""
    names = [key.key.split(".") for key in keys]
    depth = len(table)
    return {name[depth] for name in names if len(name) > depth and name[:depth] == table}


# reading the tables


def _of_terms(terms: TermTables) -> Iterator[Key]:
    """Each term as a table: the keys of any term, then its own settings."""
    for name, model in terms.items():
        yield Key(f"terms.{name}", TABLE, None, _first_line(model))
        yield from _of_model(f"terms.{name}", TermSpec)
        yield from _of_model(f"terms.{name}", model)


def _of_model(table: str, model: type[BaseModel]) -> Iterator[Key]:
    """The keys of a table, those that hold tables after the others, as TOML has them."""
    fields = model.model_fields.items()
    for name, field in sorted(
        fields, key=lambda item: _table_of(item[1].annotation)[1] is not None
    ):
        yield from _of_field(f"{table}.{name}", field)


def _of_field(key: str, field: FieldInfo) -> Iterator[Key]:
    """A field, then the keys of the table that it holds."""
    yield _key(key, field)
    form, model = _table_of(field.annotation)
    if model is not None:
        yield from _of_model(f"{key}.{NAME}" if form == NAMED else key, model)


def _key(key: str, field: FieldInfo) -> Key:
    form, model = _table_of(field.annotation)
    if model is not None:
        default = None if field.is_required() else _json(field.default)
        return Key(key, form, default, field.description or "")
    words = _words(field.annotation, field.metadata)
    if field.is_required():
        return Key(key, words + REQUIRED, None, field.description or "")
    return Key(key, words, _json(field.default), field.description or "")


def _table_of(annotation: Any) -> tuple[str, type[BaseModel] | None]:
    """How a field holds tables, and their model; (_, None) where it holds none."""
    origin = get_origin(annotation)
    arguments = [part for part in get_args(annotation) if part is not types.NoneType]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return TABLE, annotation
    if origin in (Union, types.UnionType) and len(arguments) == 1:
        return _table_of(arguments[0])
    form = {list: TABLES, dict: NAMED}.get(origin) if origin else None
    if form is None:
        return "", None
    return form, _table_of(arguments[-1])[1]


def _json(default: Any) -> Any:
    """A default as JSON; of a table what it changes in its own defaults, so mostly {}."""
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json", exclude_defaults=True)
    return to_jsonable_python(default)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with the bounds that its metadata holds."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _words(arguments[0], [*_flat(arguments[1:]), *metadata])
        case origin if origin is Literal:
            return " | ".join(json.dumps(value) for value in arguments)
        case origin if origin in (Union, types.UnionType):
            kinds = [_words(part, metadata) for part in arguments if part is not types.NoneType]
            return " | ".join(kinds)
        case origin if origin is tuple:
            words = f"[{', '.join(_words(part) for part in arguments)}]"
        case origin if origin is list:
            words = f"list of {_words(arguments[0])}"
        case origin if origin is dict:
            words = f"table of {_words(arguments[1])}"
        case _:
            words = WORDS.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return words + _bounds(metadata)


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Metadata, that of a `Field` taken out of it."""
    return [
        part
        for whole in metadata
        for part in (whole.metadata if isinstance(whole, FieldInfo) else [whole])
    ]


def _bounds(metadata: Sequence[Any]) -> str:
    """What metadata says of a value, such as " > 0, <= 1"."""
    bounds = [
        f" {sign} {getattr(part, name)}"
        for part in metadata
        for name, sign in BOUNDS.items()
        if hasattr(part, name) and getattr(part, name) not in UNTOLD
    ]
    patterns = [part.pattern for part in metadata if getattr(part, "pattern", None)]
    bounds += [f" matching {pattern}" for pattern in patterns]
    least = [part.min_length for part in metadata if getattr(part, "min_length", 0)]
    counts = [" (not empty)" if length == 1 else f" ({length} or more)" for length in least]
    return ",".join(bounds) + "".join(counts)
