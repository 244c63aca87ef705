"""A GGUF file of llama.cpp's "llama" or "bitnet" read back: the model in float32, its tokeniser.

The gguf library's tables turn blocks into numbers; rotary pairs take our order. Nothing in the file
is executed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raykd.deploy.gguf.write import HEAD, TABLE, gguf_library, name_of, order_of
from raykd.errors import RecipeError
from raykd.models.llama import Llama
from raykd.models.weights import fill

KEYS = {  # our setting: the file's key
    "steps": "context_length",
    "width": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "inner": "feed_forward_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
KINDS = ("llama", "bitnet")
PLAIN = {"rope.scaling.type": ("none",), "expert_count": (0,)}  # where the file has them
# Whether a value of "tokenizer.ggml.pre" cuts words at each digit.
DIGITS = {"gpt-2": False, "default": False, "smollm": True}
SPECIAL = (3, 4)  # token types: control, user defined
# What reading a damaged file raises.
DAMAGED = (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError)


def read(path: Path) -> Llama:
    """The model of a file. RecipeError if it is another kind's, damaged, or does not fit."""
    return _of(path, _model)


def tokenizer(path: Path) -> str:
    """The file's byte-level BPE as a tokenizer.json. RecipeError if it has no such one."""
    return _of(path, _tokenizer)


def _of(path: Path, make: Callable[[Any, Path], Any]) -> Any:
    gguf = gguf_library()
    try:
        return make(gguf.GGUFReader(path), path)
    except DAMAGED as error:
        raise RecipeError(f"{path}: not a GGUF file that can be read here: {error}") from None


def _fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _model(reader: Any, path: Path) -> Llama:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    settings = _settings(_fields(reader), tensors, path)
    module = Llama(**settings)
    weights: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, value in module.state_dict().items():
        owner = name.rpartition(".")[0]
        key = TABLE if settings["tied"] and name_of(owner) == HEAD else name_of(owner)
        used.add(key)
        tensor = tensors.get(key)
        if tensor is None:
            raise RecipeError(f"{path}: no tensor {name_of(owner)} in it")
        values = gguf_library().quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if values.shape != tuple(value.shape):
            raise RecipeError(
                f"{path}: {name_of(owner)} is {values.shape}, "
                f"and its settings say {tuple(value.shape)}"
            )
        order = torch.from_numpy(order_of(owner, len(values), settings))
        weights[name] = torch.empty_like(value)
        weights[name][order] = torch.from_numpy(values)
    if extra := sorted(tensors.keys() - used):
        raise RecipeError(f"{path}: {extra[0]} is in it, which this Llama has not")
    fill(module, weights, f"{path}: its tensors")
    return module


def _settings(known: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A Llama's settings from a file's keys. RecipeError names one that it cannot have."""
    kind = known.get("general.architecture")
    if kind not in KINDS:
        raise RecipeError(
            f"{path}: general.architecture is {kind!r}; what is read here is {' or '.join(KINDS)}"
        )
    in_file = {name.removeprefix(f"{kind}."): value for name, value in known.items()}
    values = {
        "attention.head_count_kv": in_file.get("attention.head_count"),
        "rope.freq_base": 10_000.0,
    }
    values |= in_file
    if missing := [f"{kind}.{key}" for key in KEYS.values() if values.get(key) is None]:
        raise RecipeError(f"{path}: no {', '.join(missing)} in it")
    head = values["embedding_length"] // values["attention.head_count"]
    plain = PLAIN | dict.fromkeys(("rope.dimension_count", "attention.key_length"), (head,))
    for key, may in plain.items():
        if key in values and values[key] not in may:
            raise RecipeError(f"{path}: {kind}.{key} is {values[key]!r}; this Llama has {may[0]!r}")
    settings = {setting: values[key] for setting, key in KEYS.items()}
    settings |= {
        "classes": int(tensors[TABLE].shape[1]),
        "tied": HEAD not in tensors,
        "sub_norm": kind == "bitnet",
    }
    return settings


def _tokenizer(reader: Any, path: Path) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    known = _fields(reader)
    kind = known.get("tokenizer.ggml.model")
    before = known.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or before not in DIGITS:
        raise RecipeError(
            f"{path}: its tokeniser is {kind!r} with words of {before!r}; "
            f"what is read here is 'gpt2' with words of {' or '.join(map(repr, DIGITS))}"
        )
    tokens = known["tokenizer.ggml.tokens"]
    types = known["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in known["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if DIGITS[before]:
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    bpe.pre_tokenizer = words
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in SPECIAL]
    bpe.add_special_tokens([AddedToken(token, special=True) for token in special])
    return bpe.to_str(pretty=True)
