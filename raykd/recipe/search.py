"""The `[search]` table: which keys are tried, over which values. Needs no torch."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from raykd.recipe.tables import LONGEST, Count, Pair, Seed, Table
from raykd.recipe.toml import set_key


class Range(Table):
    """Where one key is searched: exactly one of the four forms."""

    uniform: Pair[float] | None = None
    """The least and the largest value, all equally likely."""
    loguniform: Pair[float] | None = None
    """The same with equally likely logarithms."""
    integer: Pair[int] | None = None
    """The least and the largest whole number, all equally likely."""
    choice: Annotated[list[JsonValue], Field(max_length=LONGEST)] | None = None
    """The values themselves."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        values = [getattr(self, name) for name in type(self).model_fields]
        forms = [value for value in values if value is not None]
        if len(forms) != 1:
            raise ValueError(
                "give one of uniform = [lo, hi], loguniform = [lo, hi], integer = [lo, hi], "
                "choice = [..]"
            )
        if not forms[0] or (self.choice is None and not forms[0][0] < forms[0][1]):
            raise ValueError(
                f"an empty range {forms[0]!r}; the first bound must be below the second"
            )
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform = {list(self.loguniform)!r} needs bounds above 0")
        return self

    def ends(self) -> list[JsonValue]:
        """Both bounds, or every choice. If the key accepts these, it accepts every trial."""
        return list(self.uniform or self.loguniform or self.integer or self.choice or ())


class Search(Table):
    """Trials over dotted recipe keys: `"terms.kd.temperature" = { uniform = [1, 4] }`."""

    trials: Count = 4
    """Trials in all."""
    concurrent: Count = 2
    """Trials at once."""
    grace: Count = 500
    """Steps before a trial may be stopped."""
    seed: Seed = 0
    """The seed of the searcher."""
    searcher: Literal["optuna", "random"] = "optuna"
    """Who proposes values: optuna's sampler, or chance."""
    space: dict[str, Range] = {}
    """The searched keys; a dotted key in the table does the same."""

    @model_validator(mode="before")
    @classmethod
    def _gather_dotted_keys(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        plain = {k: v for k, v in raw.items() if "." not in k}
        dotted = {k: v for k, v in raw.items() if "." in k}
        return plain | {"space": {**plain.get("space", {}), **dotted}}

    @model_validator(mode="after")
    def _something_to_search(self) -> Self:
        if not self.space:
            raise ValueError(
                'no key to search; add a line such as "terms.kd.temperature" = { uniform = [1, 4] }'
            )
        return self


def apply_trial(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The raw recipe of one trial: `raw` with the trial's dotted keys set, and without [search]."""
    trial = json.loads(json.dumps(raw))
    trial.pop("search", None)
    for key, value in values.items():
        trial = set_key(trial, key, value)
    return trial
