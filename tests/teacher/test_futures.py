"""What a teacher's value head, or its realised future, becomes in the store.

The references are the head's own answers, and documents that stand alone.
"""

from itertools import pairwise

import by_hand
import numpy as np
import pytest
import texts
import torch
from torch import Tensor

from raykd import data
from raykd.errors import StoreError
from raykd.losses.objective import Objective
from raykd.losses.valence import prefix_confidence, realised_future
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import TermSpec
from raykd.signals import Signals
from raykd.stages.load import load, resolve
from raykd.store.reader import Store
from raykd.store.stored_rows import StoredRows
from raykd.teacher.scorer import Header, Scorer
from raykd.teacher.statistics import check_futures
from raykd.training.device_rows import beside

ROWS = """
import numpy as np
from raykd.data import Dataset, Rows


def rows(column=False):
    draws = np.random.default_rng(0)
    mask = np.arange(6) < draws.integers(2, 7, 12)[:, None]
    inputs = (draws.normal(size=(12, 6, 6)) * mask[..., None]).astype(np.float32)
    valence = np.where(np.arange(6) < 2, draws.uniform(-1, 1, (12, 6)), np.nan)
    every = Rows(
        np.arange(12), inputs, mask, np.arange(12) % 7, np.arange(12),
        valence.astype(np.float32) if column else None,
    )
    splits = {n: every.take(slice(i, i + 4)) for n, i in (("train", 0), ("val", 4), ("test", 8))}
    return Dataset("rows", tuple("abcdefg"), splits)
"""


class Answering(Scorer):
    """A scorer whose teacher answers once a row, and may have a value head."""

    head: Tensor | None = None

    def __init__(self, recipe: Recipe, header: Header):
        super().__init__(recipe, header)
        self.teacher = self.answer  # type: ignore[assignment]

    def answer(self, inputs: Tensor, mask: Tensor) -> Signals:
        logits = inputs.sum(1, keepdim=True)[..., [0, 1, 2, 3, 4, 5, 0]]
        head = self.head
        if head is None:
            return Signals(logits, torch.ones_like(mask[:, :1]))
        return Signals(logits, torch.ones_like(mask[:, :1]), head, valence_mask=mask)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe over twelve rows, by where the valence comes from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    weights = by_hand.teacher(tmp_path / "teacher.safetensors")

    def made(source: str) -> Recipe:
        settings = {"column": source == "column"}
        return resolve(
            {
                "data": {"source": "mine_rows:rows", "settings": settings},
                "teacher": weights,
                "terms": {"value": {}},
                "valence": {"source": source, "discount": 0.5},
                "store": {"codec": "dense"},
            }
        )

    return made


def test_a_teacher_that_answers_once_and_has_a_value_head_is_stored_by_its_steps(recipe):
    scorer, dataset = by_hand.scorer_of(recipe("prefix_confidence"), Answering)
    rows = dataset.splits["train"]
    scorer.head = torch.linspace(-0.9, 0.9, 24).reshape(4, 6)
    stored = StoredRows({"": scorer.table(rows)})
    kept = beside(rows, stored, frozenset({"logits", "trajectory"}), torch.device("cpu"))
    batch = kept.batch(torch.arange(4))
    mask = batch.mask
    assert batch.teacher is not None
    assert batch.teacher.valence is not None
    assert torch.equal(batch.teacher.valence_steps, mask)
    torch.testing.assert_close(batch.teacher.valence[mask], scorer.head[mask].half())
    valence = stored.padded("valence", rows.mask)
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)
    signals = scorer.answer(batch.inputs, mask)
    sure = prefix_confidence(signals.logits, signals.mask, batch.label)
    np.testing.assert_allclose(valence[(mask & last).numpy()], sure[:, 0], rtol=1e-3)
    assert np.isnan(valence[(mask & ~last).numpy()]).all()


def test_a_head_that_answers_nan_is_a_row_that_cannot_be_scored(recipe):
    scorer, dataset = by_hand.scorer_of(recipe("prefix_confidence"), Answering)
    rows = dataset.splits["train"]
    scorer.head = torch.zeros(4, 6)
    scorer.head[2, 1] = torch.nan
    scorer.head[torch.from_numpy(~rows.mask)] = torch.nan  # where nothing is read
    _, bad = scorer.score(rows)
    assert bad == {int(rows.row_id[2]): "NaN or infinite valence of the value head"}


def test_a_future_that_is_unknown_is_stored_as_unknown_and_not_learnt(recipe):
    """The column tells the first two steps alone."""
    scorer, dataset = by_hand.scorer_of(recipe("column"))
    scorer.teacher.module.register_forward_hook(lambda _m, _i, said: {"logits": said["logits"]})
    rows = dataset.splits["train"]
    stored = StoredRows({"": scorer.table(rows)})
    known = rows.mask & (np.arange(6) < 2)
    assert np.array_equal(np.isfinite(stored.padded("trajectory", rows.mask)) & rows.mask, known)
    kept = beside(rows, stored, frozenset({"trajectory"}), torch.device("cpu"))
    batch = kept.batch(torch.arange(4))
    guess = torch.full((4, 6), 0.5, requires_grad=True)
    signals = Signals(torch.zeros(4, 6, 7), batch.mask, guess)
    sums, counts = Objective({"value": TermSpec()})(signals, batch)
    (gradient,) = torch.autograd.grad(sums.sum(), guess)
    assert counts.item() == known.sum() < rows.mask.sum()
    assert np.array_equal(gradient.numpy() != 0, known)
    assert batch.valence is not None
    future, _ = realised_future(batch.valence, batch.mask, 0.5)
    at = torch.from_numpy(known)
    torch.testing.assert_close(
        gradient[at], 2 * (0.5 - future[at].half().float()), rtol=1e-3, atol=1e-3
    )


def test_a_store_of_text_whose_futures_ran_on_serves_nothing_that_reads_them(tmp_path):
    found = load(texts.recipe(tmp_path, texts.tokenizer(tmp_path)))
    dataset = data.load(found.data)
    store = Store(by_hand.score(found, tmp_path / "stores"))
    reads = frozenset({"logits", "saliency"})
    check_futures(store, dataset, reads)
    store.manifest["statistics"].pop("futures")  # as it was written before
    check_futures(store, dataset, frozenset({"logits"}))
    with pytest.raises(StoreError, match="ran from one document into the next; delete it"):
        check_futures(store, dataset, reads)


def test_a_stored_future_of_text_ends_with_its_document(tmp_path):
    found = load(texts.recipe(tmp_path, texts.tokenizer(tmp_path)))
    dataset = data.load(found.data)
    rows = dataset.splits["train"].take(slice(0, 4))
    starts = rows.inputs[..., 1] == 0
    assert (starts.sum(1) > 1).any(), "some row holds two documents"
    table = Scorer(found, Header.of(found, dataset)).table(rows)
    stored = StoredRows({"": table})
    valence = stored.padded("valence", rows.mask).astype(np.float64)
    trajectory = stored.padded("trajectory", rows.mask).astype(np.float64)
    discount = found.valence.discount
    for row in range(4):
        edges = [*np.flatnonzero(starts[row]), rows.mask.shape[1]]
        for first, end in pairwise(edges):
            for step in range(first, end):
                weight = discount ** np.arange(end - step)
                weight = weight * rows.mask[row, step:end]
                if rows.mask[row, step]:
                    expected = (weight * valence[row, step:end]).sum() / weight.sum()
                    assert trajectory[row, step] == pytest.approx(expected, abs=2e-3)
