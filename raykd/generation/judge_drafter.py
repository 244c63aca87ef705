"""Student and teacher writing on from rows of the test split, by speculative decoding: what
acceptance is measured on.

The states are those of serving: texts of the teacher's law, with what the student drafts in them.
What the teacher writes after the same beginnings by itself is the same for every drafter.
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
from raykd.generation.speculative import generate, law, speculate
from raykd.models.llama import Llama
from raykd.recipe.drafter import Drafter


def check(module: nn.Module, key: str) -> Llama:
    """The module, if it can write with others. RecipeError otherwise; `key` names it."""
    if not isinstance(module, Llama):
        raise RecipeError(
            f'drafter: {key} keeps no cache of its own; use {key}.model = "llama", or leave drafter out'
        )
    return module


def reader(module: nn.Module, key: str) -> TorchReader:
    """A module as what reads one text. RecipeError if it keeps no cache."""
    return TorchReader(check(module, key))


def teacher_texts(
    teacher: Reader, split: Rows, how: Drafter, text: TextShape
) -> dict[int, list[int]]:
    """{row: what the teacher writes after its beginning}; the draws are the row's own.

    DataError where no row is long enough to begin a text.
    """
    found = {}
    for row in openings(split, how):
        found[row] = generate(
            teacher, _seen(split, row, how), how.count, **_settings(split, row, how, text)
        ).tokens
    return found


def judge(
    teacher: Reader,
    drafter: Reader,
    split: Rows,
    how: Drafter,
    text: TextShape,
    texts: Mapping[int, Sequence[int]],
) -> Acceptance:
    """What both write after the beginnings of the split's rows, and how far they agree on the
    teacher's `texts` there.

    `texts` are those of `alone`. The draws are the row's own, equal for every drafter.
    """
    found = []
    for row, told in texts.items():
        seen, more = _seen(split, row, how), _settings(split, row, how, text)
        done = speculate(teacher, drafter, seen, how.count, gamma=how.gamma, **more)
        tested, accepted = (
            sum(getattr(each, key) for each in done.rounds) for key in ("tested", "accepted")
        )
        overlap, written = (
            sum(sum(each.overlap) for each in done.rounds),
            (len(done.tokens), done.teacher_calls),
        )
        shared = overlaps(teacher, drafter, seen, told, how, text.vocab)
        agreed = (float(shared.double().sum()), len(shared))
        numbers = (int(split.row_id[row]), int(split.group[row]))
        found.append((*numbers, float(overlap), tested, accepted, *written, *agreed))
    return Acceptance(*(np.array(column) for column in zip(*found, strict=True)))


def overlaps(
    teacher: Reader,
    drafter: Reader,
    seen: Sequence[int],
    told: Sequence[int],
    how: Drafter,
    vocab: int | None,
) -> Tensor:
    """(n,): sum min(p, q) at each token that was told after what was seen, as far as both can read."""
    laws = []
    for reader in (teacher, drafter):
        reader.rollback(0)
        said = reader.step([*seen, *told[:-1]][: reader.steps])[len(seen) - 1 :]
        laws.append(law(said, how.temperature, vocab))
    both = min(map(len, laws))
    return minimum(*(each[:both].cpu() for each in laws)).sum(1)


def _settings(split: Rows, row: int, how: Drafter, text: TextShape) -> dict[str, Any]:
    return {
        "temperature": how.temperature,
        "vocab": text.vocab,
        "eos": text.eos,
        "seed": int(split.row_id[row]),
    }


def _seen(split: Rows, row: int, how: Drafter) -> list[int]:
    return split.inputs[row, : beginning(split.mask[row], how.prompt), 0].tolist()


def openings(split: Rows, how: Drafter) -> list[int]:
    """The rows that texts begin as, at most `how.prompts`: the first of every document, then the
    second ones and so on, of which a last turn that is not whole is spread over the documents.

    DataError where no row has so many tokens, and room for one more.
    """
    steps = np.arange(1, split.mask.shape[1] + 1)
    length = np.where(split.mask, steps, 0).max(1)
    first = np.array([beginning(row, how.prompt) for row in split.mask])
    fit = np.flatnonzero((length >= first) & (first < len(steps)))
    if not len(fit):
        raise DataError(
            f"drafter.prompt = {how.prompt}: no row of the test split has so many tokens and room after them; lower it"
        )
    group, turn, seen = split.group[fit], np.zeros(len(fit), np.int64), dict[int, int]()
    for i, each in enumerate(group.tolist()):
        turn[i] = seen[each] = seen.get(each, -1) + 1
    order: list[int] = []
    for each in range(int(turn.max()) + 1):
        rows = fit[turn == each]
        room = min(how.prompts - len(order), len(rows))
        order += rows[np.arange(room) * len(rows) // max(room, 1)].tolist()
    return order


def beginning(mask: NDArray[np.bool_], prompt: int) -> int:
    """How many of a row's tokens begin a text: its own prompt where its first step is not told,
    which takes a prompt of two tokens; else `prompt`.
    """
    told = int(mask.argmax())
    return told + 1 if told else prompt
