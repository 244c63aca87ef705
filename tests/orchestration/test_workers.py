"""Any number of workers trains as one, for every technique that there is: losses, row weights, the
learned maps.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from child import start, wait
from random_rows import rows_for
from safetensors.torch import load_file, save_file

from raykd import techniques
from raykd.losses.all_rows import gather_rows
from raykd.losses.terms import wants_of
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.quant.swap import QuantLinear, quantised
from raykd.recipe.tables import Optim, Phase, TermSpec, Weighting
from raykd.training.arm import Arm, World
from raykd.training.loop import train
from raykd.training.phases import prepare
from raykd.training.state import State

techniques.load_terms()
# Of text that the student writes, what workers draw together is tested in tests/generation.
RECIPES = {
    t.name: t.recipe
    for t in techniques.all_techniques()
    if t.name != "none" and "source" not in t.recipe
}
DRAWN = {"infonce": {"pairs": [["norm", "norm"]], "negatives": 16, "hard": 2.0}}
RECIPES["infonce-drawn"] = {
    "terms": DRAWN,
    "weighting": {"mode": "ess", "statistics": "global_batch"},
}
OPTIM = Optim(steps=12, batch=12, learning_rate=1e-2, evaluate_every=1)


def arm_of(recipe: dict[str, Any]) -> Arm:
    weighting = Weighting(**recipe["weighting"]) if "weighting" in recipe else None
    return Arm("student", 3, {n: TermSpec(**s) for n, s in recipe["terms"].items()}, weighting)


def in_phases(recipe: dict[str, Any]) -> Arm:
    return replace(arm_of(recipe), phases=tuple(Phase.model_validate(p) for p in recipe["phases"]))


def trained(
    recipe: dict[str, Any], world: World, make: Callable[[dict[str, Any]], Arm] = arm_of
) -> State:
    arm = make(recipe)
    torch.manual_seed(1)
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=8)
    prepare(module, arm.phases)
    student = Adapter(module, want=wants_of(arm.terms))
    return train(arm, OPTIM, student, rows_for(arm), lambda _: {}, world=world)


def all_tensors(state: State) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.learner.state_dict().items()}


def train_on(rank: int, size: int, meeting: Path, out: Path, recipe: dict[str, Any]) -> None:
    """One worker of a group; it writes down its history and every tensor, the learned maps' too."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    state = trained(recipe, World(rank, size))
    save_file(all_tensors(state), out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps(state.history))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RECIPES)
def test_two_workers_train_as_one(name, tmp_path):
    """To float32's rounding of sums in another order: 1e-5 relative in the losses, ten times what
    was seen.

    Left out of the weights is the keys' bias: its true gradient is zero, because softmax ignores
    it, so that Adam scales up rounding noise there, to no effect.
    """
    workers = [
        start(train_on, rank, 2, tmp_path / "meeting", tmp_path, RECIPES[name]) for rank in range(2)
    ]
    alone = trained(RECIPES[name], World())
    assert wait(workers) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for one, two in zip(alone.history, first, strict=True):
        assert two["terms"] == pytest.approx(one["terms"], rel=1e-5)
        assert two.get("weights") == one.get("weights")
    shared = load_file(tmp_path / "0.safetensors")
    for key, value in all_tensors(alone).items():
        kept = torch.ones(len(value), dtype=torch.bool)
        if key.endswith("qkv.bias"):
            kept[8:16] = False
        torch.testing.assert_close(shared[key][kept], value[kept], rtol=0, atol=5e-6, msg=key)


ROUNDED = {"terms": {"ce": {}, "kd": {}}, "phases": [
    {"until": 0.25},
    {"until": 0.5, "quant": {"weights": "int8"}},
    {"until": 0.75, "quant": {"weights": "int4", "per": "group", "group": 16, "scale": "learned"}},
    {
        "until": 1.0,
        "quant": {"weights": "ternary", "scale": "learned", "activations": "none", "rest": "int8"},
    },
]}  # fmt: skip


def rounded_on(rank: int, size: int, meeting: Path, out: Path) -> None:
    """One worker of a group that trains in phases; it writes down what it would round to after the
    last step.
    """
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    found = trained(ROUNDED, World(rank, size), in_phases)
    module = found.learner.student.module
    rounded = dict(all_tensors(found))
    for name, layer in quantised(module):
        if isinstance(layer, QuantLinear):
            rounded |= {f"{name}.codes": layer.codes(), f"{name}.scales": layer.scales()}
    save_file(rounded, out / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_every_rank_has_the_same_scales_and_codes_to_the_bit(tmp_path):
    """Ranks round activations over rows of their own; weights and scales are one model."""
    workers = [start(rounded_on, rank, 2, tmp_path / "meeting", tmp_path) for rank in range(2)]
    assert wait(workers) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert {name.rsplit(".", 1)[1] for name in first} >= {"scale", "codes", "scales"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(
        set(value.unique().tolist()) == {-1, 0, 1}
        for name, value in first.items()
        if name.endswith("codes")
    )


def gather_on(rank: int, size: int, meeting: Path, out: Path) -> None:
    """Unequal shares of ten rows; the loss of each worker uses every row once, weighted by the
    worker's number.
    """
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    values = torch.arange(20.0).view(10, 2)
    own = values[World(rank, size).share(10)].clone().requires_grad_()
    every, first = gather_rows(own)
    (every.square().sum() * (rank + 1)).backward()
    save_file(
        {"every": every.detach(), "gradient": own.grad, "first": torch.tensor(first)},
        out / f"{rank}.safetensors",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 3])
def test_gather_rows_has_the_rows_of_all_in_order_and_sends_gradients_back(tmp_path, size):
    workers = [start(gather_on, rank, size, tmp_path / "meeting", tmp_path) for rank in range(size)]
    assert wait(workers) == [0] * size
    values = torch.arange(20.0).view(10, 2)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    for rank, f in enumerate(found):
        assert torch.equal(f["every"], values)
        assert int(f["first"]) == World(rank, size).share(10).start
    gradient = torch.cat([f["gradient"] for f in found])
    torch.testing.assert_close(gradient, 2 * values * sum(range(1, size + 1)))
