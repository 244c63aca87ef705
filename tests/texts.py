"""A small language for tests: sentences, a tokeniser of their bytes, and a recipe over them with a
random teacher.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raykd.models.llama import Llama

END = "<end>"
STEPS = 40
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "to",
    "it",
    "while",
    "sun",
    "set",
    "over",
    "sea",
]
RECIPE = """
name = "text"
technique = "vanilla"
[data]
source = "./rows"
tokenizer = "{tokenizer}"
end = "{end}"
window = {steps}
columns = {{ group = "group" }}
[teacher]
model = "llama"
weights = "teacher.safetensors"
settings = {{ width = 32, layers = 1, heads = 2, kv_heads = 1 }}
[student]
model = "llama"
settings = {{ width = 16, layers = 1, heads = 2, kv_heads = 1, inner = 32 }}
[terms.kd]
temperature = 1.0
[store]
rows_per_shard = 16
points = 80
[optim]
steps = 30
batch = 8
evaluate_every = 10
learning_rate = 1e-2
"""


def sentence(number: int, words: int) -> str:
    draw = np.random.default_rng(number)
    return " ".join(draw.choice(WORDS, words))


def tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 300 tokens, saved in a folder."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet)
    found.train_from_iterator([sentence(i, 30) for i in range(20)], trainer)
    found.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def recipe(home: Path, tokens: Path) -> Path:
    """A recipe over sentences that lie beside it, under a teacher of random weights that is far
    from uniform.
    """
    splits = ["train"] * 30 + ["val"] * 4 + ["test"] * 30
    rows = [{"split": s, "group": i, "text": sentence(i, 50)} for i, s in enumerate(splits)]
    (home / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), home / "rows" / "a.parquet")
    vocab = len(json.loads(tokens.read_text())["model"]["vocab"])
    torch.manual_seed(1)
    teacher = Llama(classes=vocab, steps=STEPS, width=32, layers=1, heads=2, kv_heads=1)
    teacher.lm_head.weight.data.mul_(30)
    save_file(
        {k: v for k, v in teacher.state_dict().items() if k != "lm_head.weight"},
        home / "teacher.safetensors",
    )
    (home / "recipe.toml").write_text(RECIPE.format(tokenizer=tokens, end=END, steps=STEPS))
    return home / "recipe.toml"
