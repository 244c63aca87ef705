"""A teacher of many classes is scored without the logits of a whole batch, and its store is that
of the logits.

The reference is the same teacher whose head is multiplied out. A matrix product of fewer rows may
sum in another order, so float32 bounds the difference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raykd import data
from raykd.data import Dataset
from raykd.models import adapter
from raykd.recipe.recipe import Recipe
from raykd.stages.load import load
from raykd.teacher import scorer
from raykd.teacher.scorer import Header, Scorer

ROWS = 8


class Largest(TorchDispatchMode):
    """The largest number of bytes of a tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        sizes = [value.nbytes for value in made if isinstance(value, Tensor)]
        self.size = max([self.size, *sizes])
        return out


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return texts.recipe(folder, texts.tokenizer(folder))


def recipe_of(home: Path, *sets: str) -> tuple[Recipe, Dataset]:
    found = load(home, (f"store.batch={ROWS}", 'store.head="lm_head"', *sets))
    return found, data.load(found.data)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("codec", ["dense", "comb", "topk", "hidden"])
def test_the_store_is_that_of_the_logits(home, codec, precision, monkeypatch):
    recipe, dataset = recipe_of(home, f"store.codec={codec!r}", f"precision.teacher={precision!r}")
    rows = dataset.splits["train"].take(slice(0, 2 * ROWS))
    header = Header.of(recipe, dataset)
    whole = Scorer(recipe, header)
    expected = whole.table(rows)
    assert whole.teacher.head is None
    monkeypatch.setattr(adapter, "MANY", header.classes - 1)
    one_row = 4 * rows.inputs.shape[1] * header.classes
    for rows_at_a_time in (1, 3, ROWS):
        monkeypatch.setattr(scorer, "PIECE_BYTES", rows_at_a_time * one_row)
        walked = Scorer(recipe, header)
        found = walked.table(rows)
        assert walked.teacher.head == "lm_head"
        assert found.schema.equals(expected.schema, check_metadata=False)
        for name in set(found.column_names) - {"logits"}:
            mine, theirs = (_numbers(table, name) for table in (found, expected))
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3, equal_nan=True)
        assert found.column("logits").nbytes == expected.column("logits").nbytes


def test_no_logits_of_a_whole_batch_are_made(home, monkeypatch):
    recipe, dataset = recipe_of(home, 'store.codec="topk"')
    rows = dataset.splits["train"].take(slice(0, ROWS))
    header = Header.of(recipe, dataset)
    one_row = 4 * rows.inputs.shape[1] * header.classes
    monkeypatch.setattr(scorer, "PIECE_BYTES", one_row)
    sizes: list[int] = []
    for many in (header.classes - 1, header.classes):
        monkeypatch.setattr(adapter, "MANY", many)
        made = Scorer(recipe, header)
        made.is_known = True
        if many < header.classes:
            inputs, mask = (torch.from_numpy(values[:1]) for values in (rows.inputs, rows.mask))
            made.teacher.find_head(inputs, mask)
        answer = made._forward(rows)
        with Largest() as largest:
            pieces = made._encoded(rows, answer, {})
        assert len(pieces) == (ROWS if many < header.classes else 1)
        sizes.append(largest.size)
    walked, whole = sizes
    assert walked <= 2 * one_row  # of the codec's float64
    assert whole >= ROWS * one_row


def _numbers(table: Any, name: str) -> np.ndarray:
    column = table.column(name).combine_chunks()
    if column.type == "binary":
        return np.frombuffer(b"".join(column.to_pylist()), np.float16).astype(float)
    return column.to_numpy(zero_copy_only=False).astype(float)
