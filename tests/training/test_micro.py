"""Micro-batches: a forward pass reads a few rows, and loss and gradient are those of the whole.

The reference is the same training with all rows at once. What differs is the order of float32 sums
(2^-24 relative a sum), over 40 steps of Adam.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import by_hand
import pytest
import stored
import torch
import torch.distributed as dist
from child import start, wait
from random_rows import rows_for
from safetensors.torch import load_file, save_file

from raykd import techniques
from raykd.errors import RecipeError
from raykd.losses.terms import TERMS
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.tables import Optim, TermSpec, Weighting
from raykd.stages.load import resolve
from raykd.training.arm import ONE_PROCESS, Arm, World
from raykd.training.loop import train
from raykd.training.run_arms import ArmRunner
from raykd.training.state import State

techniques.load_terms()
OPTIM = Optim(steps=20, batch=7, evaluate_every=5)
PAIRS = [["blocks.0", "blocks.1"]]
ARM = Arm(
    "student",
    0,
    {
        "ce": TermSpec(weight=0.5),
        "kd": TermSpec(weight=0.5),
        "hint": TermSpec(weight=0.1, pairs=PAIRS),
        "value": TermSpec(weight=0.1, since=0.5),
        "future_valence": TermSpec(weight=0.1),
    },
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(arm: Arm, micro: int | None, world: World = ONE_PROCESS, **rows: Any) -> State:
    torch.manual_seed(1)
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=8, layers=2)
    student = Adapter(module, want=frozenset({"hidden.blocks.0"}))
    data = replace(rows_for(arm), **rows)
    return train(arm, OPTIM, student, data, lambda _: {}, world=world, micro=micro)


def assert_near(found: State, whole: State) -> None:
    for one, two in zip(found.history, whole.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["terms"] == pytest.approx(two["terms"], rel=1e-5, abs=1e-7)
    for (name, value), other in zip(
        found.learner.named_parameters(), whole.learner.parameters(), strict=True
    ):
        if not name.endswith("qkv.bias"):  # the gradient of the keys' bias is mere rounding
            torch.testing.assert_close(value, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighting", [None, Weighting(boost=2.0)], ids=["plain", "weighted"])
def test_a_few_rows_at_a_time_train_as_all_at_once(weighting):
    arm = replace(ARM, weighting=weighting)
    whole = trained(arm, None)
    for micro in (1, 2, 4):
        assert_near(trained(arm, micro), whole)


def test_sparse_targets_go_with_their_rows(tmp_path):
    folder = stored.write(tmp_path)
    histories = []
    for micro in ({}, {"micro": 5}):
        recipe, store = stored.scored(folder, "comb", scale=micro)
        runner = ArmRunner(recipe, store.folder, torch.device("cpu"))
        arm = Arm("student", 0, recipe.terms)
        histories.append(runner.train_arm(arm, runner.student(arm)).history)
    for one, two in zip(*histories, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def share_of(rank: int, meeting: Path, out: Path) -> None:
    """One worker of two, which have four rows and three."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    state = trained(ARM, 3, World(rank, 2))
    save_file(dict(state.learner.state_dict()), out / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_workers_with_unequal_numbers_of_parts_train_as_one(tmp_path):
    workers = [start(share_of, rank, tmp_path / "meeting", tmp_path) for rank in range(2)]
    whole = trained(ARM, None).learner.state_dict()
    assert wait(workers) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)


def test_a_term_that_counts_elsewhere_than_it_says_is_told_by_name(monkeypatch):
    wrong = TERMS["ce"]._replace(counts=lambda answered, batch, **_: answered.mask & False)
    monkeypatch.setitem(TERMS, "ce", wrong)
    with pytest.raises(RecipeError, match=r"scale\.micro: terms\.ce counted at other places"):
        trained(ARM, 2)


INFONCE = {"infonce": {"pairs": [["norm", "norm"]]}, "kd": {}}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"scale": {"micro": 9}, "optim": {"batch": 8}}, "9, but a worker has 8 rows"),
        (
            {"scale": {"micro": 4, "workers": [3, 4]}, "optim": {"batch": 8}},
            "4, but a worker has 3 rows",
        ),
        ({"scale": {"micro": 2}, "terms": INFONCE}, "terms.infonce compares all rows"),
        ({"scale": {"micro": 2}, "phases": [{"until": 1.0, "quant": {}}]}, "over all rows of a"),
    ],
)
def test_a_batch_that_cannot_be_parted_is_refused(tables, words, tmp_path):
    teacher = by_hand.teacher(tmp_path / "teacher.safetensors")
    raw = {"technique": "vanilla", "teacher": teacher, **tables}
    with pytest.raises(RecipeError) as caught:
        resolve(raw)
    assert [p.key for p in caught.value.problems] == ["scale.micro"]
    assert words in caught.value.problems[0].message


def test_a_term_of_ones_own_that_does_not_say_where_it_counts_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(TERMS, "kd", TERMS["kd"]._replace(counts=None))
    teacher = by_hand.teacher(tmp_path / "teacher.safetensors")
    with pytest.raises(RecipeError, match=r"scale\.micro: terms\.kd does not say where it counts"):
        resolve({"teacher": teacher, "scale": {"micro": 2}})


def test_whitened_advantages_compare_rows_and_others_do_not():
    assert TERMS["minillm"].compares({"whiten": True})
    assert not TERMS["minillm"].compares({})
