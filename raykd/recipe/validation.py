"""Raw values into a pydantic model, or every fault at once: its key as users write it, and what to
type.
"""

import difflib
import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from raykd.errors import Problem

M = TypeVar("M", bound=BaseModel)
SHOWN = 20  # errors of one table
LONG = 80  # letters of a word that may be a misspelt one, and of a value that is shown


def validate(model: type[M], raw: Any, *, key: str = "") -> tuple[M | None, list[Problem]]:
    """(`model` filled from raw values, no problems) or (None, every problem with its key)."""
    problems = list(islice(_not_json(raw, key), SHOWN))
    try:
        table = model.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        reported = {problem.key for problem in problems}
        faults = [_problem(model, fault, key) for fault in error.errors()[:SHOWN]]
        problems += [fault for fault in faults if fault.key not in reported]
        if error.error_count() > SHOWN:
            problems.append(Problem(key, f"and {error.error_count() - SHOWN:,} errors more"))
        return None, problems
    return (None if problems else table), problems


def _not_json(value: Any, key: str) -> Iterator[Problem]:
    """The values that JSON does not have: TOML's dates and its nan and inf."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            yield from _not_json(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, f"must be a finite number, found {value}")
    elif not isinstance(value, str | int | float | None):
        yield Problem(
            key, f"{type(value).__name__} {value} is not a value here; write a string or a number"
        )


def _problem(model: type[BaseModel], error: Any, key: str) -> Problem:
    loc = [str(part) for part in error["loc"]]
    whole = [key, *loc] if key else loc
    written = ".".join(map(_short, whole))
    dotted = written.replace("search.space.", "search.", 1)  # as users write it
    match error["type"]:
        case "extra_forbidden":
            return Problem(dotted, "unknown key." + suggestion(loc[-1], _fields(model, loc[:-1])))
        case "missing":
            return Problem(dotted, "missing; add it to the recipe")
        case "value_error":
            return Problem(dotted, str(error["ctx"]["error"]))
        case _:
            return Problem(dotted, f"{error['msg'].lower()}, found {_short(repr(error['input']))}")


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}... ({len(text):,} letters)"


def suggestion(word: str, known: Any) -> str:
    """A sentence for a misspelt word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1) if len(word) <= LONG else []
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."


def _fields(model: Any, loc: list[str]) -> list[str]:
    """The keys of the table at `loc` in a model."""
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((option for option in options if hasattr(option, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
