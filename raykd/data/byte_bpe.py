"""A byte-level BPE tokeniser (GPT-2's) as the data in its tokenizer.json, or refused where that
file says more.

What is accepted, an artefact's run.py tokenises exactly and llama.cpp knows as "gpt2": no
normaliser, the ByteLevel pre-tokeniser with its own pattern, or after one that cuts out every
digit, merges over bytes, of which one that is no token is left out of any text, and special tokens
that no plain text contains.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.errors import RecipeError

PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
ABSENT = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, in GPT-2's letters for bytes; merges, the first first; ids of special tokens.

    With `digits` every digit is a word of its own.
    """

    tokens: list[str]
    merges: list[tuple[str, str]]
    special: frozenset[int]
    digits: bool = False


def read(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    RecipeError names the first key under which it is of another kind.
    """
    try:
        held = json.loads(path.read_bytes())
        model, added = held["model"], held.get("added_tokens") or []
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"tokenizer {path}: not a tokenizer.json of BPE ({error!r}); name one"
        ) from None
    first, second = (
        held.get("pre_tokenizer") or {},
        held.get("post_processor") or {"type": "ByteLevel"},
    )
    parts = first.get("pretokenizers") or []
    digits = first.get("type") == "Sequence" and len(parts) == 2 and parts[0] == DIGITS
    first = parts[1] if digits else first
    if first.get("type") == "ByteLevel":
        first = PLAIN | {key: first[key] for key in PLAIN if key in first}
    asked: dict[str, tuple[Any, Any]] = {  # key: what is found, what is read
        "model.type": (model.get("type", "BPE"), "BPE"),
        "normalizer": (held.get("normalizer"), None),
        "pre_tokenizer": (first, PLAIN),
        "post_processor": (second.get("type"), "ByteLevel"),
        **{f"model.{key}": (model.get(key) or None, None) for key in ABSENT},
        "added_tokens: not special": ([t["content"] for t in added if not t.get("special")], []),
        "model.vocab: ids": (sorted(ids.values()) == list(range(len(ids))), True),
        "model.merges: no token": (
            [m for m in merges if len(m) != 2 or "".join(m) not in ids][:3],
            [],
        ),
    }
    for key, (found, read_as) in asked.items():
        if found != read_as:
            raise RecipeError(
                f"tokenizer {path}: {key} is {found!r}, and only {read_as!r} is read here; leave the tokenizer out, "
                "and the model takes and gives token ids"
            )
    pairs = [(m[0], m[1]) for m in merges]
    special = frozenset(token["id"] for token in added)
    return Vocabulary(sorted(ids, key=ids.__getitem__), pairs, special, digits)


def letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it prints, one from 256 on where not (arXiv
    2005.14165's code).
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
