"""What a recipe reads of a teacher's store: by its terms, and by the weights of rows."""

from typing import Any

from raykd.losses.terms import needs_of
from raykd.recipe.recipe import Recipe
from raykd.recipe.search import apply_trial

READING = ("terms", "weighting")  # tables that decide what is read


def reads_of(recipe: Recipe) -> frozenset[str]:
    """The teacher's signals that a training of this recipe reads.

    Weights of rows read the saliency, but where all of them are 1.
    """
    signals = needs_of(recipe.terms)
    weighs = recipe.weighting is not None and recipe.weighting.mode != "uniform"
    return signals | {"saliency"} if weighs else signals


def stored_for(recipe: Recipe) -> frozenset[str]:
    """The teacher's signals that a recipe or any of its trials reads."""
    raw = recipe.model_dump(mode="json", exclude_none=True)
    spans = recipe.search.space.items() if recipe.search else ()
    trials: list[dict[str, Any]] = [{}]
    for key, span in spans:
        if key.partition(".")[0] in READING:
            trials += [{key: value} for value in span.ends()]
    found: set[str] = set()
    for trial in trials:
        found |= reads_of(Recipe.model_validate(apply_trial(raw, trial)))
    return frozenset(found)
