"""Beside a rounded student: full precision, rounding it afterwards, labels alone; and the anatomy
of its file.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from raykd import data
from raykd.deploy.sizes import bytes_of
from raykd.quant.rounding import codes_of, scale_of
from raykd.reports import page, sentences
from raykd.stages import walk
from raykd.stages.load import load
from raykd.training import run_files
from raykd.training.arms import arms_of
from raykd.training.post_training import rounded_afterwards, write_missing
from raykd.training.run_arms import ArmRunner

pytestmark = pytest.mark.ray
PHASES = """
[[phases]]
until = 0.5
[[phases]]
until = 1.0
quant = { weights = "ternary", activations = "none", rest = "int8" }
"""


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "rounded.toml"
    path.write_text(
        f"rounded_control = true\n{tiny.read_text()}{PHASES}".replace('"tiny"', '"rounded"')
    )
    return path


@pytest.fixture(scope="module")
def out(scored, tmp_path_factory) -> Path:
    """An --out of its own: other tests start from one where nothing is trained."""
    return Path(shutil.copytree(scored, tmp_path_factory.mktemp("beside") / "out"))


@pytest.fixture(scope="module")
def made(recipe, out) -> dict[str, Any]:
    return walk.run(load(recipe), out)


@pytest.fixture(scope="module")
def folder(made, out) -> Path:
    return next(out.glob("rounded-*"))


def test_the_arms_stand_in_their_order_and_only_where_phases_round(recipe, tiny):
    names = [arm.name for arm in arms_of(load(recipe))]
    assert names == ["control", "rounded_control", "unrounded", "student"]
    assert [arm.name for arm in arms_of(load(tiny, ("rounded_control=true",)))] == [
        "control",
        "student",
    ]
    alone = ("control=false", "unrounded=false", "rounded_control=false")
    assert [arm.name for arm in arms_of(load(recipe, alone))] == ["student"]


def test_the_unrounded_student_is_the_student_of_one_phase_without_rounding(
    made, folder, tiny, out
):
    plain = walk.train(load(tiny, ("phases=[{until=1.0}]",)), out)
    ours, theirs = (
        load_file(f / "weights.safetensors")
        for f in (folder / "arms/unrounded-0", plain / "arms/student-0")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rounding_afterwards_is_the_unrounded_student_with_its_weights_rounded(
    made, recipe, folder, out
):
    found = load(recipe)
    shop = ArmRunner(found, walk.score(found, out), torch.device("cpu"))
    student = shop.student(next(arm for arm in arms_of(found) if arm.name == "unrounded"))
    weights = load_file(folder / "arms/unrounded-0/weights.safetensors")
    for name, value in weights.items():
        if value.dim() > 1:
            ternary = ".qkv." in name or ".out." in name or ".mlp." in name
            rule = "absmean" if ternary else "absmax"
            largest = 1 if ternary else 127
            rows = value.reshape(len(value), 1, -1)
            scale = scale_of(rows, rule, largest)
            weights[name] = (codes_of(rows, scale, rule, largest) * scale).reshape(value.shape)
    student.module.load_state_dict(weights)
    test = shop.tested()
    afterwards = rounded_afterwards(
        found, shop.table.shape, folder / "arms/unrounded-0/weights.safetensors"
    )
    said = test.said(afterwards, 0)
    np.testing.assert_allclose(test.said(student, 0).logits, said.logits, atol=1e-5)
    right = said.metrics()["accuracy"]
    assert made["beside"]["post_training"]["metrics"]["accuracy"]["value"] == pytest.approx(right)


def test_what_rounding_afterwards_gives_is_written_for_arms_that_lack_it(made, recipe, folder):
    found = load(recipe)
    files = sorted(path.parent.name for path in folder.glob(f"arms/*/{run_files.ROUNDED}"))
    assert files == ["unrounded-0"]
    path = run_files.arm(folder, "unrounded-0") / run_files.ROUNDED
    before = path.read_bytes()
    path.unlink()
    write_missing(found, data.open_source(found.data), folder)
    assert path.read_bytes() == before


def test_what_was_lost_is_a_paired_difference(made):
    student = made["student"]["metrics"]["accuracy"]["value"]
    assert list(made["beside"]) == ["unrounded", "rounded_control", "post_training"]
    for part in made["beside"].values():
        assert part["lost"]["value"] == pytest.approx(
            student - part["metrics"]["accuracy"]["value"]
        )
        assert part["lost"]["lo"] <= part["lost"]["value"] <= part["lost"]["hi"]


def test_the_report_shows_them(made, folder):
    told = sentences.table(made)
    html = page.render(made)
    for name in sentences.BESIDE.values():
        assert name in told
        assert name in html
    assert "blocks.0.attention.qkv" in html


def test_student_weights_keep_their_names(folder, recipe):
    """However a parameter is rounded, its file is one that the user's own module loads."""
    arms = [
        load_file(folder / f"arms/{name}-0/weights.safetensors") for name in ("control", "student")
    ]
    assert arms[0].keys() == arms[1].keys()
    assert load_file(folder / "student.safetensors").keys() == arms[0].keys()


def test_the_bytes_by_kind_are_those_of_the_file(made, folder):
    sizes = made["artefact"]["bytes_by_kind"]
    tensors = made["artefact"]["tensors"]
    file = (folder / "artefact/student.onnx").read_bytes()
    assert sum(sizes.values()) == len(file) == made["artefact"]["bytes"]
    assert sizes == bytes_of(file, tensors)
    assert sizes["codes"] == sum(row["bytes"]["codes"] for row in tensors)
    assert all(
        0 < row["error"] < (0.9 if row["kind"].startswith("ternary") else 0.02) for row in tensors
    )
    whole = {tuple(row["shape"]) for row in tensors}
    left = [
        t
        for t in onnx.load_from_string(file).graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    ]
    assert not whole & {
        tuple(t.dims) for t in left
    }  # nothing that was rounded stands there in full precision, too


def test_latency_is_told_beside_every_runtime(made, folder):
    manifest = json.loads((folder / "artefact/manifest.json").read_bytes())
    rows = {(row["model"], row["runtime"]): row["ratio"] for row in manifest["latency"]["rows"]}
    assert rows.keys() == {
        (m, r) for m in ("teacher", "fp32 student") for r in ("torch", "onnxruntime")
    }
    assert made["artefact"]["latency"]["ratio_vs_teacher"] == pytest.approx(
        1 / rows["teacher", "onnxruntime"]
    )
    assert made["artefact"]["latency"]["flags"]
