"""A Llama in a Hugging Face folder: config.json and model.safetensors, as transformers has them.

The parameters of `models.llama` have the names of these files. A model with `sub_norm` is a
BitNetForCausalLM with activation silu, any other is a LlamaForCausalLM.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from raykd.errors import RecipeError
from raykd.files.atomic import write_bytes, write_json
from raykd.models.form import Form
from raykd.models.llama import Llama
from raykd.models.size import check_size, without_values
from raykd.models.weights import fill, read_tensors, weights_of
from raykd.recipe.weight_files import CONFIG, WEIGHTS, config_of, tensor_files

HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"
KEYS = {  # ours: theirs
    "classes": "vocab_size",
    "steps": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "inner": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
MOST = 10**9  # of anything that is counted
LARGEST = 1e30  # of other numbers
KINDS = {"llama": "LlamaForCausalLM", "bitnet": "BitNetForCausalLM"}
DEFAULTS = {  # of keys that config.json may leave out
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def read(folder: Path, form: Form | None = None) -> Llama:
    """The model of a folder, in float32; with a `form` in its numbers, straight on its device.

    RecipeError if it is of another kind, or if its tensors do not fit. Nothing in the folder is
    executed. The weights may be one file, or several with an index.
    """
    settings = settings_of(folder)
    try:
        check_size(lambda: Llama(**settings))
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"{folder / CONFIG}: {error}") from None
    with without_values() if form else nullcontext():
        module = Llama(**settings)
    tensors = tensors_of(folder, tied=module.settings["tied"], form=form)
    fill(module, tensors, f"{folder}: its tensors", are_taken=form is not None)
    return module


def tensors_of(folder: Path, *, tied: bool, form: Form | None = None) -> dict[str, Tensor]:
    """The tensors of a Llama's folder, in the numbers of a `form`; if `tied`, without a head."""
    tensors: dict[str, Tensor] = {}
    for path in tensor_files(folder):
        tensors |= read_tensors(path, "weights", form)
    tensors = {
        name: value for name, value in tensors.items() if not name.endswith("rotary_emb.inv_freq")
    }
    if tied and TABLE in tensors:
        tensors.pop(HEAD, None)
    return tensors


def settings_of(folder: Path) -> dict[str, Any]:
    """A Llama's settings, as its folder has them. RecipeError if it is of another kind."""
    return _settings(config_of(folder), folder / CONFIG)


def unfilled(folder: Path) -> Llama:
    """The model of a folder without its weights, which are not read: it takes no memory."""
    settings = settings_of(folder)
    with torch.device("meta"):
        return Llama(**settings)


def write(module: Llama, folder: Path) -> None:
    """Write a model with its weights as they are, without rounding.

    RecipeError if it has parameters for which the folder has no name.
    """
    names = Llama(**module.settings).state_dict().keys()
    tensors = weights_of(module)
    if extra := sorted(tensors.keys() - names):
        raise RecipeError(
            f"{folder}: Hugging Face's layout has no place for {', '.join(extra[:3])}; "
            'write a model without learned scales: scale = "absmax" or "absmean"'
        )
    kind = "bitnet" if module.settings["sub_norm"] else "llama"
    config = {theirs: module.settings[ours] for ours, theirs in KEYS.items()}
    config |= {
        "model_type": kind,
        "architectures": [KINDS[kind]],
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": None,  # the tokeniser's, which a model does not know
        "eos_token_id": None,
    }
    write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def _check_numbers(known: Mapping[str, Any], path: Path) -> None:
    """RecipeError names a key whose value is not of its kind, or beyond what a model can have."""
    for key in KEYS.values():
        value = known[key]
        if key == "tie_word_embeddings":
            is_right = isinstance(value, bool)
            wanted = "true or false"
        elif key in ("rope_theta", "rms_norm_eps"):
            is_right = type(value) in (int, float) and 0 < value < LARGEST
            wanted = "a number above 0"
        else:
            is_right = type(value) is int and 0 < value <= MOST
            wanted = f"a whole number from 1 to {MOST:,}"
        if not is_right:
            raise RecipeError(f"{path}: {key} is {value!r:.40}; it must be {wanted}")


def _settings(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A Llama's settings from a config.json. RecipeError names a key that a Llama cannot have."""
    kind = config.get("model_type")
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise RecipeError(f"{path}: {name} is {rope!r:.40}, not a table")
    known: dict[str, Any] = {**DEFAULTS, "num_key_value_heads": config.get("num_attention_heads")}
    known |= config
    known["rope_theta"] = rope.get("rope_theta", known["rope_theta"])
    missing = sorted(set(KEYS.values()) - known.keys())
    if missing:
        raise RecipeError(f"{path}: no {', '.join(missing)} in it; name the folder of a Llama")
    _check_numbers(known, path)
    width = known["hidden_size"] // known["num_attention_heads"]
    values = {  # key: (the file's value, the values that this Llama may have)
        "model_type": (kind, tuple(KINDS)),
        "hidden_act": (config.get("hidden_act", "silu"), ("silu",)),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
        "head_dim": (config.get("head_dim") or width, (width,)),
        "attention_bias": (config.get("attention_bias", False), (False,)),
        "mlp_bias": (config.get("mlp_bias", False), (False,)),
    }
    for key, (value, possible) in values.items():
        if value not in possible:
            raise RecipeError(
                f"{path}: {key} is {value!r}; this Llama has {' or '.join(map(repr, possible))}, "
                'and a teacher of another kind is read by model = "transformers"'
            )
    settings = {ours: known[theirs] for ours, theirs in KEYS.items()}
    return settings | {"sub_norm": kind == "bitnet"}
