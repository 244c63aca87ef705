"""A Hugging Face folder as the model of a data set: with columns for its tokens, and room for its
rows.
"""

from pathlib import Path
from typing import Any

from raykd.errors import RecipeError
from raykd.models import hf_folder, transformers_lm
from raykd.recipe.recipe import ModelRef
from raykd.recipe.weight_files import LLAMA, TRANSFORMERS

READERS = {LLAMA: hf_folder.read, TRANSFORMERS: transformers_lm.read}


def build(ref: ModelRef, *, classes: int, steps: int, key: str) -> Any:
    """The model that a recipe's table names, for `classes` tokens in rows of `steps`. RecipeError
    if it has fewer.

    Columns beyond the tokens' are padding, which whoever reads the logits leaves out; caches are
    made for `steps`.
    """
    if not ref.weights or not Path(ref.weights).is_dir():
        raise RecipeError(
            f'{key}.weights: model = "{ref.model}" reads a folder, and {ref.weights} is none'
        )
    if ref.model not in READERS or ref.settings:
        raise RecipeError(
            f'{key}.weights: {ref.weights} is a folder, which model = "{LLAMA}" or "{TRANSFORMERS}" reads, without '
            "settings beside it"
        )
    module = READERS[ref.model](Path(ref.weights))
    columns, room = module.settings["classes"], module.settings["steps"]
    if columns < classes:
        raise RecipeError(
            f"{key}.weights: {ref.weights} knows {columns} tokens, and the data's tokeniser {classes}; name the "
            "model's own tokenizer.json in data.tokenizer"
        )
    if room is not None and room < steps:
        raise RecipeError(
            f"{key}.weights: {ref.weights} reads at most {room} tokens; lower data.window to that"
        )
    module.settings["steps"] = steps
    return module
