"""Raw values into a pydantic model, or every fault at once, each with its key as users write it and
what to type.
"""

import difflib
import json
import math
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raykd.errors import Problem

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], raw: Any, *, key: str = "") -> tuple[M | None, list[Problem]]:
    """(`model` filled from raw values, no problems) or (None, every problem with its key)."""
    problems = list(_no_json(raw, key))
    try:
        found = model.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        named = {problem.key for problem in problems}
        return None, problems + [
            p for e in error.errors() if (p := _problem(model, e, key)).key not in named
        ]
    return (None if problems else found), problems


def _no_json(value: Any, key: str) -> Iterator[Problem]:
    """The values that JSON does not have: TOML's dates and its nan and inf."""
    if isinstance(value, dict | list | tuple):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _no_json(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, f"must be a finite number, found {value}")
    elif not isinstance(value, str | int | float | None):
        yield Problem(
            key, f"{type(value).__name__} {value} is not a value here; write a string or a number"
        )


def _problem(model: type[BaseModel], error: Any, key: str) -> Problem:
    loc = [str(part) for part in error["loc"]]
    dotted = ".".join(([key] if key else []) + loc).replace(
        "search.space.", "search.", 1
    )  # as users write it
    match error["type"]:
        case "extra_forbidden":
            return Problem(dotted, "unknown key." + suggestion(loc[-1], _fields(model, loc[:-1])))
        case "missing":
            return Problem(dotted, "missing; add it to the recipe")
        case "value_error":
            return Problem(dotted, str(error["ctx"]["error"]))
        case _:
            return Problem(dotted, f"{error['msg'].lower()}, found {error['input']!r}")


def suggestion(word: str, known: Any) -> str:
    """A sentence for a misspelt word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."


def _fields(model: Any, loc: list[str]) -> list[str]:
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        options = (
            [field.annotation, *getattr(field.annotation, "__args__", ())] if field else [model]
        )
        model = next((o for o in options if hasattr(o, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
