"""A student that is compiled for training learns what it does as it is written.

torch's own code generator adds in another order: float32 (2^-24 relative a sum) over 12 steps of
Adam. Losses may differ by 1e-5 relative, weights by 1e-5. With the backend "eager" the graph that
was recorded is run as it is, so that these are the same bits.
"""

from functools import partial
from typing import Any

import by_hand
import pytest
import torch
from random_rows import rows_for
from torch import nn

from raykd import techniques
from raykd.console import say
from raykd.errors import RecipeError
from raykd.models import compiled
from raykd.models.adapter import Adapter
from raykd.models.compiled import compile_student
from raykd.models.device import device_of, training_device
from raykd.models.recompute import recompute_blocks
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.precision import Precision
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import Optim, TermSpec
from raykd.stages.load import resolve
from raykd.training.arm import Arm
from raykd.training.loop import train
from raykd.training.state import State

techniques.load_terms()
OPTIM = Optim(steps=12, batch=7, evaluate_every=4)
PAIRS = [["blocks.0.mlp", "blocks.1"], ["blocks.1.mlp", "blocks.2"]]  # student's, teacher's
INNER = frozenset({"hidden.blocks.0.mlp", "hidden.blocks.1.mlp"})
ARM = Arm(
    "student",
    0,
    {
        "ce": TermSpec(weight=0.5),
        "kd": TermSpec(weight=0.5),
        "hint": TermSpec.model_validate({"weight": 0.1, "pairs": PAIRS}),
        "future_valence": TermSpec(weight=0.1),
    },
)
BF16 = Precision.model_validate({"student": "bf16"})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recorded(monkeypatch) -> Any:
    """Counts of torch's compiler, which records graphs and generates no code."""
    from torch import _dynamo

    monkeypatch.setattr(compiled, "BACKEND", "eager")
    _dynamo.reset()
    _dynamo.utils.counters.clear()
    return _dynamo.utils.counters["stats"]


class Dropping(nn.Module):
    """Without blocks, and with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.inner(inputs).relu()))


class Asking(Dropping):
    """Whose way is another by what it computes, so that no graph can be recorded."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inner = self.drop(self.inner(inputs).relu())
        return self.head(inner if inner.sum().item() > 0 else -inner)


def encoder() -> SeriesEncoder:
    return SeriesEncoder(channels=3, classes=4, steps=8, width=8, layers=2)


def trained(
    make: type[nn.Module] | Any, *, compile: bool, recompute: bool = False, **keywords: Any
) -> State:
    torch.manual_seed(1)
    module = make()
    if compile:
        compile_student(module, partial(say, "train"))
    if recompute:
        recompute_blocks(module)
    arm = ARM if make is encoder else Arm("student", 0, {"kd": TermSpec()})
    want = INNER if make is encoder else frozenset()
    return train(arm, OPTIM, Adapter(module, want=want), rows_for(arm), lambda _: {}, **keywords)


def assert_equal_bits(one: State, two: State) -> None:
    assert one.history == two.history
    found = two.learner.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in one.learner.state_dict().items())


def has_compiler() -> bool:
    try:
        compiled.check_compiler(torch.device("cpu"))
    except RecipeError:
        return False
    return True


@pytest.mark.skipif(not has_compiler(), reason="this machine has no C++ compiler")
def test_a_compiled_student_learns_what_it_does_as_it_is_written():
    found = trained(Dropping, compile=True)
    whole = trained(Dropping, compile=False)
    for one, two in zip(found.history, whole.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    wanted = whole.learner.state_dict()
    for name, value in found.learner.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"micro": 3, "recompute": True}, {"precision": BF16}],
    ids=["whole", "micro and recompute", "bf16"],
)
def test_blocks_are_recorded_with_all_that_a_term_reads_in_them(keywords, recorded):
    found = trained(encoder, compile=True, **keywords)
    assert recorded["unique_graphs"] >= 1
    assert_equal_bits(found, trained(encoder, compile=False, **keywords))


def test_a_student_of_one_shape_is_recorded_once(recorded):
    assert_equal_bits(trained(Dropping, compile=True), trained(Dropping, compile=False))
    assert recorded["unique_graphs"] == 1


def test_a_head_that_is_left_to_the_losses_is_left_out_of_one_graph(recorded, monkeypatch):
    monkeypatch.setattr("raykd.models.adapter.MANY", 3)
    found = trained(Dropping, compile=True)
    assert found.student.head == "head"
    assert recorded["unique_graphs"] == 1
    assert_equal_bits(found, trained(Dropping, compile=False))


def test_what_cannot_be_compiled_runs_as_it_is_written_and_is_said_once(recorded, capsys):
    found = trained(Asking, compile=True)
    assert recorded["unique_graphs"] == 0
    said = capsys.readouterr().err
    assert said.count("scale.compile: Asking runs as it is written, for ") == 1
    assert_equal_bits(found, trained(Asking, compile=False))


def test_a_machine_without_a_compiler_is_refused_by_key(monkeypatch):
    recipe = Recipe.model_validate({"terms": {"ce": {}}, "scale": {"compile": True}})
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert device_of(recipe).type == "cpu"
    with pytest.raises(RecipeError, match="needs a C\\+\\+ compiler; install g\\+\\+") as caught:
        training_device(recipe)
    assert [p.key for p in caught.value.problems] == ["scale.compile"]


def test_phases_that_round_are_refused(tmp_path):
    teacher = by_hand.teacher(tmp_path / "teacher.safetensors")
    table = {"technique": "vanilla", "teacher": teacher, "phases": [{"until": 1.0, "quant": {}}]}
    with pytest.raises(RecipeError) as caught:
        resolve({**table, "scale": {"compile": True}})
    assert [p.key for p in caught.value.problems] == ["scale.compile"]
