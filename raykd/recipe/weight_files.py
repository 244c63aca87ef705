"""What a recipe's `weights` may name: a safetensors file, or a folder as Hugging Face lays out a
language model.

A folder is config.json and model.safetensors, or several files of tensors and their index. Only a
teacher is read from one; nothing in it is executed, and whatever could be is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raykd.errors import Problem, RecipeError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LLAMA, TRANSFORMERS = "llama", "transformers"  # the models that a folder is read as
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
REFUSED = {  # keys of config.json
    "auto_map": "asks for code of its own, which is not run; only architectures of transformers itself are read",
    "quantization_config": "tells that its weights are rounded; name a folder of whole ones",
}


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json. RecipeError if there is none, or it asks for what is not read."""
    if not (folder / CONFIG).is_file():
        raise RecipeError(f"{folder}: no {CONFIG} in it; name the folder of a Hugging Face model")
    found = _json(folder / CONFIG)
    for key, reason in REFUSED.items():
        if found.get(key):
            raise RecipeError(f"{folder / CONFIG}: {key} is {found[key]!r}: it {reason}")
    if (folder / ADAPTER).exists():
        raise RecipeError(
            f"{folder}: {ADAPTER} makes it an adapter's; merge that into its model and save this"
        )
    return found


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files that are read of a path: itself, or of a folder one or several.

    RecipeError if none are.
    """
    if not path.is_dir():
        return [path]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return _indexed(path)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise RecipeError(
            f"{path}: {pickles[0]} is a pickle, which can run code, and there is no {WEIGHTS}; load it where you trust "
            "it and write it with save_pretrained"
        )
    raise RecipeError(f"{path}: neither {WEIGHTS} nor {INDEX} in it")


def hashed_files(folder: Path) -> list[Path]:
    """The files of a folder that decide what is read from it, in order."""
    files = tensor_files(folder)
    return sorted(
        [folder / CONFIG, *files, *([] if files == [folder / WEIGHTS] else [folder / INDEX])]
    )


def problems(
    table: str, values: dict[str, Any], files: Sequence[str], *, is_text: bool
) -> list[Problem]:
    """What is wrong with the weights of a raw [teacher] or [student]; `files` are those that they
    stand for.
    """
    weights, model = values["weights"], values.get("model")
    if Path(weights).is_dir():
        return _folder_problems(table, values, is_text)
    if model == TRANSFORMERS:
        return [
            Problem(
                f"{table}.weights",
                f'model = "{TRANSFORMERS}" reads a folder, and {weights} is none',
            )
        ]
    if Path(weights).suffix != ".safetensors":
        text = f"{weights} is not a .safetensors file; others can run code"
        return [
            Problem(
                f"{table}.weights",
                text if Path(weights).exists() else f"{text}; nor is it a folder",
            )
        ]
    return [
        Problem(f"{table}.weights", f"no file {path}") for path in files if not Path(path).is_file()
    ]


def _folder_problems(table: str, values: dict[str, Any], is_text: bool) -> list[Problem]:
    folder, model = Path(values["weights"]), values.get("model")
    if table == "student":
        text = f'{folder} is a folder, of which only a teacher is read; with model = "{LLAMA}" name its {WEIGHTS} here'
        return [Problem("student.weights", f"{text} and write its settings as student.settings")]
    found = []
    if model not in (LLAMA, TRANSFORMERS):
        text = f'{folder} is a folder, which is read by model = "{LLAMA}" or "{TRANSFORMERS}"'
        found.append(Problem(f"{table}.model", text))
    if values.get("settings"):
        found.append(
            Problem(f"{table}.settings", f"stand in {folder / CONFIG}; leave them out here")
        )
    if not is_text:
        found.append(
            Problem(
                f"{table}.weights",
                f"{folder} is of a language model; name data.tokenizer, or a file",
            )
        )
    for read in (config_of, tensor_files):
        try:
            read(folder)
        except RecipeError as error:
            found.append(Problem(f"{table}.weights", str(error)))
    return found


def _indexed(folder: Path) -> list[Path]:
    places = _json(folder / INDEX).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names:
        raise RecipeError(f"{folder / INDEX}: no weight_map in it")
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or Path(name).suffix != ".safetensors"
        ):
            raise RecipeError(
                f"{folder / INDEX}: names {name!r}, which is no .safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise RecipeError(f"{folder / INDEX}: names {name}, which is missing")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: not an object of keys and values")
    return found
