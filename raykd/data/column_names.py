"""Which columns of a source are read, by the keys of `data.columns`."""

from collections.abc import Iterable

from raykd.errors import Problem, RecipeError
from raykd.recipe.tables import DataRef

SERIES = ("inputs", "label", "split", "group", "valence")
PROMPTS = ("prompt", "completion")


def column_names(ref: DataRef) -> dict[str, str]:
    """The names of the columns to read, by key."""
    keys = SERIES
    if ref.tokenizer:
        of_text = PROMPTS if ref.columns.prompt else ("text",)
        keys = ("split", "group", *of_text)
    return {
        key: name
        for key, name in ref.columns.model_dump().items()
        if key in keys and name is not None
    }


def check_no_labels(names: Iterable[str], ref: DataRef) -> None:
    """RecipeError where rows of text have labels, which nothing would read."""
    if ref.tokenizer and ref.columns.label in names:
        raise RecipeError(
            [
                Problem(
                    "data.tokenizer",
                    f"the rows have a column {ref.columns.label!r}, and rows of text have no "
                    "label but their next token; leave that column out of them to train a "
                    "language model (texts with classes are not read yet)",
                )
            ]
        )
