"""What a recipe's `weights` may name: a safetensors file, or a Hugging Face folder.

A folder holds config.json and model.safetensors, or several files of tensors and their index.
Nothing in it is executed, and whatever could be is refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raykd.errors import Problem, RecipeError
from raykd.files.reading import MOST_JSON, json_of, read_bounded

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LLAMA = "llama"  # one of the two models that a folder is read as
TRANSFORMERS = "transformers"  # the other
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
ATTENTION = (
    "would choose the code of its attention, which may be fetched and is not run; delete the key"
)
REFUSED = {  # keys of config.json
    "auto_map": (
        "asks for code of its own, which is not run; only architectures of transformers itself "
        "are read"
    ),
    "_attn_implementation": ATTENTION,
    "attn_implementation": ATTENTION,
    "_attn_implementation_internal": ATTENTION,
    "transformers_weights": (
        "would have another file's weights read than those that are checked and digested; delete "
        "the key"
    ),
    "quantization_config": "says that its weights are rounded; name a folder of unrounded ones",
}


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json. RecipeError if it is absent or asks for what is not supported."""
    if not (folder / CONFIG).is_file():
        raise RecipeError(f"{folder}: no {CONFIG} in it; name the folder of a Hugging Face model")
    config = _json(folder / CONFIG)
    for table in _tables(config):
        for key, reason in REFUSED.items():
            if table.get(key):
                raise RecipeError(f"{folder / CONFIG}: {key} is {table[key]!r:.80}: it {reason}")
    if not isinstance(config.get("model_type", ""), str):
        raise RecipeError(f"{folder / CONFIG}: model_type is {config['model_type']!r:.80}, no text")
    if (folder / ADAPTER).exists():
        raise RecipeError(
            f"{folder}: this folder is a LoRA adapter ({ADAPTER}); merge it into its base model "
            "and name the merged folder"
        )
    return config


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """Every table in a JSON value, however deep."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _tables(inner)


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files that a path stands for: itself, or those in a folder.

    RecipeError if a folder holds none.
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
            f"{path}: {pickles[0]} is a pickle, which can run code, and there is no {WEIGHTS}; "
            "load it where you trust it and write it with save_pretrained"
        )
    raise RecipeError(f"{path}: neither {WEIGHTS} nor {INDEX} in it")


def hashed_files(folder: Path) -> list[Path]:
    """The files of a folder that decide what is read from it, in order."""
    files = tensor_files(folder)
    index = [] if files == [folder / WEIGHTS] else [folder / INDEX]
    return sorted([folder / CONFIG, *files, *index])


def problems(
    table: str, values: dict[str, Any], files: Sequence[str], *, kind: str
) -> list[Problem]:
    """What is wrong with the weights of a raw [teacher] or [student].

    `files` are the paths that `weights` stands for: one, or one for each seed. `kind` is that of
    the rows: series, text or sentences.
    """
    key = f"{table}.weights"
    weights = values["weights"]
    if Path(weights).is_dir():
        return _folder_problems(table, values, kind)
    is_trained = kind == "sentences" and table == "student"  # of settings, and filled from a file
    if values.get("model") == TRANSFORMERS and not is_trained:
        text = f'model = "{TRANSFORMERS}" needs a Hugging Face folder; {weights} is not a folder'
        return [Problem(key, text)]
    if Path(weights).suffix != ".safetensors":
        text = f"{weights} is not a .safetensors file; others can run code"
        if not Path(weights).exists():
            text += "; nor is it a folder"
        return [Problem(key, text)]
    return [Problem(key, f"no file {path}") for path in files if not Path(path).is_file()]


def _folder_problems(table: str, values: dict[str, Any], kind: str) -> list[Problem]:
    folder = Path(values["weights"])
    problems = []
    readers = (LLAMA,) if table == "student" else (LLAMA, TRANSFORMERS)
    if kind == "sentences":
        readers = (TRANSFORMERS,)
    if values.get("model") not in (*readers, TRANSFORMERS):  # which is refused by its name
        named = " or ".join(f'"{name}"' for name in readers)
        text = f"{folder} is a folder, which is read by model = {named}"
        problems.append(Problem(f"{table}.model", text))
    if table == "teacher" and values.get("settings"):
        text = f"stand in {folder / CONFIG}; leave them out here"
        problems.append(Problem(f"{table}.settings", text))
    if kind == "series":
        text = f"{folder} is a model of texts; name data.tokenizer, or a file"
        problems.append(Problem(f"{table}.weights", text))
    for read in (config_of, tensor_files):
        try:
            read(folder)
        except RecipeError as error:
            problems.append(Problem(f"{table}.weights", str(error)))
    return problems


def _indexed(folder: Path) -> list[Path]:
    """The tensor files that a folder's index names. RecipeError for any other kind of name."""
    file_of = _json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise RecipeError(f"{folder / INDEX}: no weight_map in it")
    names = sorted({name if isinstance(name, str) else repr(name) for name in file_of.values()})
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise RecipeError(
                f"{folder / INDEX}: names {name!r}, which is not a .safetensors file next to it"
            )
        if not (folder / name).is_file():
            raise RecipeError(f"{folder / INDEX}: names {name}, which is missing")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json_of(read_bounded(path, MOST_JSON))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: not an object of keys and values")
    return value
