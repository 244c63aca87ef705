"""Which columns of a source are read, by the keys of `data.columns`."""

from collections.abc import Iterable

from raykd.errors import Problem, RecipeError
from raykd.recipe.tables import DataRef, Task

SERIES = ("inputs", "label", "split", "group", "valence")
PROMPTS = ("prompt", "completion")
SENTENCES = ("text", "label", "split", "group")
NEXT = Task()


def column_names(ref: DataRef, task: Task = NEXT) -> dict[str, str]:
    """The names of the columns to read, by key."""
    keys = SERIES
    if ref.tokenizer and task.of_texts:
        keys = SENTENCES
    elif ref.tokenizer:
        of_text = PROMPTS if ref.columns.prompt else ("text",)
        keys = ("split", "group", *of_text)
    return {
        key: name
        for key, name in ref.columns.model_dump().items()
        if key in keys and name is not None
    }


def check_no_labels(names: Iterable[str], ref: DataRef, task: Task = NEXT) -> None:
    """RecipeError where texts have labels, which nothing would read."""
    if ref.tokenizer and not task.of_texts and ref.columns.label in names:
        raise RecipeError(
            [
                Problem(
                    "data.tokenizer",
                    f"the rows have a column {ref.columns.label!r}, and of rows of text every "
                    'label is the next token; write [task] label = "class" to classify texts, or '
                    "leave that column out of them to train a language model",
                )
            ]
        )
