"""Folders as Hugging Face writes them, tokenisers and safetensors files, made to harm."""

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hostile.harness import MIB, Asked, Home, add, hostile
from hostile.runs import GARBAGE


def configured(edit: Callable[[dict[str, Any]], Any], words: Any, home: Home) -> Asked:
    home.text()
    path = home.here / "wide" / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_bytes()))))
    return home.asked("check", "recipe.toml", code=2, words=words)


CONFIGS: dict[str, dict[str, Any]] = {
    "a hidden size of a text": {"hidden_size": "32"},
    "a hidden size of 1e308": {"hidden_size": 1e308},
    "a hidden size of null": {"hidden_size": None},
    "no heads": {"num_attention_heads": 0},
    "heads of true": {"num_attention_heads": True},
    "no key heads": {"num_key_value_heads": 0},
    "a billion layers": {"num_hidden_layers": 10**9},
    "a quadrillion tokens": {"vocab_size": 10**15},
    "a quadrillion places": {"max_position_embeddings": 10**15},
    "a rope of a text": {"rope_parameters": "x"},
    "a theta of zero": {"rope_theta": 0},
    "an epsilon of a text": {"rms_norm_eps": "x"},
    "tied of a text": {"tie_word_embeddings": "yes"},
    "a kind that climbs": {"model_type": "../../victim"},
    "a kind of a list": {"model_type": ["llama"]},
    "code of its own": {"auto_map": {"AutoModelForCausalLM": "planted.Model"}},
    "rounded weights": {"quantization_config": {"bits": 4}},
    "an attention of its own": {"_attn_implementation": "sdpa"},
    "an attention under its other name": {"attn_implementation": "kernels-community/x"},
    "an attention inside": {"text_config": {"_attn_implementation": "kernels-community/x"}},
    "weights of another name": {"transformers_weights": "other.safetensors"},
    "such a key deep inside": {"a": [[{"b": {"transformers_weights": "../x.safetensors"}}]]},
    "a megabyte of a name": {"model_type": "x" * MIB},
}
for _name, _changes in CONFIGS.items():
    add("hf", f"config.json with {_name}", partial(configured, lambda c, d=_changes: c | d, "wide"))


def placed(name: str, content: bytes, words: Any, home: Home) -> Asked:
    home.text()
    path = home.here / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return home.asked("check", "recipe.toml", code=2, words=words)


for _kind in (
    "an empty object",
    "an empty list",
    "a number",
    "cut short",
    "bytes",
    "100,000 lists",
):
    add(
        "hf",
        f"{_kind} as config.json",
        partial(placed, "wide/config.json", GARBAGE[_kind], "config.json"),
    )
    add(
        "hf",
        f"{_kind} as tokenizer.json",
        partial(placed, "tokenizer.json", GARBAGE[_kind], "tokenizer.json"),
    )


@hostile("hf")
def a_teacher_of_transformers_with_an_attention_of_its_own(home: Home) -> Asked:
    asked = configured(
        lambda c: c | {"_attn_implementation": "kernels-community/x"}, "_attn_implementation", home
    )
    return Asked((*asked.argv, "--set", "teacher.model=transformers"), 2, asked.words)


@hostile("hf")
def a_config_that_is_a_fifo(home: Home) -> Asked:
    home.text()
    (home.here / "wide" / "config.json").unlink()
    os.mkfifo(home.here / "wide" / "config.json")
    return home.asked("check", "recipe.toml", code=2, words="config.json")


@hostile("hf")
def a_config_of_64_mib(home: Home) -> Asked:
    home.text()
    path = home.here / "wide" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"x": "x" * (64 * MIB)}))
    return home.asked("check", "recipe.toml", code=2, words="config.json")


def indexed(index: Any, home: Home) -> Asked:
    home.text()
    wide = home.here / "wide"
    (wide / "model.safetensors").rename(wide / "part.safetensors")
    (wide / "model.safetensors.index.json").write_text(json.dumps(index))
    return home.asked("check", "recipe.toml", code=2, words="index.json")


INDEXES: dict[str, Any] = {
    "that climbs": {"weight_map": {"a": "../../victim/secret.txt"}},
    "of an absolute path": {"weight_map": {"a": "/etc/passwd.safetensors"}},
    "of a list": {"weight_map": ["part.safetensors"]},
    "of numbers": {"weight_map": {"a": 7, "b": "x"}},
    "without a map": {},
}
for _name, _index in INDEXES.items():
    add("hf", f"an index {_name}", partial(indexed, _index))


@hostile("hf")
def a_file_of_the_index_that_is_a_link(home: Home) -> Asked:
    home.text()
    wide = home.here / "wide"
    (wide / "model.safetensors").unlink()
    (wide / "model.safetensors").symlink_to("/dev/zero")
    return home.asked("check", "recipe.toml", code=2, words="wide")


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def _tensor(**changes: Any) -> bytes:
    return json.dumps(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}
    ).encode()


HEADERS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a header of a terabyte": lambda: header(b"{}", 1 << 40),
    "a header of 17 MiB": lambda: header(b" " * 64, 17 * MIB),
    "a header of 2^64 bytes": lambda: header(b"{}", (1 << 64) - 1),
    "a header of 100,000 lists": lambda: header(GARBAGE["100,000 lists"]),
    "offsets outside": lambda: header(_tensor(data_offsets=[0, 1 << 40])) + bytes(4),
    "a shape of 2^63": lambda: header(_tensor(shape=[1 << 62, 4])) + bytes(4),
    "a type of no name": lambda: header(_tensor(dtype="F1")) + bytes(4),
    "names with escape sequences": lambda: (
        header(
            json.dumps({"\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        )
        + bytes(4)
    ),
    "a name of a megabyte": lambda: (
        header(
            json.dumps({"x" * MIB: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        )
        + bytes(4)
    ),
    "a pickle": lambda: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00.",
}


def weights(content: Callable[[], bytes], home: Home) -> Asked:
    home.write("odd.safetensors", content())
    return home.asked(
        "check", "own.toml", "student.weights=odd.safetensors", code=2, words="student.weights"
    )


for _name, _content in HEADERS.items():
    add("weights", _name, partial(weights, _content))


def typed(dtype: torch.dtype, home: Home) -> Asked:
    """A teacher whose weights are of a type that no floats are."""
    path = home.here / "teacher.safetensors"
    tensors = load_file(path)
    save_file({name: value.to(dtype) for name, value in tensors.items()}, path)
    return home.asked("check", "done.toml", code=2, words="teacher.weights")


for _dtype in (torch.int8, torch.complex64):
    add("weights", f"{_dtype} for floats", partial(typed, _dtype))


def tokenized(edit: Callable[[dict[str, Any]], Any], code: Any, words: Any, home: Home) -> Asked:
    home.text()
    path = home.here / "tokenizer.json"
    path.write_text(json.dumps(edit(json.loads(path.read_bytes()))))
    return home.asked("check", "recipe.toml", code=code, words=words)


def _far_token(held: dict[str, Any]) -> dict[str, Any]:
    vocab = held["model"]["vocab"] | {"far": 4_000_000_000}
    return held | {"model": held["model"] | {"vocab": vocab}}


def _split_at(pattern: str) -> Callable[[dict[str, Any]], Any]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return lambda held: held | {"pre_tokenizer": split}


def _replaced(pattern: str) -> Callable[[dict[str, Any]], Any]:
    rule = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
    return lambda held: held | {"normalizer": rule}


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], Any, Any]] = {
    "a token at four billion": (_far_token, 2, "tokenizer"),
    "a regex that does not end": (
        _split_at("(a|a)*(a|a)*(a|a)*(a|a)*(a|a)*(a|a)*(a|a)*b|(.*)*(.*)*(.*)*!"),
        (0, 2, 3),
        "",
    ),
    "a regex of a million groups": (_split_at("(" * 100_000 + ")" * 100_000), 2, "tokenizer"),
    "a normaliser that does not end": (_replaced("(.*)*(.*)*(.*)*(.*)*(.*)*!"), (0, 2, 3), ""),
    "no vocabulary": (
        lambda held: held | {"model": held["model"] | {"vocab": {}, "merges": []}},
        (2, 3),
        "",
    ),
    "a token at minus one": (
        lambda held: (
            held | {"model": held["model"] | {"vocab": held["model"]["vocab"] | {"x": -1}}}
        ),
        2,
        "tokenizer",
    ),
}
for _name, (_edit, _code, _words) in TOKENIZERS.items():
    add("tokeniser", _name, partial(tokenized, _edit, _code, _words))


@hostile("tokeniser")
def a_fifo(home: Home) -> Asked:
    home.text()
    (home.here / "tokenizer.json").unlink()
    os.mkfifo(home.here / "tokenizer.json")
    return home.asked("check", "recipe.toml", code=2, words="data.tokenizer")


@hostile("tokeniser")
def a_folder(home: Home) -> Asked:
    home.text()
    return home.asked("check", "recipe.toml", "data.tokenizer=wide", code=2, words="data.tokenizer")


@hostile("tokeniser")
def an_end_with_escape_sequences(home: Home) -> Asked:
    home.text()
    return home.asked("check", "recipe.toml", 'data.end="\\u001b[2J"', code=2, words="data.end")
