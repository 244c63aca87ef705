"""What an artefact says of how it runs: without raykd wherever ONNX holds the student, and what of
a rounded one is computed in float32.
"""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raykd.data import Dataset, Rows
from raykd.deploy import artefact, run_artefact
from raykd.files.atomic import write_json
from raykd.models import build
from raykd.quant import swap
from raykd.quant.linear import QuantLinear
from raykd.recipe.quant import Quant
from raykd.recipe.tables import StudentRef
from raykd.reports.sentences import _artefact_figures
from raykd.stages.load import resolve

FIGURES = {"parity": {"agreement": None}, "bytes_by_kind": None}
NO_TIMES = {"latency": {"ratio_vs_teacher": None, "ratio_vs_fp32_student": None}}


class Mean(nn.Module):
    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.head = nn.Linear(channels, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs).mean(1)


class Branching(Mean):
    """What it computes is decided by a number, which a trace cannot follow."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * (2 if inputs.sum().item() > 0 else 1)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(what the manifest says, the files) of a student in full precision."""
    monkeypatch.setattr(build, "MODELS", build.MODELS | {"mean": Mean, "branching": Branching})
    draws = np.random.default_rng(0)
    numbers = np.arange(6)
    inputs = draws.normal(size=(6, 4, 3)).astype(np.float32)
    rows = Rows(numbers, inputs, np.ones((6, 4), bool), numbers % 2, numbers)
    dataset = Dataset("rows", ("a", "b"), {"test": rows})

    def write(model: str) -> tuple[dict, set[str]]:
        recipe = resolve({"technique": "none"})
        recipe = recipe.model_copy(update={"student": StudentRef(model=model)})
        write_json(tmp_path / artefact.MODEL, artefact._model(recipe, dataset))
        torch.manual_seed(0)
        module = build.MODELS[model](classes=2, channels=3)
        save_file(module.state_dict(), tmp_path / artefact.WEIGHTS)
        with torch.no_grad():
            trained = torch.cat([module(row[None]) for row in torch.from_numpy(inputs)]).numpy()
        said = artefact._write_student(recipe, dataset, tmp_path, trained)
        return said, {path.name for path in tmp_path.iterdir()}

    return write


def told(said: dict) -> str:
    """What terminal and report say of a manifest."""
    lines = run_artefact.notes(said)
    figures = _artefact_figures(FIGURES | NO_TIMES | said)
    return "\n".join([*lines, *(f"{name}: {text}" for name, text in figures)])


def test_a_student_in_full_precision_is_onnx_and_run_without_raykd(written):
    said, files = written("mean")
    assert said == {"free_steps": True}
    assert files == {artefact.MODEL, artefact.WEIGHTS, artefact.ONNX}
    assert told(said) == ""


def test_a_student_that_onnx_cannot_hold_keeps_its_weights_and_says_why(written):
    said, files = written("branching")
    assert set(said) == {"needs_raykd"}
    assert files == {artefact.MODEL, artefact.WEIGHTS}
    assert said["needs_raykd"]
    reason = said["needs_raykd"]
    assert "\n" not in reason
    assert f"run.py needs raykd and torch, as ONNX cannot hold this student: {reason}" in told(said)
    assert f"run.py: needs raykd and torch: {reason}" in told(said)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize("rest", ["int8", "fp32"])
def test_convolutions_of_a_rounded_student_are_named_as_computed_in_float32(rest):
    """They were stored as int8 and called so, and took their time in float32."""
    module = Convolved()
    quant = Quant(weights="int8", rest=rest)
    rounded = copy.deepcopy(module)
    swap.prepare(rounded, quant)
    left = artefact.unrounded(swap.left(module, quant), quant, module)
    stored = "int8" if rest == "int8" else "float32"
    conv = {"name": "conv.weight", "reason": "a Conv2d has no rounded form", "stored": stored}
    assert conv in left
    assert {each["name"] for each in left} == {"conv.weight", "head"}
    assert isinstance(rounded.mix, QuantLinear)
    assert type(rounded.conv) is nn.Conv2d
    text = told({"computed_in_float32": left})
    assert f"computed in float32, stored as {stored}: conv.weight" in text
    assert f"computed in float32: conv.weight (stored as {stored})" in text
