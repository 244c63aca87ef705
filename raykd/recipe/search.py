"""The `[search]` table: which keys are tried, over which values. Needs no torch."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from raykd.recipe.tables import Pair, Positive, Table
from raykd.recipe.toml import set_key


class Range(Table):
    """Where one key is searched: exactly one of the four forms."""

    uniform: Pair[float] | None = None
    loguniform: Pair[float] | None = None
    integer: Pair[int] | None = None
    choice: list[JsonValue] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = [
            getattr(self, name)
            for name in type(self).model_fields
            if getattr(self, name) is not None
        ]
        if len(forms) != 1:
            raise ValueError(
                "give one of uniform = [lo, hi], loguniform = [lo, hi], integer = [lo, hi], choice = [..]"
            )
        if not forms[0] or (self.choice is None and not forms[0][0] < forms[0][1]):
            raise ValueError(
                f"an empty range {forms[0]!r}; the first bound must be below the second"
            )
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform = {list(self.loguniform)!r} needs bounds above 0")
        return self

    def ends(self) -> list[JsonValue]:
        """Both bounds or every choice: what the searched key must accept for any trial to be sound."""
        return list(self.uniform or self.loguniform or self.integer or self.choice or ())


class Search(Table):
    """Trials over dotted recipe keys: `"terms.kd.temperature" = { uniform = [1, 4] }`."""

    trials: Positive = 4
    concurrent: Positive = 2
    grace: Positive = 500
    seed: Annotated[int, Field(ge=0)] = 0
    searcher: Literal["optuna", "random"] = "optuna"
    space: dict[str, Range] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_dotted_keys(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        plain = {k: v for k, v in raw.items() if "." not in k}
        return plain | {
            "space": {**plain.get("space", {}), **{k: v for k, v in raw.items() if "." in k}}
        }

    @model_validator(mode="after")
    def _something_to_search(self) -> Self:
        if not self.space:
            raise ValueError(
                'no key to search; add a line such as "terms.kd.temperature" = { uniform = [1, 4] }'
            )
        return self


def apply_trial(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`raw` with a trial's dotted keys set and its search removed: one point of the space, as a
    plain recipe.
    """
    raw = {k: v for k, v in json.loads(json.dumps(raw)).items() if k != "search"}
    for key, value in values.items():
        raw = set_key(raw, key, value)
    return raw
