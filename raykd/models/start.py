"""What a student begins as: the weights of another model of its kind, whole or some of its layers.

The layers that are kept are numbered anew. A table of a language model's tokens loses the rows
beyond the tokeniser's, which are padding.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raykd.errors import Problem, RecipeError
from raykd.models import hf_classifier, hf_folder
from raykd.models.weights import fill, read_tensors
from raykd.recipe.tables import StudentRef
from raykd.recipe.weight_files import LLAMA, TRANSFORMERS

OF_DATA = ("classes", "steps")  # settings that the data decide
LAYERS = "layers"  # the setting that counts layers
IN_A_LAYER = re.compile(r"(?P<before>\D*)\.(?P<number>\d+)\.(?P<within>.+)")


def resolved(
    student: Mapping[str, Any], teacher: Mapping[str, Any], *, of_texts: bool = False
) -> tuple[dict[str, Any], list[Problem]]:
    """A raw [student] with the model, settings and weights that `like` and a folder stand for.

    What is wrong with them comes second; the student is then as it was. `teacher` is the raw
    [teacher], and `of_texts` says that rows are texts with a class.
    """
    like = student.get("like")
    layers = student.get("layers")
    is_list = layers is None or (isinstance(layers, list) and all(type(n) is int for n in layers))
    if like not in (None, "teacher") or not is_list:
        return dict(student), []  # the table itself refuses it
    try:
        if like:
            student = _as_teacher(student, teacher, of_texts=of_texts)
        if of_texts and student.get("model") == TRANSFORMERS:
            return _with_config(dict(student)), []
        return _with_settings(dict(student)), []
    except RecipeError as error:
        found = [
            Problem(problem.key or "student.weights", problem.message) for problem in error.problems
        ]
        return dict(student), found


def load(module: nn.Module, ref: StudentRef, key: str) -> None:
    """Fill a student from `weights`, a file or a Llama's folder, with the layers that it keeps.

    RecipeError, which starts with the table's `key`, if the weights do not fit.
    """
    path = Path(str(ref.weights))
    settings = getattr(module, "settings", {})
    if path.is_dir():
        tensors = hf_folder.tensors_of(path, tied=settings["tied"])
        _check_room(path, settings, key)
        tensors = _without_padding(tensors, settings["classes"], f"{key}.weights: {path}")
    else:
        tensors = read_tensors(path, f"{key}.weights")
    if ref.layers is not None:
        tensors = kept_layers(tensors, ref.layers, key)
    fill(module, tensors, f"{key}.weights {path}")


def kept_layers(
    tensors: Mapping[str, Tensor], layers: Sequence[int], key: str
) -> dict[str, Tensor]:
    """Tensors without the layers that are not among `layers`, which are numbered 0, 1, ... .

    The first whole number in a tensor's name is the number of its layer. RecipeError, which starts
    with `key`, names a layer that is not there.

    Example:
        >>> import torch
        >>> tensors = {f"blocks.{n}.bias": torch.full((1,), n) for n in range(4)}
        >>> kept = kept_layers(tensors, [0, 3], "student")
        >>> {name: value.item() for name, value in kept.items()}
        {'blocks.0.bias': 0, 'blocks.1.bias': 3}
    """
    number_of = {old: new for new, old in enumerate(layers)}
    found = {}
    there = set()
    for name, value in tensors.items():
        match = IN_A_LAYER.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        old = int(match["number"])
        there.add(old)
        if old in number_of:
            found[f"{match['before']}.{number_of[old]}.{match['within']}"] = value
    absent = sorted(set(layers) - there)
    if absent:
        known = f"0 to {max(there)}" if there else "none"
        text = f"{absent[0]} is not among the layers of {key}.weights, which are {known}"
        raise RecipeError([Problem(f"{key}.layers", text)])
    return found


def _as_teacher(
    student: Mapping[str, Any], teacher: Mapping[str, Any], *, of_texts: bool
) -> dict[str, Any]:
    """A student of the teacher's model, settings and weights."""
    own = [name for name in ("model", "settings", "weights") if student.get(name)]
    is_classifier = of_texts and teacher.get("model") == TRANSFORMERS
    if is_classifier:  # of which it may say the model, and change settings
        is_said = {"settings": True, "model": student.get("model") == TRANSFORMERS}
        own = [name for name in own if not is_said.get(name)]
    if own:
        text = 'cannot be said beside like = "teacher", which takes it from there; leave one out'
        raise RecipeError([Problem(f"student.{own[0]}", text)])
    if not teacher.get("weights"):
        text = '"teacher", but there is no [teacher] with weights; add one, or leave it out'
        raise RecipeError([Problem("student.like", text)])
    taken = {name: teacher[name] for name in ("model", "settings", "weights") if name in teacher}
    if is_classifier:
        taken["settings"] = student.get("settings") or {}
    elif taken.get("model") == TRANSFORMERS:  # a Llama is read by either
        taken["model"] = LLAMA
    settings = taken.get("settings") or {}
    layers = student.get("layers")
    if is_classifier:
        layers = None  # they are counted by the folder
    if layers is not None and not Path(str(taken["weights"])).is_dir():
        if not isinstance(settings.get(LAYERS), int):
            text = f"are counted by teacher.settings.{LAYERS}, which is missing; write it"
            raise RecipeError([Problem("student.layers", text)])
        _check_there(layers, range(settings[LAYERS]))
        taken["settings"] = settings | {LAYERS: len(layers)}
    rest = {name: value for name, value in student.items() if name != "like"}
    return rest | taken


def _with_config(student: dict[str, Any]) -> dict[str, Any]:
    """A text classifier of transformers with the settings of its folder under its own."""
    own = student.get("settings") or {}
    if not isinstance(own, dict):
        return student  # the table itself refuses it
    weights = student.get("weights")
    layers = student.get("layers")
    found: dict[str, Any] = {}
    if isinstance(weights, str) and Path(weights).is_dir():
        found = hf_classifier.settings_of(Path(weights), layers)
    elif layers is not None:
        text = "are those that are kept of a folder in student.weights; name it, or leave it out"
        raise RecipeError([Problem("student.layers", text)])
    student["settings"] = found | own
    hf_classifier.check_settings(student["settings"])
    return student


def _with_settings(student: dict[str, Any]) -> dict[str, Any]:
    """A student with the settings of its folder, which count the layers that it keeps."""
    weights = student.get("weights")
    layers = student.get("layers")
    folder = Path(weights) if isinstance(weights, str) and Path(weights).is_dir() else None
    if folder and student.get("model") == LLAMA and not student.get("settings"):
        settings = hf_folder.settings_of(folder)
        _check_there(layers, range(settings[LAYERS]))
        student["settings"] = {k: v for k, v in settings.items() if k not in OF_DATA}
        if layers is not None:
            student["settings"] |= {LAYERS: len(layers)}
    if layers is not None:
        _check_count(student)
    return student


def _check_count(student: Mapping[str, Any]) -> None:
    """RecipeError if [student] has no weights to keep layers of, or counts others."""
    if not student.get("weights"):
        text = "are those that are kept of student.weights; name these, or leave it out"
        raise RecipeError([Problem("student.layers", text)])
    settings = student.get("settings")
    count = settings.get(LAYERS) if isinstance(settings, dict) else None
    kept = len(student["layers"])
    if count != kept:
        text = f"{count}, but student.layers keeps {kept}; write {kept}"
        raise RecipeError([Problem(f"student.settings.{LAYERS}", text)])


def _check_there(layers: Sequence[int] | None, known: range) -> None:
    """RecipeError names a layer that is not among those of the weights."""
    absent = [number for number in layers or () if number not in known]
    if absent:
        text = f"{absent[0]} is not among the layers of student.weights, 0 to {len(known) - 1}"
        raise RecipeError([Problem("student.layers", text)])


def _check_room(folder: Path, settings: Mapping[str, Any], key: str) -> None:
    """RecipeError if a folder's model reads fewer tokens than the data's rows have."""
    room = hf_folder.settings_of(folder)["steps"]
    if room < settings["steps"]:
        raise RecipeError(
            f"{key}.weights: {folder} reads at most {room} tokens; lower data.window to that"
        )


def _without_padding(tensors: dict[str, Tensor], classes: int, source: str) -> dict[str, Tensor]:
    """Tensors whose tables of tokens have `classes` rows. RecipeError if they have fewer."""
    for name in (hf_folder.TABLE, hf_folder.HEAD):
        table = tensors.get(name)
        if table is None:
            continue
        if len(table) < classes:
            raise RecipeError(
                f"{source} knows {len(table)} tokens, and the data's tokeniser {classes}; "
                "name the model's own tokenizer.json in data.tokenizer"
            )
        tensors[name] = table[:classes].clone()
    return tensors
