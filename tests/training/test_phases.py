"""A training in phases: which step has which levels, the schedule of each, and what a death in the
middle changes.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from random_rows import rows_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from raykd import data, models
from raykd.deploy import artefact
from raykd.deploy.onnx import operators
from raykd.deploy.onnx import write as write_onnx
from raykd.errors import GateError, RecipeError
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.orchestration import tuning
from raykd.quant import other_parameters, swap
from raykd.quant.pack import pack, unpack
from raykd.quant.swap import quantised, roundable
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import Optim, Phase, TermSpec
from raykd.stages.load import resolve
from raykd.training import trained_arm
from raykd.training.arm import Arm, World
from raykd.training.arms import arms_of
from raykd.training.checkpoints import Checkpoints
from raykd.training.loop import train
from raykd.training.phases import enter, prepare, round_as, spans
from raykd.training.run_arms import ArmRunner, run_arms
from raykd.training.state import State

ACCURATE_THEN_FAIR = [(0.9, 0.1)] * 3 + [(0.5, 0.8)] + [(0.9, 0.2)] * 4  # accuracy, macro-F1
OPTIM = Optim(steps=40, batch=12, learning_rate=1e-2, evaluate_every=5)
TERNARY = Quant(weights="ternary")
PROGRESSIVE = (
    Phase(until=0.25),
    Phase(until=0.5, quant=Quant(weights="int8"), blend=0.0),
    Phase(until=0.75, quant=Quant(weights="int4", per="group", group=16, scale="learned")),
    Phase(until=1.0, quant=TERNARY, rate=0.5),
)


def arm_of(phases: tuple[Phase, ...]) -> Arm:
    terms = {"ce": TermSpec(), "kd": TermSpec()}
    return Arm("student", 3, terms, None, phases, select="accuracy" if phases else None)


def student_of(phases: tuple[Phase, ...]) -> Adapter:
    torch.manual_seed(1)
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=16)
    prepare(module, phases)
    return Adapter(module)


def trained(phases: tuple[Phase, ...], evaluate=lambda _: {}, **keywords) -> State:
    return train(
        arm_of(phases), OPTIM, student_of(phases), rows_for(arm_of(())), evaluate, **keywords
    )


def test_without_phases_there_is_one_and_with_them_each_has_its_steps():
    assert [(s.first, s.last, s.phase.quant) for s in spans((), 40)] == [(0, 40, None)]
    assert [(s.first, s.last) for s in spans(PROGRESSIVE, 40)] == [
        (0, 10),
        (10, 20),
        (20, 30),
        (30, 40),
    ]


def test_a_phase_without_a_step_is_refused():
    """A last phase that rounds to nothing would leave the student under the one before it."""
    phases = [
        {"until": 0.5},
        {"until": 0.75, "quant": {"weights": "int4"}},
        {"until": 1.0, "quant": {}},
    ]
    raw = {"technique": "none", "phases": phases}
    assert resolve(raw | {"optim": {"steps": 4}}).optim.steps == 4
    with pytest.raises(
        RecipeError, match=r"optim.steps = 2 leaves a phase without a step: they end at \[1, 2, 2\]"
    ):
        resolve(raw | {"optim": {"steps": 2}})


def test_each_phase_warms_up_anew_and_decays_to_nothing():
    optim = Optim(steps=400, warmup=0.1, learning_rate=0.3)
    for span in spans(PROGRESSIVE, 400):
        rates = [span.learning_rate(optim, step) for step in range(span.first, span.last)]
        assert max(rates) == pytest.approx(0.3 * span.phase.rate, rel=0.02)
        assert rates.index(max(rates)) in (9, 10)
        assert rates[-1] < 0.02 * max(rates)


def test_rounding_fades_in_over_the_phases_first_share():
    span = spans((Phase(until=1.0, quant=TERNARY, blend=0.2),), 100)[0]
    blends = [span.blend(step) for step in range(100)]
    assert blends[0] == pytest.approx(1 / 20)
    assert blends[19:] == [1.0] * 81
    assert spans((Phase(until=1.0, blend=0.0),), 10)[0].blend(0) == 1.0


def test_a_phases_forward_has_just_its_levels():
    seen = []

    def levels(student) -> dict[str, float]:
        layers = dict(quantised(student.module))
        seen.append(
            {len(layer.codes().unique()) if layer.quant else 0 for layer in layers.values()}
        )
        return {}

    trained(PROGRESSIVE, levels)
    assert [max(s) for s in seen[:2]] == [0, 0]
    assert all(15 < n <= 255 for s in seen[2:4] for n in s)
    assert all(3 < n <= 15 for s in seen[4:6] for n in s)
    assert all(s == {3} for s in seen[6:])


def test_a_run_killed_in_any_phase_ends_as_one_that_was_not(tmp_path):
    """Bit for bit, learned scales, the phase's best student and the blend included."""
    accuracies = {5: 0.1, 10: 0.5, 15: 0.9, 20: 0.2, 25: 0.3, 30: 0.3, 35: 0.8, 40: 0.4}

    def validated(kept: dict[int, float]):
        told = iter(sorted(kept))
        return lambda _: {"val_accuracy": kept[next(told)]}

    whole = trained(PROGRESSIVE, validated(accuracies))
    for death in (5, 15, 25, 35):
        folder = tmp_path / str(death)

        class Dead(Exception):
            pass

        def report(step, _metrics, death=death, Dead=Dead):
            if step == death + 5:
                raise Dead

        with pytest.raises(Dead):
            trained(
                PROGRESSIVE,
                validated(accuracies),
                checkpoints=Checkpoints(folder),
                checkpoint_every=1,
                report=report,
            )
        rest = {step: value for step, value in accuracies.items() if step > death}
        resumed = trained(
            PROGRESSIVE, validated(rest), checkpoints=Checkpoints(folder), checkpoint_every=1
        )
        assert resumed.history == whole.history
        assert resumed.kept == whole.kept == whole.history[6]
        for name, value in whole.learner.state_dict().items():
            assert torch.equal(resumed.learner.state_dict()[name], value), (death, name)


def test_a_phase_goes_on_from_its_best_student_and_ends_with_it(tmp_path):
    kept = {}

    def validated(student) -> dict[str, float]:
        step = 5 * (len(kept) + 1)
        kept[step] = {k: v.clone() for k, v in student.module.state_dict().items()}
        return {"val_accuracy": {10: 0.2, 35: 0.9}.get(step, 0.1)}

    state = trained((Phase(until=0.5), Phase(until=1.0, quant=TERNARY)), validated)
    final = state.learner.student.module.state_dict()
    assert all(torch.equal(final[k], v) for k, v in kept[35].items())
    assert state.kept == state.history[6]
    assert state.kept["val_accuracy"] == 0.9


def test_the_best_of_a_phase_is_that_of_the_selected_metric():
    told = iter([{"val_accuracy": a, "val_macro_f1": f} for a, f in ACCURATE_THEN_FAIR])
    arm = replace(arm_of((Phase(until=1.0),)), select="macro_f1")
    state = train(arm, OPTIM, student_of(arm.phases), rows_for(arm_of(())), lambda _: next(told))
    assert state.kept == state.history[3]


def test_a_checkpoint_that_names_its_best_by_accuracy_alone_is_gone_on_from(tmp_path):
    """As they were written before a phase's best had a summary."""
    state = trained((Phase(until=1.0),), lambda _: {"val_accuracy": 0.5})
    written = Checkpoints(tmp_path)
    state.save(written, torch.zeros(2, 2))
    written.wait()
    kept = Checkpoints(tmp_path).newest()
    assert kept is not None
    state.restore(replace(kept, meta=kept.meta | {"best": 0.5}))
    assert state.kept == state.history[0]


def test_all_arms_of_a_recipe_end_by_one_rule():
    raw = {"technique": "none", "control": True, "select": "macro_f1", "rounded_control": True}
    phases = [{"until": 0.5}, {"until": 1.0, "quant": {"weights": "int8"}}]
    arms = arms_of(resolve(raw | {"phases": phases}))
    assert [arm.name for arm in arms] == ["control", "rounded_control", "unrounded", "student"]
    assert {arm.select for arm in arms} == {"macro_f1"}
    assert {arm.select for arm in arms_of(resolve(raw))} == {None}


def worse_at_the_end(monkeypatch) -> None:
    """Validation says 0.9 at step 6 of 8, and 0.1 elsewhere."""
    told = iter([{"val_accuracy": value} for value in (0.1, 0.1, 0.9, 0.1)])
    monkeypatch.setattr(ArmRunner, "validate", lambda *_: next(told))


def eight_steps(**keys: Any) -> Recipe:
    return resolve(
        {
            "technique": "none",
            "data": {"stride": 128},
            "optim": {"steps": 8, "batch": 16, "evaluate_every": 2},
            "phases": [{"until": 0.5}, {"until": 1.0, "quant": {"weights": "int8"}, "blend": 0}],
            **keys,
        }
    )


def test_an_arms_record_is_of_the_weights_beside_it(monkeypatch, tmp_path):
    worse_at_the_end(monkeypatch)
    recipe = eight_steps(control=False, unrounded=False)
    folder = tmp_path / "run"
    run_arms(
        recipe, None, folder, world=World(), device=torch.device("cpu"), report=lambda *_: None
    )
    record = trained_arm.read_record(folder, "student-0")
    assert record is not None
    assert record["val"] == {"val_accuracy": 0.9}
    assert record["kept_step"] == 6
    assert [point["val_accuracy"] for point in record["history"]] == [0.1, 0.1, 0.9, 0.1]


def shared_by_trials(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a trial of the name "one" is given besides its point of the space."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "store": None,
        "folder": str(folder),
        "trial": "one",
        "source": None,
    }


def test_a_trials_last_report_is_of_the_weights_that_it_leaves(monkeypatch, tmp_path):
    worse_at_the_end(monkeypatch)
    trained_by: dict[str, State] = {}
    train_arm = ArmRunner.train_arm

    def kept(*args: Any, **keywords: Any) -> State:
        trained_by["one"] = train_arm(*args, **keywords)
        return trained_by["one"]

    monkeypatch.setattr(ArmRunner, "train_arm", kept)
    recipe = eight_steps()
    told: list[dict] = []
    written: list[bool] = []

    def report(metrics: dict) -> None:
        told.append(metrics)
        written.append(weights.exists())

    weights = tmp_path / "trials" / "one" / "weights.safetensors"
    tuning._train_trial({}, shared_by_trials(recipe, tmp_path), World(), report)
    assert told[-1] == {"step": 8, "val_accuracy": 0.9}
    assert [point["step"] for point in told] == [2, 4, 6, 8]
    assert written == [False, False, False, True]
    state = trained_by["one"]
    assert state.best is not None
    best = models.weights_of(state.learner.student.module)
    assert all(torch.equal(best[name], value) for name, value in load_file(weights).items())
    assert state.kept == state.history[2]


def test_learned_scales_join_the_optimiser_without_decay():
    state = trained(
        (Phase(until=0.5), Phase(until=1.0, quant=Quant(weights="ternary", scale="learned")))
    )
    *_, group = state.optimizer.param_groups
    scales = [layer.scale for _, layer in quantised(state.learner.student.module)]
    assert [id(p) for p in group["params"]] == [id(s) for s in scales]
    assert group["weight_decay"] == 0
    assert all(torch.isfinite(s).all() and (s > 0).all() for s in scales)


def test_a_layer_that_a_phase_skips_stays_in_full_precision_there():
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=16)
    phases = (
        Phase(until=0.5, quant=Quant()),
        Phase(until=1.0, quant=Quant(skip=["head", "value", "*.mlp.*"])),
    )
    prepare(module, phases)
    enter(module, phases[1])
    assert {n: layer.quant is None for n, layer in quantised(module)} == {
        "blocks.0.attention.qkv": False,
        "blocks.0.attention.out": False,
        "blocks.0.mlp.0": True,
        "blocks.0.mlp.2": True,
    }


@pytest.mark.parametrize("skip", [["blocks.0.mlp*"], ["*.attention.*", "head"], ["[!b]*"]])
def test_what_skip_names_is_stored_as_rest_says(skip):
    """A pattern may match the inner name of a stored parameter; the manifest says int8 of each."""
    module = SeriesEncoder(channels=3, classes=4, steps=8, width=16)
    quant = Quant(skip=skip)
    left = swap.left(module, quant)
    matrices = {name for name, value in module.named_parameters() if value.dim() > 1}
    told = artefact.unrounded(left, quant, module)
    assert {row["stored"] for row in told} == {"int8"}
    round_as(module, quant)
    parts = dict(roundable(module))
    stored = [name for name, part in parts.items() if isinstance(part, other_parameters.Stored)]
    assert all(parts[name].quant is quant for name in stored)
    rounded = {f"{n}.weight" for n, layer in quantised(module) if layer.quant is not None}
    plain = {other_parameters.plain_name(f"{name.removesuffix('.0')}.original") for name in stored}
    assert plain | rounded == matrices


def test_weights_of_a_plain_student_open_a_quantised_one(tmp_path):
    plain = SeriesEncoder(channels=3, classes=4, steps=8, width=16)
    rounded = student_of((Phase(until=1.0, quant=Quant()),)).module
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    models.load_weights(rounded, tmp_path / "plain.safetensors", "student")
    found = other_parameters.plain(rounded.state_dict())
    wanted = plain.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


SCHEMES = {
    "int8-tensor": {"weights": "int8", "per": "tensor"},
    "int8": {"weights": "int8"},
    "int4-g16": {"weights": "int4", "per": "group", "group": 16, "activations": "none"},
    "int4-activations": {"weights": "int4", "per": "group", "group": 16},
    "int8-token": {"weights": "int8", "activations": "int8_token"},
    "ternary": {"weights": "ternary", "activations": "none"},
    "ternary-learned": {"weights": "ternary", "scale": "learned", "activations": "none"},
    "ternary-activations": {"weights": "ternary"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_an_artefact_rounds_as_its_student_did(name, tmp_path):
    """Trained for a moment, exported, executed by onnxruntime on every test row; its codes are the
    student's own.
    """
    recipe = resolve(
        {
            "technique": "none",
            "data": {"stride": 128},
            "student": {"settings": {"layers": 1}},
            "optim": {"steps": 20, "batch": 16, "evaluate_every": 10},
            "phases": [{"until": 0.5}, {"until": 1.0, "quant": SCHEMES[name]}],
        }
    )
    run_arms(
        recipe, None, tmp_path, world=World(), device=torch.device("cpu"), report=lambda *_: None
    )
    dataset = data.load(recipe.data)
    manifest = artefact.export(recipe, dataset, tmp_path)
    floats = SCHEMES[name].get("activations") == "none"
    assert manifest["parity"]["relative"] <= (1e-5 if floats else 2e-2)
    assert manifest["parity"]["agreement"] >= (1 if floats else 0.98)
    assert manifest["parity"]["alone_agreement"] >= (1 if floats else 0.98)
    assert manifest["format"] == f"onnx {SCHEMES[name]['weights']}"
    assert [each["name"] for each in manifest["computed_in_float32"]] == [
        "positions",
        "conv.weight",
        "head",
        "value",
    ]
    assert manifest["computed_in_float32"][2]["reason"] == "skip names it"
    files = {p.name for p in (tmp_path / "artefact").iterdir()}
    assert files == {"student.onnx", "model.json", "run.py", "README.md", "manifest.json"}
    own = student_from(recipe, dataset, tmp_path / "arms" / "student-0" / "weights.safetensors")
    codes = sorted(sorted(layer.codes().flatten().tolist()) for _, layer in quantised(own))
    assert (
        sorted(
            sorted(c.flatten().tolist()) for c in codes_in(tmp_path / "artefact" / "student.onnx")
        )
        == codes
    )
    np.save(tmp_path / "windows.npy", dataset.splits["test"].inputs[:3])
    script = [sys.executable, str(tmp_path / "artefact" / "run.py"), str(tmp_path / "windows.npy")]
    lines = subprocess.run(
        script, capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.splitlines()
    answers = artefact.predict(tmp_path / "artefact", dataset.splits["test"]).answer[:3]
    assert [line.partition("\t")[0] for line in lines] == [dataset.classes[i] for i in answers]


def student_from(recipe, dataset, path) -> nn.Module:
    """The trained student, rounding as in its last phase."""
    module = models.build_model(recipe.student, **dataset.shape, key="student")
    prepare(module, recipe.phases)
    enter(module, recipe.phases[-1])
    models.load_weights(module, path, "student")
    return module


def codes_in(path) -> list[np.ndarray]:
    """Every layer's integer codes as the file holds them, in any order, padding left out."""
    graph = onnx.load(path).graph
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            found.append(held[node.input[1]])
        elif node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            packed = held[node.input[1]].reshape(attributes["N"], -1)
            found.append(unpack(packed, attributes["bits"])[:, : attributes["K"]])
    return found


def test_a_model_that_can_not_be_written_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    module = Odd()
    phase = Phase(until=1.0, quant=Quant(skip=[]))
    prepare(module, [phase])
    enter(module, phase)
    with pytest.raises(RecipeError, match="Odd cannot be written as ONNX"):
        write_onnx.to_onnx(module, torch.ones(2, 4, 3))


def test_an_artefact_that_answers_otherwise_is_refused_and_not_left_behind(tmp_path, monkeypatch):
    recipe = resolve(
        {
            "technique": "none",
            "data": {"stride": 128},
            "optim": {"steps": 2, "batch": 16, "evaluate_every": 2},
            "phases": [{"until": 1.0, "quant": {"weights": "ternary", "activations": "none"}}],
        }
    )
    run_arms(
        recipe, None, tmp_path, world=World(), device=torch.device("cpu"), report=lambda *_: None
    )
    monkeypatch.setattr(operators, "pack", lambda codes, bits: pack(-codes, bits))
    with pytest.raises(GateError, match="no artefact was written"):
        artefact.export(recipe, data.load(recipe.data), tmp_path)
    assert not (tmp_path / "artefact").exists()


def test_a_trial_in_phases_is_tested_as_it_was_trained(tmp_path):
    """Its weights are written under the user's names, with the learned scales, and read under the
    last phase.
    """
    recipe = resolve(
        {
            "technique": "none",
            "data": {"stride": 128},
            "optim": {"steps": 8, "batch": 16, "evaluate_every": 8},
            "phases": [
                {"until": 0.5},
                {"until": 1.0, "quant": {"weights": "ternary", "scale": "learned"}},
            ],
        }
    )
    told: list[dict] = []
    tuning._train_trial({}, shared_by_trials(recipe, tmp_path), World(), told.append)
    weights = tmp_path / "trials" / "one" / "weights.safetensors"
    found = tuning.test_metrics(recipe, weights, None)
    assert 0 < found["accuracy"] < 1
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
    assert "conv.weight" in names
    assert any(name.endswith("qkv.scale") for name in names)
    assert [point["step"] for point in told] == [4, 8]
