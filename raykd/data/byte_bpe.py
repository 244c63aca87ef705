"""A byte-level BPE tokeniser (GPT-2's) read from its tokenizer.json.

A file is refused unless an artefact's run.py tokenises exactly as it says and llama.cpp knows it
as "gpt2". It has no normaliser. Its pre-tokeniser is ByteLevel with its own pattern, alone or after
one that splits off every digit. Its merges are over bytes; a byte that is no token is left out of
any text. Its special tokens are in no plain text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.errors import RecipeError
from raykd.files.reading import MOST_JSON, json_of, read_bounded

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
    """Tokens by id, in GPT-2's letters for bytes; merges by rank; ids of the special tokens.

    With `digits`, every digit is a word.
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
        content = json_of(read_bounded(path, MOST_JSON))
        model = content["model"]
        added = content.get("added_tokens") or []
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        merges = [_pair(merge) for merge in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"tokenizer {path}: not a tokenizer.json of BPE ({error!r}); name one"
        ) from None
    splitter, digits = _splitter(content.get("pre_tokenizer") or {})
    processor = content.get("post_processor") or {"type": "ByteLevel"}
    plain_added = [token["content"] for token in added if not token.get("special")]
    dangling = [merge for merge in merges if len(merge) != 2 or "".join(merge) not in ids]
    values: dict[str, tuple[Any, Any]] = {  # key: (the file's value, the only one that is read)
        "model.type": (model.get("type", "BPE"), "BPE"),
        "normalizer": (content.get("normalizer"), None),
        "pre_tokenizer": (splitter, PLAIN),
        "post_processor": (processor.get("type"), "ByteLevel"),
        **{f"model.{key}": (model.get(key) or None, None) for key in ABSENT},
        "added_tokens: not special": (plain_added, []),
        "model.vocab: ids": (sorted(ids.values()) == list(range(len(ids))), True),
        "model.merges: no token": (dangling[:3], []),
    }
    for key, (value, readable) in values.items():
        if value != readable:
            raise RecipeError(
                f"tokenizer {path}: {key} is {value!r}, and only {readable!r} is read here; leave "
                "the tokenizer out, and the model takes and gives token ids"
            )
    return Vocabulary(
        tokens=sorted(ids, key=ids.__getitem__),
        merges=[(merge[0], merge[1]) for merge in merges],
        special=frozenset(token["id"] for token in added),
        digits=digits,
    )


def _pair(merge: Any) -> tuple[Any, ...]:
    """A merge, which is written as a list or as two words in one string."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _splitter(pre_tokenizer: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the pre-tokeniser with its defaults filled in, whether another splits off digits first)."""
    sequence = pre_tokenizer.get("pretokenizers") or []
    digits = (
        pre_tokenizer.get("type") == "Sequence" and len(sequence) == 2 and sequence[0] == DIGITS
    )
    splitter = sequence[1] if digits else pre_tokenizer
    if splitter.get("type") == "ByteLevel":
        splitter = PLAIN | {key: splitter[key] for key in PLAIN if key in splitter}
    return splitter, digits


def letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself if it prints, else one from 256 on.

    The rule is that of GPT-2's code (arXiv 2005.14165).
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letter = {byte: chr(byte) for byte in printed}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return letter
