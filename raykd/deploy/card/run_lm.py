"""Continue a text with this student, each token the likeliest:  python run.py "Once upon a time" 40   (40 tokens)

Without a tokenizer.json beside it, token ids in and out:  python run.py "17 4 230" 40
The likeliest token after each token of many texts:  python run.py --next texts.npz   (an array of ids for each text)
It needs numpy and onnxruntime, nothing else.
"""

import json
import re
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent
WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)  # GPT-2's
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in PRINTED}  # of tokenizer.json for each byte, the others' from 256 on
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTED)))}


def ascii_like(c):
    """A letter, digit, space or sign for a letter, number, space or sign of any script."""
    kind = unicodedata.category(c)[0]
    return c if c.isascii() else "x" if kind == "L" else "0" if kind == "N" else "\t" if c.isspace() else "!"


def words(text, digits):
    """What is tokenised by itself; with `digits` each of them is cut out first."""
    at = 0
    for part in re.split("([0-9])" if digits else "$^", "".join(map(ascii_like, text))):
        yield from (text[at + word.start() : at + word.end()] for word in WORDS.finditer(part))
        at += len(part)


def encode(text, vocab, ranks, digits=False):
    """Token ids: bytes of each word, of which the pair that was learnt first is merged as long as there is one."""
    ids = []
    for word in words(text, digits):
        parts = [letter for byte in word.encode() if (letter := LETTERS[byte]) in vocab]
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocab[part] for part in parts]
    return ids


def decode(ids, held):
    """The bytes of token ids; special tokens have none."""
    bytes_of, special = {letter: byte for byte, letter in LETTERS.items()}, {t["id"] for t in held["added_tokens"]}
    tokens = {i: token for token, i in held["model"]["vocab"].items()}
    return bytes(bytes_of[letter] for i in ids if i not in special for letter in tokens[i])


def read(student, ids, past, singly):
    """(logits (tokens, V) after each of `ids`, keys and values for the next call)."""
    said = []
    for new in [[i] for i in ids] if singly else [ids]:
        logits, *grown = student.run(None, {"tokens": np.array([new], np.int64), **past})
        past = dict(zip(past, grown, strict=True))
        said.append(logits[0])
    return np.concatenate(said), past


def empty(student):
    """The keys and values before a text."""
    return {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in student.get_inputs()[1:]}


def greedy(student, ids, count, singly=False):
    """The likeliest `count` tokens after `ids`; with `singly` each token is read in a call of its own."""
    past, new, said = empty(student), ids, []
    while len(said) < count:
        logits, past = read(student, new, past, singly)
        new = [int(logits[-1].argmax())]
        said += new
    return said


def next_tokens(student, path, singly):
    """Of each text of a file the likeliest token after each of its tokens."""
    held = np.load(path, allow_pickle=False)
    for ids in map(held.__getitem__, held.files):
        logits, _ = read(student, ids.tolist(), empty(student), singly)
        yield logits.argmax(-1)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    # int8 activations share a range over a call, so a call is a token: an answer depends on nothing after it.
    singly = json.loads((HERE / "model.json").read_bytes()).get("reads_singly", False)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # else int8 overflows on x86 without VNNI
    student = onnxruntime.InferenceSession(str(HERE / "student.onnx"), options, providers=["CPUExecutionProvider"])
    if sys.argv[1] == "--next":
        for decided in next_tokens(student, sys.argv[2], singly):
            print(*decided)
        sys.exit()
    prompt, count, held = sys.argv[1], int(sys.argv[2]), None
    if (HERE / "tokenizer.json").exists():
        held = json.loads((HERE / "tokenizer.json").read_bytes())
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in held["model"]["merges"]]
        digits = held["pre_tokenizer"]["type"] == "Sequence"
        ids = encode(prompt, held["model"]["vocab"], {pair: rank for rank, pair in enumerate(pairs)}, digits)
    else:
        ids = [int(word) for word in prompt.split()]
    steps = int(student.get_modelmeta().custom_metadata_map["steps"])
    if not 1 <= len(ids) <= steps + 1 - count:
        sys.exit(f"{len(ids)} tokens and {count} more: this student reads {steps} in all, and at least one")
    said = greedy(student, ids, count, singly)
    sys.stdout.buffer.write(decode(said, held) if held else " ".join(map(str, said)).encode())
    print()
