"""Acceptance measured: student and teacher continue rows of the test split together.

They write by speculative decoding, as in serving: the text follows the teacher's law, and the
student drafts within it. What the teacher writes alone after the same beginnings is the same for
every drafter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, minimum, nn

from raykd.data import Rows
from raykd.errors import DataError, RecipeError
from raykd.generation.acceptance import Acceptance
from raykd.generation.own_rows import TextShape
from raykd.generation.reader import Reader, TorchReader
from raykd.generation.speculative import WrittenText, generate, law, speculate
from raykd.models.llama import Llama
from raykd.recipe.drafter import Drafter


def check(module: nn.Module, key: str) -> Llama:
    """The module, if it can write with another. RecipeError otherwise; `key` names its table."""
    if not isinstance(module, Llama):
        raise RecipeError(
            f'drafter: {key} keeps no cache of its own; use {key}.model = "llama", '
            "or leave drafter out"
        )
    return module


def reader(module: nn.Module, key: str) -> TorchReader:
    """A module as a reader of one text. RecipeError if it keeps no cache."""
    return TorchReader(check(module, key))


def teacher_texts(
    teacher: Reader, split: Rows, how: Drafter, text: TextShape
) -> dict[int, list[int]]:
    """{row: the tokens that the teacher writes after its beginning}; the row's id seeds the draws.

    DataError if no row is long enough to begin a text.
    """
    texts = {}
    for row in openings(split, how):
        prompt = _beginning_of(split, row, how)
        written = generate(teacher, prompt, how.count, **_settings(split, row, how, text))
        texts[row] = written.tokens
    return texts


def judge(
    teacher: Reader,
    drafter: Reader,
    split: Rows,
    how: Drafter,
    text: TextShape,
    texts: Mapping[int, Sequence[int]],
) -> Acceptance:
    """What both write after the beginnings of rows, and their overlap on the teacher's own texts.

    `texts` are those of `teacher_texts`. The row's id seeds the draws, so they are equal for every
    drafter.
    """
    rows = list(texts)
    written: list[WrittenText] = []
    agreed: list[Tensor] = []
    for row in rows:
        prompt = _beginning_of(split, row, how)
        settings = _settings(split, row, how, text)
        written.append(speculate(teacher, drafter, prompt, how.count, gamma=how.gamma, **settings))
        agreed.append(overlaps(teacher, drafter, prompt, texts[row], how, text.vocab))
    return Acceptance(
        row_id=np.array([int(split.row_id[row]) for row in rows]),
        group=np.array([int(split.group[row]) for row in rows]),
        overlap=np.array([float(sum(sum(r.overlap) for r in done.rounds)) for done in written]),
        tested=np.array([sum(r.tested for r in done.rounds) for done in written]),
        accepted=np.array([sum(r.accepted for r in done.rounds) for done in written]),
        tokens=np.array([len(done.tokens) for done in written]),
        calls=np.array([done.teacher_calls for done in written]),
        shared=np.array([float(shares.double().sum()) for shares in agreed]),
        places=np.array([len(shares) for shares in agreed]),
    )


def overlaps(
    teacher: Reader,
    drafter: Reader,
    prompt: Sequence[int],
    tokens: Sequence[int],
    how: Drafter,
    vocab: int | None,
) -> Tensor:
    """(n,): sum min(p, q) at each of the tokens after a prompt, as far as both can read."""
    laws = []
    for reader in (teacher, drafter):
        reader.rollback(0)
        logits = reader.step([*prompt, *tokens[:-1]][: reader.steps])[len(prompt) - 1 :]
        laws.append(law(logits, how.temperature, vocab))
    both = min(map(len, laws))
    return minimum(*(probabilities[:both].cpu() for probabilities in laws)).sum(1)


def _settings(split: Rows, row: int, how: Drafter, text: TextShape) -> dict[str, Any]:
    return {
        "temperature": how.temperature,
        "vocab": text.vocab,
        "eos": text.eos,
        "seed": int(split.row_id[row]),
    }


def _beginning_of(split: Rows, row: int, how: Drafter) -> list[int]:
    return split.inputs[row, : beginning(split.mask[row], how.prompt), 0].tolist()


def openings(split: Rows, how: Drafter) -> list[int]:
    """The rows that texts continue, at most `how.prompts` of them.

    The first row of every document comes first, then the second of each, and so on. A last turn
    that is not whole is spread over the documents. DataError if no row has enough tokens, with room
    for one more.
    """
    steps = np.arange(1, split.mask.shape[1] + 1)
    length = np.where(split.mask, steps, 0).max(1)
    first = np.array([beginning(row, how.prompt) for row in split.mask])
    fit = np.flatnonzero((length >= first) & (first < len(steps)))
    if not len(fit):
        raise DataError(
            f"drafter.prompt = {how.prompt}: no row of the test split has so many tokens and room "
            "after them; lower it"
        )
    turn = np.zeros(len(fit), np.int64)  # the how-manieth row of its document each is
    count: dict[int, int] = {}
    for i, document in enumerate(split.group[fit].tolist()):
        turn[i] = count.get(document, 0)
        count[document] = count.get(document, 0) + 1
    order: list[int] = []
    for number in range(int(turn.max()) + 1):
        rows = fit[turn == number]
        room = min(how.prompts - len(order), len(rows))
        order += rows[np.arange(room) * len(rows) // max(room, 1)].tolist()
    return order


def beginning(mask: NDArray[np.bool_], prompt: int) -> int:
    """How many of a row's tokens begin a text: its own prompt if it has one, else `prompt`.

    `mask` (T,) leaves out the first step of a row with a prompt of at least two tokens.
    """
    first = int(mask.argmax())
    return first + 1 if first else prompt
