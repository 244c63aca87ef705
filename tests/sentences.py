"""Sentences for tests: texts that are glad, sad or neither, a tokeniser that puts [CLS] and [SEP]
around each, and models of two layers.
"""

from pathlib import Path
from typing import Any, NamedTuple

import by_hand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from raykd import data
from raykd.data.table import Held
from raykd.deploy import run_artefact
from raykd.recipe.recipe import Recipe
from raykd.reports import evidence, gather
from raykd.teacher.identity import run_digest
from raykd.training.arm import ONE_PROCESS
from raykd.training.run_arms import run_arms

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FILLING = ["the", "film", "was", "and", "then", "it", "ended", "a", "long", "day", "we", "saw"]
SAID = {"glad": ["good", "lovely", "fine"], "plain": ["there"], "sad": ["bad", "dull", "grim"]}
CLASSES = tuple(SAID)
WINDOW = 16


def text(number: int) -> tuple[str, str]:
    """A text of 3 to 12 words, and its class."""
    draw = np.random.default_rng(number)
    label = CLASSES[number % len(CLASSES)]
    words = [*draw.choice(FILLING, draw.integers(2, 12)), draw.choice(SAID[label])]
    return " ".join(draw.permutation(words)), label


def rows(train: int = 60, others: int = 18) -> list[dict[str, str]]:
    """Texts of all splits."""
    splits = ["train"] * train + ["val"] * others + ["test"] * others
    texts = [text(number) for number in range(len(splits))]
    return [
        {"split": split, "text": words, "label": label}
        for split, (words, label) in zip(splits, texts, strict=True)
    ]


def tokenizer(folder: Path) -> Path:
    """A tokeniser of whole words, saved in a folder."""
    words = [*SPECIAL, *FILLING, *(word for said in SAID.values() for word in said)]
    vocab = {word: number for number, word in enumerate(words)}
    found = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found.add_special_tokens(SPECIAL)
    found.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write(folder: Path, found: list[dict[str, str]]) -> Path:
    """The rows as a folder of Parquet."""
    (folder / "rows").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), folder / "rows" / "rows.parquet")
    return folder / "rows"


class Bag(nn.Module):
    """A classifier of the mean of a layer over a sentence's tokens."""

    def __init__(self, *, classes: int, tokens: int, width: int = 16):
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = torch.relu(self.layer(self.table(tokens)))
        count = mask.sum(1, keepdim=True)
        return self.head((x * mask.unsqueeze(-1)).sum(1) / count)


class Leaking(Bag):
    """The same, to which padding is text."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, torch.ones_like(tokens, dtype=torch.bool))


class Walked(NamedTuple):
    """A recipe that went through all stages in this process."""

    folder: Path  # of the run
    store: Any
    manifest: dict[str, Any]  # of the artefact
    report: dict[str, Any]


def walk(recipe: Recipe, out: Path) -> Walked:
    """Score, train with the control, export and report, without Ray."""
    source = Held(data.load(recipe.data, recipe.task))
    store = by_hand.score(recipe, out)
    folder = out / f"run-{run_digest(recipe, source.table())[:8]}"
    run_arms(
        recipe,
        store,
        folder,
        world=ONE_PROCESS,
        device=torch.device("cpu"),
        report=lambda *_: None,
        source=source,
    )
    manifest = run_artefact.write(recipe, source, folder)
    found = gather.gather(recipe, source, folder=folder, where=store, mlflow={})
    return Walked(folder, store, manifest, evidence.build(found))
