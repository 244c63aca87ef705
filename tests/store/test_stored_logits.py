"""Stored answers are the live ones, place by place, whatever the codec; and train as the dense ones
do.

The reference is the teacher itself, run on each row alone. Rows differ in length, so padding and
truncation are in it.
"""

from dataclasses import replace
from pathlib import Path

import by_hand
import numpy as np
import pyarrow as pa
import pytest
import stored
import torch
from stored import CLASSES, CODECS, scored

from raykd import data
from raykd.errors import RecipeError
from raykd.losses.shared_terms import kd
from raykd.models.adapter import Adapter
from raykd.signals import Signals
from raykd.store.logits import take_rows
from raykd.store.reader import Store
from raykd.teacher.head import teacher_head
from raykd.techniques import register
from raykd.training.arms import arms_of
from raykd.training.device_rows import to_device
from raykd.training.run_arms import ArmRunner

CPU = torch.device("cpu")
EXACT = ("fp16", "topk", "hidden")  # up to the rounding of fp16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module", params=CODECS)
def made(request, folder):
    return request.param, *scored(folder, request.param)


def batch_of(recipe, store: Store, split: str = "train", rows: int = 50):
    """(a batch of shuffled rows, the teacher's live signals of each row alone, padded alike)."""
    scorer, dataset = by_hand.scorer_of(recipe)
    head = teacher_head(recipe, store, dataset)
    kept = to_device(dataset.splits[split], split, store, frozenset({"logits"}), CPU, head)
    index = torch.from_numpy(np.random.default_rng(1).permutation(len(kept.label))[:rows])
    batch = kept.batch(index)
    live = torch.zeros(*batch.mask.shape, CLASSES)
    with torch.inference_mode():
        for i, steps in enumerate(batch.mask.sum(1).tolist()):
            alone = scorer.teacher(batch.inputs[i : i + 1, :steps], batch.mask[i : i + 1, :steps])
            live[i, :steps] = alone.logits[0]
    return batch, live


def kd_gradient(batch, temperature: float = 2.0):
    """(value, gradient) of kd at fixed student logits."""
    torch.manual_seed(0)
    z = torch.randn(*batch.mask.shape, CLASSES, requires_grad=True)
    value, mask = kd(Signals(z, batch.mask), batch, temperature=temperature)
    total = value[mask].sum()
    total.backward()
    return total.detach(), z.grad


def test_each_stored_place_is_the_teachers_own_answer_there(made):
    name, recipe, store = made
    batch, live = batch_of(recipe, store)
    p = (live[batch.mask] / 2).softmax(1)
    if batch.targets:
        found = batch.targets(2.0).dense()
        bound = 1 / 255 if name == "comb" else 5e-3
    else:
        found = (batch.teacher.logits[batch.mask].float() / 2).softmax(1)
        bound = 5e-3
    assert found.shape == p.shape
    assert (found - p).abs().max() <= bound


def test_kd_from_the_store_is_kd_from_the_live_teacher(made):
    name, recipe, store = made
    batch, live = batch_of(recipe, store)
    value, gradient = kd_gradient(batch)
    expected, reference = kd_gradient(
        replace(batch, teacher=Signals(live, batch.mask), targets=None)
    )
    error = (gradient - reference).norm() / reference.norm()
    assert error < (
        2e-3 if name in EXACT else 3e-2
    )  # a comb of 255 teeth is off by less than 1 / 255 in each class
    assert torch.isclose(value, expected, rtol=2e-3 if name in EXACT else 0.2)


def test_a_student_learns_from_any_codec(made):
    _, recipe, store = made
    shop = ArmRunner(recipe, store.folder, CPU)
    arm = next(a for a in arms_of(recipe) if a.name == "student")
    history = shop.train_arm(arm, shop.student(arm)).history
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_teachers_decisions_are_stored_whatever_the_codec(made):
    _, recipe, store = made
    scorer, dataset = by_hand.scorer_of(recipe)
    rows = dataset.splits["test"]
    with torch.inference_mode():
        live = scorer.teacher(
            torch.from_numpy(rows.inputs), torch.from_numpy(rows.mask)
        ).sequence_logits()
    assert np.array_equal(store.column("answer", "test").values, live.argmax(1).numpy())


def test_a_temperature_outside_the_grid_is_refused_by_name(folder):
    recipe, store = scored(folder, "comb")
    batch, _ = batch_of(recipe, store)
    with pytest.raises(RecipeError, match=r"temperature 3 .*grid \(2\)"):
        kd_gradient(batch, 3.0)


def test_trials_over_temperatures_share_one_sparse_store(folder):
    search = {"trials": 2, "terms.kd.temperature": {"choice": [1.0, 1.5]}}
    recipe, store = scored(folder, "comb", search=search)
    batch, _ = batch_of(recipe, store)
    for temperature in (1.0, 1.5, 2.0):
        value, _ = kd_gradient(batch, temperature)
        assert torch.isfinite(value)
    with pytest.raises(RecipeError, match="choice"):
        scored(
            folder, "comb", search={"trials": 2, "terms.kd.temperature": {"uniform": [1.0, 2.0]}}
        )


def test_another_teachers_head_is_refused(folder, tmp_path):
    recipe, store = scored(folder, "hidden")
    other = by_hand.teacher(tmp_path / "other.safetensors", seed=1)
    changed = recipe.model_copy(
        update={"teacher": recipe.teacher.model_copy(update={"weights": other["weights"]})}
    )
    with pytest.raises(Exception, match="belong to the output head"):
        teacher_head(changed, store, data.load(recipe.data))


def test_rows_are_taken_in_any_order_from_any_chunks():
    column = pa.chunked_array(
        [pa.array([b"a", b"bb"]), pa.array([], pa.binary()), pa.array([b"ccc"])], pa.binary()
    )
    index = np.array([2, 0, 2, 1])
    assert take_rows(column, index).to_pylist() == [column[int(i)].as_py() for i in index]


def test_an_adapter_and_its_store_agree_on_one_answer_a_sequence():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    signals = Adapter(module)(torch.ones(2, 4, 1), torch.ones(2, 4, dtype=torch.bool))
    assert signals.logits.shape == (2, 1, 3)


SHAPED = '''
"""Rows of eight steps whose valid ones stand anywhere."""

import numpy as np

from raykd.data.rows import Dataset, Rows


def rows(padding):
    rng = np.random.default_rng(3)
    n, steps = 210, 8
    length = rng.integers(1, steps + 1, n)[:, None]
    at = np.arange(steps)
    mask = {
        "left": at >= steps - length,
        # documents with separators, which are no targets, between them
        "packed": rng.random((n, steps)) < 0.7,
        "cut": np.broadcast_to(at < 5, (n, steps)).copy(),
    }[padding]
    mask[np.arange(n), rng.integers(0, 5, n)] = True
    inputs = (rng.normal(size=(n, steps, 6)) * mask[..., None]).astype(np.float32)
    every = Rows(np.arange(n), inputs, mask, np.arange(n) % 7, np.arange(n))
    split = np.arange(n) // 7 % 5
    part = {"train": split < 3, "val": split == 3, "test": split == 4}
    splits = {name: every.take(where) for name, where in part.items()}
    return Dataset("shaped", tuple("abcdefg"), splits)
'''


@pytest.mark.parametrize("padding", ["left", "packed", "cut"])
@pytest.mark.parametrize("codec", CODECS)
def test_valid_steps_may_stand_anywhere(folder, monkeypatch, codec, padding):
    """Each target is that of its own place, and of no place beside it: shifted by one, the
    comparison would fail.
    """
    (folder / "shaped.py").write_text(SHAPED)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    recipe, store = scored(
        folder, codec, data={"source": "shaped:rows", "settings": {"padding": padding}}
    )
    scorer, dataset = by_hand.scorer_of(recipe)
    train = dataset.splits["train"]
    kept = to_device(
        train,
        "train",
        store,
        frozenset({"logits"}),
        CPU,
        teacher_head(recipe, store, dataset),
    )
    batch = kept.batch(torch.arange(len(train)).flip(0))
    with torch.inference_mode():
        live = (scorer.teacher(batch.inputs, batch.mask).logits / 2).softmax(-1)
    targets = batch.targets(2.0).dense() if batch.targets else None
    assert batch.teacher is not None
    found = torch.zeros_like(live)
    found[batch.mask] = (
        (batch.teacher.logits[batch.mask].float() / 2).softmax(1)
        if targets is None
        else targets.float()
    )
    error, shifted = ((found - p).abs()[batch.mask].max() for p in (live, live.roll(1, 1)))
    assert error <= (1 / 255 if codec == "comb" else 5e-3)
    assert shifted > 10 * error


def test_a_term_that_needs_every_class_is_refused_by_name_before_the_teacher_runs(folder):
    register("examples.own.reverse")
    for codec in ("comb", "topk"):
        with pytest.raises(
            RecipeError, match=rf"terms.reverse: a '{codec}' store .* needs every class"
        ):
            scored(
                folder,
                codec,
                technique="examples.own.reverse",
                terms={"reverse": {}, "kd": {"weight": 0}},
            )
