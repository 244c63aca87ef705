"""Student and teacher writing on from rows of the test split, by speculative decoding: what acceptance is measured on.

The states are those of serving: texts of the teacher's law, with what the student drafts in them.
"""

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raykd.acceptance import Drafts
from raykd.data import Rows
from raykd.drafter import Drafter
from raykd.errors import DataError, RecipeError
from raykd.models.llama import Llama
from raykd.readers import Reader, TorchReader
from raykd.speculative import speculate
from raykd.written import Text


def check(module: nn.Module, key: str) -> Llama:
    """The module, if it can write with others. RecipeError otherwise; `key` names it."""
    if not isinstance(module, Llama):
        raise RecipeError(f'drafter: {key} keeps no cache of its own; use {key}.model = "llama", or leave drafter out')
    return module


def reader(module: nn.Module, key: str) -> TorchReader:
    """A module as what reads one text. RecipeError if it keeps no cache."""
    return TorchReader(check(module, key))


def judge(teacher: Reader, drafter: Reader, split: Rows, how: Drafter, text: Text) -> Drafts:
    """What both write after the beginnings of the split's rows; the draws are the row's own, equal for every drafter.

    DataError where no row is long enough to begin a text.
    """
    found = []
    for row in openings(split, how):
        seen = split.inputs[row, : beginning(split.mask[row], how.prompt), 0].tolist()
        number = int(split.row_id[row])
        done = speculate(
            teacher,
            drafter,
            seen,
            how.count,
            gamma=how.gamma,
            temperature=how.temperature,
            vocab=text.vocab,
            eos=text.eos,
            seed=number,
        )
        tested, accepted = (sum(getattr(each, key) for each in done.rounds) for key in ("tested", "accepted"))
        overlap = sum(sum(each.overlap) for each in done.rounds)
        group = int(split.group[row])
        found.append((number, group, overlap, tested, accepted, len(done.tokens), done.teacher_calls))
    row_id, group, overlap, *counts = (np.array(column) for column in zip(*found, strict=True))
    return Drafts(row_id, group, overlap.astype(np.float64), *counts)


def openings(split: Rows, how: Drafter) -> list[int]:
    """The rows that texts begin as, at most `how.prompts`: the first of every document, then the second ones and so on,
    of which a last turn that is not whole is spread over the documents.

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
    """How many of a row's tokens begin a text: its own prompt where its first step is not told, which takes a prompt of
    two tokens; else `prompt`.
    """
    told = int(mask.argmax())
    return told + 1 if told else prompt
