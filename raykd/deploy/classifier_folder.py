"""A text classifier as a folder that transformers reads without raykd, held against the student.

config.json            with the names of the classes
model.safetensors      the weights, in place of student.safetensors
tokenizer_config.json  beside tokenizer.json, for AutoTokenizer
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from raykd.data.rows import Rows
from raykd.deploy.parity import Bar, Parity, compare
from raykd.files.atomic import write_bytes, write_json
from raykd.models import hf_classifier
from raykd.models.hf_classifier import TransformersClassifier
from raykd.models.weights import weights_of
from raykd.recipe.weight_files import CONFIG, WEIGHTS
from raykd.training.predictions import EVAL_BATCH

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL = {  # what transformers calls a tokeniser's special tokens, and how they are spelt
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
HUB = """---
library_name: transformers
pipeline_tag: text-classification
tags:
- distillation
- raykd
---

"""


def write(module: TransformersClassifier, folder: Path, classes: Sequence[str]) -> None:
    """Write a student's config and weights."""
    config = module.config
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.architectures = [type(module.model).__name__]
    write_json(folder / CONFIG, json.loads(config.to_json_string()))
    write_bytes(folder / WEIGHTS, save(weights_of(module.model), {"format": "pt"}))


def write_tokenizer(tokenizer: Path, folder: Path, longest: int) -> None:
    """Say beside a tokenizer.json what transformers asks of it: its own words, or those that its
    special tokens tell.
    """
    own = tokenizer.parent / TOKENIZER_CONFIG
    if own.is_file():
        write_bytes(folder / TOKENIZER_CONFIG, own.read_bytes())
        return
    added = json.loads(tokenizer.read_bytes()).get("added_tokens") or []
    there = {token["content"] for token in added}
    named = {
        name: spelt for name, spellings in SPECIAL.items() for spelt in spellings if spelt in there
    }
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    write_json(folder / TOKENIZER_CONFIG, told | named)


@torch.inference_mode()
def parity(folder: Path, rows: Rows, trained: NDArray[np.float32], bar: Bar) -> Parity:
    """How far the folder's answers are from the student's (N, C), as transformers reads both.

    GateError if they are too far.
    """
    model = hf_classifier.read_plain(folder).eval()
    answers = []
    for first in range(0, len(rows), EVAL_BATCH):
        part = rows.take(slice(first, first + EVAL_BATCH))
        tokens = torch.from_numpy(part.inputs[..., 0].astype(np.int64))
        mask = torch.from_numpy(part.mask)
        answers.append(TransformersClassifier(model)(tokens, mask.long())["logits"].numpy())
    where = f"{len(rows)} test rows, as transformers answers them"
    return compare(trained, np.concatenate(answers), bar, where)
