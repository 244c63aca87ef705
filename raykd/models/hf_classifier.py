"""Text classifiers of transformers (extra `hf`), as teachers and as students.

One is built from its folder, or from settings, which are the keys of a config.json. A student may
begin as a folder, whole or as some of its layers. Nothing in a folder is executed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raykd.errors import Problem, RecipeError
from raykd.models.form import Form
from raykd.models.transformers_lm import READ, placing, unreadable
from raykd.models.weights import check_stored, fill, load_weights
from raykd.recipe.tables import ModelRef, StudentRef
from raykd.recipe.validation import suggestion
from raykd.recipe.weight_files import CONFIG, config_of, tensor_files

KIND = "model_type"
OF_DATA = ("num_labels", "id2label", "label2id")  # keys of a config.json that the data decide
OF_A_FILE = {  # keys that say nothing of a model's shape
    *OF_DATA,
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "problem_type",
    "finetuning_task",
    "use_cache",
}
ONE_CLASS = "single_label_classification"
UNNAMED = "LABEL_"  # begins the names that transformers gives classes without one


class TransformersClassifier(nn.Module):
    """Logits (B, C) of sentences (B, T).

    Padding becomes the model's own padding token: some look there for a sentence's end.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """What a config.json would say of it."""
        return self.model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """int64 tokens and their mask (B, T)."""
        padding = self.config.pad_token_id
        if padding is not None:
            input_ids = torch.where(attention_mask.bool(), input_ids, padding)
        return {"logits": self.model(input_ids=input_ids, attention_mask=attention_mask).logits}


def build(
    ref: ModelRef, shape: Mapping[str, int], key: str, form: Form | None
) -> TransformersClassifier:
    """The model of a `[teacher]` or `[student]` for sentences of this shape.

    RecipeError, which starts with `key`, if it has no head, or another number of classes or fewer
    tokens than the data.
    """
    folder = Path(ref.weights) if ref.weights else None
    if folder is not None and not folder.is_dir():
        folder = None  # but a file of trained weights
    if not isinstance(ref, StudentRef):
        if folder is None:
            raise RecipeError(f"{key}.weights: name the Hugging Face folder of the model")
        _check_classes(config_of(folder), shape["classes"], f"{key}.weights: {folder}")
        model, absent = _loaded(folder, shape["classes"], form or Form(), f"{key}.weights")
        if absent:
            raise _headless(folder, absent, f"{key}.weights")
        _check_tokens(model, shape["tokens"], key, f"{CONFIG} in {folder}")
        return TransformersClassifier(model.eval())
    config = _config(ref.settings, shape, f"{key}.settings")
    model = _auto().from_config(config)
    _check_tokens(model, shape["tokens"], key, f"{key}.settings")
    if folder is not None:
        _begin(model, folder, ref.layers, shape["classes"], key)
    module = TransformersClassifier(model)
    if ref.weights and folder is None:
        load_weights(module, Path(ref.weights), key)
    return module


def settings_of(folder: Path, layers: Sequence[int] | None) -> dict[str, Any]:
    """The settings of a student that begins as a folder, or as some of its layers."""
    config = config_of(folder)
    known = _known_keys(config.get(KIND), f"{folder / CONFIG}: {KIND}")
    settings = {k: v for k, v in config.items() if k in known and k not in OF_A_FILE}
    if layers is None:
        return settings
    name = _counting(config[KIND])
    count = settings.get(name)
    if not isinstance(count, int):
        raise RecipeError([Problem("student.layers", f"{folder / CONFIG} counts no {name}")])
    absent = [number for number in layers if number >= count]
    if absent:
        text = f"{absent[0]} is not among the layers of student.weights, 0 to {count - 1}"
        raise RecipeError([Problem("student.layers", text)])
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == count:  # a value for each layer
            settings[key] = [value[number] for number in layers]
    return settings | {name: len(layers)}


def check_settings(settings: Mapping[str, Any]) -> None:
    """RecipeError names a key of a student's settings that its kind of model does not have."""
    known = _known_keys(settings.get(KIND), f"student.settings.{KIND}")
    for name in settings:
        if name in OF_DATA:
            text = "is what the data say; leave it out"
            raise RecipeError([Problem(f"student.settings.{name}", text)])
        if name not in known:
            text = f"no key of {settings[KIND]!r}.{suggestion(name, known)}"
            raise RecipeError([Problem(f"student.settings.{name}", text)])


def check_names(folder: Path, classes: Sequence[str], key: str) -> None:
    """RecipeError if a folder names classes of the data in another order."""
    named = _class_names(config_of(folder))
    place = {name.casefold(): number for number, name in enumerate(named)}
    if any(place.get(name.casefold(), number) != number for number, name in enumerate(classes)):
        raise RecipeError(
            f"{key}.weights: {folder} has the classes {list(named)}, and the data {list(classes)}, "
            f"in another order; write data.classes = the data's names in the order of {CONFIG}"
        )


def read_plain(folder: Path) -> Any:
    """The classifier of a folder that raykd wrote, as transformers alone reads it."""
    with unreadable(folder, "as a text classifier"):
        return _auto().from_pretrained(str(folder), dtype=torch.float32, **READ)


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers that a model's config counts, and its name. RecipeError without one."""
    count = model.config.num_hidden_layers
    found = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    if len(found) != 1:
        text = f"{type(model).__name__} has no one list of its {count} layers; leave it out"
        raise RecipeError([Problem("student.layers", text)])
    return found[0]


def _begin(model: Any, folder: Path, layers: Sequence[int] | None, classes: int, key: str) -> None:
    """Fill a student from a folder. A head that is not there stays as it was drawn."""
    whole, absent = _loaded(folder, classes, Form(), f"{key}.weights")
    tensors = dict(whole.state_dict())
    for name in absent:
        if name in tensors and name in model.state_dict():
            tensors[name] = model.state_dict()[name]
    if layers is not None:
        path, _ = layers_of(whole)
        tensors = _kept(tensors, path, layers)
    fill(model, tensors, f"{key}.weights {folder}")


def _kept(tensors: Mapping[str, Tensor], path: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Tensors whose layers below `path` are these alone, numbered anew."""
    number_of = {str(old): str(new) for new, old in enumerate(layers)}
    kept = {}
    for name, value in tensors.items():
        if not name.startswith(f"{path}."):
            kept[name] = value
            continue
        old, _, within = name.removeprefix(f"{path}.").partition(".")
        if old in number_of:
            kept[f"{path}.{number_of[old]}.{within}"] = value
    return kept


def _loaded(folder: Path, classes: int, form: Form, key: str) -> tuple[Any, list[str]]:
    """(the model of a folder, the tensors of a head that its files have not).

    RecipeError, which starts with `key`, if they lack others, or have a head of other classes.
    """
    check_stored(tensor_files(folder))
    auto = _auto()
    with unreadable(folder, "as a text classifier"):
        model, loading = auto.from_pretrained(
            str(folder),
            num_labels=classes,
            dtype=form.dtype,
            attn_implementation=form.implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **placing(form),
            **READ,
        )
    if loading["mismatched_keys"]:
        _check_classes(config_of(folder), classes, f"{key}: {folder}")
    absent = sorted(map(str, loading["missing_keys"]))
    base = f"{model.base_model_prefix}."
    lost = sorted(map(str, loading["mismatched_keys"]))
    lost += [name for name in absent if name.startswith(base) and ".pooler." not in name]
    if lost:
        text = f"the files of {folder} lack {_few(lost)}, as {CONFIG} has them"
        raise RecipeError(f"{key}: {text}")
    return model.to(form.device, form.dtype), absent


def _headless(folder: Path, absent: Sequence[str], key: str) -> RecipeError:
    return RecipeError(
        f"{key}: {folder} has no head that classifies: its files lack {_few(absent)}; name the "
        "folder of a model that was fine-tuned on these classes"
    )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_classes(config: Mapping[str, Any], classes: int, where: str) -> None:
    """RecipeError if a folder's model answers with other than the data's classes."""
    problem = config.get("problem_type")
    if problem not in (None, ONE_CLASS):
        raise RecipeError(f'{where} has problem_type {problem!r}, and the task is "class"')
    names = config.get("id2label")
    count = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
    if count != classes:
        named = _class_names(config)
        told = f" ({', '.join(named[:5])})" if named else ""
        raise RecipeError(
            f"{where} answers with {count} classes{told}, and the data have {classes}; name a "
            "model of these classes"
        )


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a config's classes in their order; none where they are only numbered."""
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    try:
        ordered = [str(names[number]) for number in sorted(names, key=int)]
    except ValueError:
        return ()
    return () if all(name.startswith(UNNAMED) for name in ordered) else tuple(ordered)


def _check_tokens(model: Any, tokens: int, key: str, said: str) -> None:
    """RecipeError if a model's table has fewer tokens than the data's tokeniser, or if nothing
    tells it padding. `said` is where its settings stand.
    """
    if model.config.pad_token_id is None:
        raise RecipeError(
            f"{key}: its model has no padding token, by which it would find the end of a text "
            f"among longer ones; write pad_token_id in {said}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise RecipeError(
            f"{key}: its model knows {rows} tokens, and the data's tokeniser {tokens}; name the "
            "model's own tokenizer.json in data.tokenizer, or raise vocab_size"
        )


def _config(settings: Mapping[str, Any], shape: Mapping[str, int], key: str) -> Any:
    """The config of settings. RecipeError if transformers refuses them."""
    from transformers import AutoConfig  # pyright: ignore[reportMissingImports]

    given = {k: v for k, v in settings.items() if k != KIND}
    given = {"vocab_size": shape["tokens"]} | given | {"num_labels": shape["classes"]}
    try:
        return AutoConfig.for_model(settings.get(KIND, ""), **given)
    except Exception as error:  # its checks are of many classes
        raise RecipeError(f"{key}: transformers refuses them: {error}") from None


def _auto() -> Any:
    """The class that reads classifiers. RecipeError without transformers."""
    try:
        from transformers import (  # pyright: ignore[reportMissingImports]
            AutoModelForSequenceClassification,
        )
        from transformers.utils import logging  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError(
            "model = \"transformers\" needs transformers; type: pip install 'raykd[hf]'"
        ) from None
    logging.disable_progress_bar()
    return AutoModelForSequenceClassification


def _config_class(kind: Any, where: str) -> Any:
    """The class of the configs of a kind of model. RecipeError if there is none."""
    _auto()
    from transformers import CONFIG_MAPPING  # pyright: ignore[reportMissingImports]

    if kind not in CONFIG_MAPPING:
        told = "missing" if kind is None else f"{kind!r} is no kind of model of transformers"
        raise RecipeError(f'{where}: {told}; write one, such as "distilbert"')
    return CONFIG_MAPPING[kind]


def _known_keys(kind: Any, where: str) -> set[str]:
    """The keys that the configs of a kind of model have."""
    cls = _config_class(kind, where)
    return {*cls().to_dict(), *cls.attribute_map, KIND} - OF_A_FILE


def _counting(kind: str) -> str:
    """The key by which a kind of model counts its layers."""
    cls = _config_class(kind, KIND)
    return cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
