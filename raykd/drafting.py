"""Student and teacher writing on from rows of the test split, by speculative decoding: what acceptance is measured on.

The states are those of serving: texts of the teacher's law, with what the student drafts in them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.acceptance import Drafts
from raykd.data import Rows
from raykd.drafter import Drafter
from raykd.errors import DataError, RecipeError
from raykd.readers import Reader, TorchReader
from raykd.speculative import speculate
from raykd.written import Text


def reader(module: Any, key: str) -> TorchReader:
    """A module as what reads one text. RecipeError if it keeps no cache; `key` names it."""
    if not hasattr(module, "cache"):
        raise RecipeError(
            f'drafter: {key} keeps no cache of keys and values; use {key}.model = "llama", or leave it out'
        )
    return TorchReader(module)


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
    """The rows that texts begin as, at most `how.prompts`: the first of every document, then the second ones."""
    steps = np.arange(1, split.mask.shape[1] + 1)
    length = np.where(split.mask, steps, 0).max(1)
    first = np.array([beginning(row, how.prompt) for row in split.mask])
    fit = np.flatnonzero(length >= first)
    if not len(fit):
        raise DataError(f"drafter.prompt = {how.prompt}: no row of the test split has so many tokens; lower it")
    turn: dict[int, int] = {}
    order = []
    for row in fit.tolist():
        group = int(split.group[row])
        order.append((turn.setdefault(group, 0), row))
        turn[group] += 1
    return [row for _, row in sorted(order)[: how.prompts]]


def beginning(mask: NDArray[np.bool_], prompt: int) -> int:
    """How many of a row's tokens begin a text: its own prompt, where the first step is not told; else `prompt`."""
    told = int(mask.argmax())
    return told + 1 if told else prompt
