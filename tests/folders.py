"""A recipe over the folder of a Llama whose head is wider than its tokeniser."""

import json
import shutil
from pathlib import Path

import by_hand
import numpy as np
import texts
import torch
from safetensors.torch import load_file, save_file

from raykd.models import hf_folder
from raykd.models.llama import Llama
from raykd.recipe.recipe import Recipe
from raykd.recipe.weight_files import CONFIG, INDEX, WEIGHTS
from raykd.stages import load as checks

PADDING = 20  # columns


def llama(classes: int, **settings) -> Llama:
    """Weights large enough that attention is not flat."""
    torch.manual_seed(0)
    module = Llama(classes=classes, **{"steps": 64, "width": 32, "inner": 48, **settings})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return module.eval()


def home(folder: Path) -> Path:
    """A recipe whose teacher is the folder `wide`; `narrow.safetensors` has the same weights
    without its padding.
    """
    path = texts.recipe(folder, texts.tokenizer(folder))
    classes = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    wide = llama(classes + PADDING, steps=texts.STEPS + 9, layers=1, heads=2, kv_heads=1)
    hf_folder.write(wide, folder / "wide")
    narrow = {
        k: v[:classes] if k == hf_folder.TABLE else v
        for k, v in load_file(folder / "wide" / WEIGHTS).items()
    }
    save_file({k: v.contiguous() for k, v in narrow.items()}, folder / "narrow.safetensors")
    bare = path.read_text().replace(
        "settings = { width = 32, layers = 1, heads = 2, kv_heads = 1 }\n", "", 1
    )
    path.write_text(
        bare.replace("teacher.safetensors", "wide").replace("[store]", '[store]\ncodec = "dense"')
    )
    return folder


def load(home: Path, *sets: str) -> Recipe:
    return checks.load(home / "recipe.toml", sets)


def stored(recipe: Recipe) -> dict[str, np.ndarray]:
    """Every column of what a recipe's store holds of 20 rows, as one array."""
    scorer, dataset = by_hand.scorer_of(recipe)
    found = scorer.table(dataset.splits["test"].take(slice(20))).to_pydict()
    halves = {
        k: [np.frombuffer(x, "<f2") if isinstance(x, bytes) else x for x in v]
        for k, v in found.items()
    }
    return {
        k: np.concatenate([np.ravel(x) for x in v]).astype(np.float64) for k, v in halves.items()
    }


def split(folder: Path, to: Path) -> None:
    """A folder's copy with its weights in two files."""
    tensors = load_file(folder / WEIGHTS)
    places = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
    to.mkdir()
    shutil.copy(folder / CONFIG, to)
    for file in set(places.values()):
        save_file(
            {n: tensors[n] for n in tensors if places[n] == file}, to / file, {"format": "pt"}
        )
    (to / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
