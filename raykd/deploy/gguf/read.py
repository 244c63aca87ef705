"""A GGUF file of llama.cpp's "llama" or "bitnet" read back: the model in float32, and its
tokeniser.

Blocks become the numbers that they stand for, by the tables of the gguf library; rotary pairs take
our order. Nothing in the file is executed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raykd.deploy.gguf.write import HEAD, TABLE, gguf_library, name_of, order_of
from raykd.errors import RecipeError
from raykd.models.llama import Llama
from raykd.models.weights import fill

KEYS = {  # ours: the file's
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
DIGITS = {
    "gpt-2": False,
    "default": False,
    "smollm": True,
}  # whether a word of "tokenizer.ggml.pre" is cut at each
SPECIAL = (3, 4)  # token types: control, user defined


def read(path: Path) -> Llama:
    """The model of a file.

    RecipeError if it is of another kind, damaged, or its tensors do not fit.
    """
    return _of(path, _model)


def tokenizer(path: Path) -> str:
    """The file's byte-level BPE as a tokenizer.json.

    RecipeError if it has none, or one of another kind.
    """
    return _of(path, _tokenizer)


def _of(path: Path, make: Callable[[Any, Path], Any]) -> Any:
    gguf = gguf_library()
    try:
        return make(gguf.GGUFReader(path), path)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        OSError,
    ) as error:  # what a damaged one raises
        raise RecipeError(f"{path}: not a GGUF file that can be read here: {error}") from None


def _fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _model(reader: Any, path: Path) -> Llama:
    known, tensors = _fields(reader), {tensor.name: tensor for tensor in reader.tensors}
    settings = _settings(known, tensors, path)
    module, found, read = Llama(**settings), {}, set()
    for name, value in module.state_dict().items():
        owner = name.rpartition(".")[0]
        own = TABLE if settings["tied"] and name_of(owner) == HEAD else name_of(owner)
        read.add(own)
        theirs = tensors.get(own)
        if theirs is None:
            raise RecipeError(f"{path}: no tensor {name_of(owner)} in it")
        values = gguf_library().quants.dequantize(theirs.data, theirs.tensor_type).astype("float32")
        if values.shape != tuple(value.shape):
            raise RecipeError(
                f"{path}: {name_of(owner)} is {values.shape}, and its settings say {tuple(value.shape)}"
            )
        found[name] = torch.empty_like(value)
        found[name][torch.from_numpy(order_of(owner, len(values), settings))] = torch.from_numpy(
            values
        )
    if extra := sorted(tensors.keys() - read):
        raise RecipeError(f"{path}: {extra[0]} is in it, which this Llama has not")
    fill(module, found, f"{path}: its tensors")
    return module


def _settings(known: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A Llama's settings from a file's keys. RecipeError names what it can not be."""
    kind = known.get("general.architecture")
    if kind not in KINDS:
        raise RecipeError(
            f"{path}: general.architecture is {kind!r}; what is read here is {' or '.join(KINDS)}"
        )
    own = {name.removeprefix(f"{kind}."): value for name, value in known.items()}
    own = {
        "attention.head_count_kv": own.get("attention.head_count"),
        "rope.freq_base": 10_000.0,
    } | own
    if missing := [f"{kind}.{theirs}" for theirs in KEYS.values() if own.get(theirs) is None]:
        raise RecipeError(f"{path}: no {', '.join(missing)} in it")
    head = own["embedding_length"] // own["attention.head_count"]
    plain = PLAIN | dict.fromkeys(("rope.dimension_count", "attention.key_length"), (head,))
    for key, may in plain.items():
        if key in own and own[key] not in may:
            raise RecipeError(f"{path}: {kind}.{key} is {own[key]!r}; this Llama has {may[0]!r}")
    settings = {ours: own[theirs] for ours, theirs in KEYS.items()}
    settings |= {
        "classes": int(tensors[TABLE].shape[1]),
        "tied": HEAD not in tensors,
        "sub_norm": kind == "bitnet",
    }
    return settings


def _tokenizer(reader: Any, path: Path) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    known = _fields(reader)
    kind, before = known.get("tokenizer.ggml.model"), known.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or before not in DIGITS:
        raise RecipeError(
            f"{path}: its tokeniser is {kind!r} with words of {before!r}; what is read here is 'gpt2' with words of "
            + " or ".join(map(repr, DIGITS))
        )
    tokens, types = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in known["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if DIGITS[before]:
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    found.pre_tokenizer, found.decoder = words, decoders.ByteLevel()  # type: ignore[assignment]
    found.add_special_tokens(
        [AddedToken(t, special=True) for t, k in zip(tokens, types, strict=True) if k in SPECIAL]
    )
    return found.to_str(pretty=True)
