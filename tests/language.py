"""A small language for tests: the standard library's sources under a byte-level BPE that is trained
on them.
"""

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from raykd.models.llama import Llama

SOURCES = Path(textwrap.__file__).parent
READ = ("textwrap.py", "argparse.py", "heapq.py")
HELD_OUT = "shlex.py"
END = "<|endoftext|>"
TOKENS = 384


def bpe(path: Path) -> Tokenizer:
    """Train the tokeniser, write its tokenizer.json and return the library's object."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": [END], "initial_alphabet": letters, "show_progress": False}
    tokenizer.train(
        [str(SOURCES / name) for name in READ], trainers.BpeTrainer(vocab_size=TOKENS, **settings)
    )
    tokenizer.save(str(path))
    return tokenizer


def text(tokenizer: Tokenizer, *names: str) -> Tensor:
    """(N,) int64: the tokens of some sources."""
    return torch.tensor(
        tokenizer.encode("".join((SOURCES / name).read_text() for name in names)).ids
    )


def train(module: Llama, ids: Tensor, steps: int, rate: float) -> Llama:
    """Plain cross-entropy on windows of the tokens, the same ones at every call."""
    draw = torch.Generator().manual_seed(0)
    optim = torch.optim.AdamW(module.parameters(), lr=rate)
    for _ in range(steps):
        first = torch.randint(len(ids) - 65, (8,), generator=draw)
        rows = ids[first[:, None] + torch.arange(65)]
        loss = F.cross_entropy(module(rows[:, :-1])["logits"].flatten(0, 1), rows[:, 1:].flatten())
        optim.zero_grad()
        loss.backward()
        optim.step()
    return module.eval()
