"""From a recipe's model table to a module: a registered name, `module:factory` or a folder."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from raykd.errors import RecipeError
from raykd.models import hf_classifier, hf_folder, start, transformers_lm
from raykd.models.form import Form, set_attention
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.models.size import check_size, without_values
from raykd.models.weights import load_weights, numbers_in
from raykd.recipe import imports
from raykd.recipe.tables import ModelRef, StudentRef
from raykd.recipe.user_code import user_code
from raykd.recipe.validation import suggestion
from raykd.recipe.weight_files import LLAMA, TRANSFORMERS, tensor_files

MODELS: dict[str, Callable[..., nn.Module]] = {"series_encoder": SeriesEncoder, "llama": Llama}
READERS = {LLAMA: hf_folder.read, TRANSFORMERS: transformers_lm.read}


def register_model(name: str, factory: Callable[..., nn.Module]) -> None:
    """Make `factory(classes=, **settings)` known to recipes as `model = name`.

    A factory with a parameter `channels` also gets the number of channels of a step, one with
    `steps` the number of steps of the data's longest row, and one with `tokens` the number of the
    tokeniser's tokens, of sentences.

    Example:
        >>> from torch import nn
        >>> register_model("mean", lambda classes, channels: nn.Linear(channels, classes))
    """
    MODELS[name] = factory


def build_model(
    ref: ModelRef, *, channels: int, classes: int, steps: int, key: str, tokens: int | None = None
) -> nn.Module:
    """The module of a recipe's model table, with its weights loaded.

    `channels`, `classes` and `steps`, and of sentences `tokens`, are those of the data set
    (`Dataset.shape`). RecipeError,
    which starts with the table's `key`, if the settings or the weights do not fit.

    Example:
        >>> ref = ModelRef(model="series_encoder", settings={"width": 16})
        >>> model = build_model(ref, channels=6, classes=7, steps=100, key="student")
        >>> model.head.out_features
        7
    """
    shape = {"channels": channels, "classes": classes, "steps": steps}
    if tokens is not None:
        shape["tokens"] = tokens
    return _built(ref, shape, key, None)


def build_frozen(ref: ModelRef, shape: dict[str, int], form: Form, *, key: str) -> nn.Module:
    """The same of a model that only answers, in the numbers and on the device of a form.

    A built-in model's weights are read straight to it. No parameter takes a gradient.
    """
    return _built(ref, shape, key, form).requires_grad_(False)


def _built(ref: ModelRef, shape: dict[str, int], key: str, form: Form | None) -> nn.Module:
    if ref.model == TRANSFORMERS and "tokens" in shape:
        return _in_form(hf_classifier.build(ref, shape, key, form), form)
    if ref.model == TRANSFORMERS or _is_whole_folder(ref):
        classes = shape["classes"]
        module = _read_folder(ref, classes=classes, steps=shape["steps"], key=key, form=form)
        return _in_form(module, form)
    factory = MODELS.get(ref.model) or _imported(ref.model, key)
    settings = {**_accepted(factory, shape), **ref.settings}
    with user_code(f"{key}.model {ref.model}"):
        try:
            is_built_in = factory in (SeriesEncoder, Llama)
            if is_built_in:
                check_size(lambda: factory(**settings))
            is_unfilled = bool(is_built_in and form and ref.weights)
            with without_values() if is_unfilled else nullcontext():
                module = factory(**settings)
        except (TypeError, ValueError) as error:
            refused = f"{key}.settings: {ref.model} refuses {ref.settings}: {error}"
            raise RecipeError(refused) from None
    if not isinstance(module, nn.Module):
        raise RecipeError(
            f"{key}.model: {ref.model} gives a {type(module).__name__}; return an nn.Module"
        )
    with user_code(f"{key}.model {ref.model}"):
        lazy = [name for name, value in module.named_parameters() if is_lazy(value)]
    if lazy:
        raise RecipeError(
            f"{key}.model: {ref.model} leaves the size of {lazy[0]} open; name all sizes"
        )
    if isinstance(ref, StudentRef) and (ref.layers is not None or _is_folder(ref)):
        start.load(module, ref, key)
    elif ref.weights:
        load_weights(module, Path(ref.weights), key, form if is_unfilled else None)
    return _in_form(module, form)


def _in_form(module: Any, form: Form | None) -> Any:
    """The module in the numbers and on the device of a form."""
    if form is None:
        return module
    set_attention(module, form.attention)
    return module.to(form.device, form.dtype)


def _is_folder(ref: ModelRef) -> bool:
    return ref.weights is not None and Path(ref.weights).is_dir()


def _is_whole_folder(ref: ModelRef) -> bool:
    """Whether a folder says what the model is; a student's settings are known by then."""
    return _is_folder(ref) and not isinstance(ref, StudentRef)


def count_parameters(
    ref: ModelRef, *, channels: int, classes: int, steps: int, key: str, tokens: int | None = None
) -> int:
    """How many parameters a model has: no buffer, and a tied one once. No weights are read.

    Of a folder that transformers reads, the numbers in its files.
    """
    if ref.model == TRANSFORMERS and not isinstance(ref, StudentRef):
        return numbers_in(tensor_files(Path(str(ref.weights))))
    if _is_whole_folder(ref):
        module: nn.Module = hf_folder.unfilled(Path(str(ref.weights)))
    else:
        shape = {"channels": channels, "classes": classes, "steps": steps, "tokens": tokens}
        module = build_model(ref.bare, **shape, key=key)
    return sum(value.numel() for value in module.parameters())


def _read_folder(
    ref: ModelRef, *, classes: int, steps: int, key: str, form: Form | None = None
) -> Any:
    """The model of a Hugging Face folder, for `classes` tokens in rows of `steps`.

    RecipeError if it has fewer columns or steps. Columns beyond the tokens' are padding, which
    readers of the logits leave out; caches are made for `steps`.
    """
    if not ref.weights or not Path(ref.weights).is_dir():
        raise RecipeError(
            f'{key}.weights: model = "{ref.model}" needs a Hugging Face folder; '
            f"{ref.weights} is not a folder"
        )
    if ref.model not in READERS or ref.settings:
        raise RecipeError(
            f'{key}.weights: {ref.weights} is a folder, which only model = "{LLAMA}" or '
            f'"{TRANSFORMERS}" can read, and without settings'
        )
    module = READERS[ref.model](Path(ref.weights), form)
    columns = module.settings["classes"]
    room = module.settings["steps"]
    if columns < classes:
        raise RecipeError(
            f"{key}.weights: {ref.weights} knows {columns} tokens, and the data's tokeniser "
            f"{classes}; name the model's own tokenizer.json in data.tokenizer"
        )
    if room is not None and room < steps:
        raise RecipeError(
            f"{key}.weights: {ref.weights} reads at most {room} tokens; lower data.window to that"
        )
    module.settings["steps"] = steps
    return module


def _accepted(factory: Callable[..., Any], shape: dict[str, int]) -> dict[str, int]:
    """The part of the data's shape that a factory takes: `classes` always, `steps` if named."""
    parameters = inspect.signature(factory).parameters
    names = {"classes"} | (shape.keys() & parameters.keys())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names.add("channels")
    return {name: size for name, size in shape.items() if name in names}


def _imported(name: str, key: str) -> Callable[..., Any]:
    if ":" not in name:
        raise RecipeError(
            f"{key}.model {name!r}: no such model.{suggestion(name, MODELS)} "
            "Or name module:factory."
        )
    return imports.load(name, f"{key}.model")
