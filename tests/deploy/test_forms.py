"""`[export]`: each form of a student beside the one that trained, the walk when the table changes,
and what is refused.

The reference is what the trained student said of the test rows: the logits that training left.
"""

import hashlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raykd import data
from raykd.data.table import Held
from raykd.deploy import artefact, forms, packed, run_artefact
from raykd.deploy.parity import BLOCKS, Bar, bar_of, compare
from raykd.errors import GateError, RecipeError, StoreError
from raykd.files.atomic import read_json
from raykd.files.digests import file_sha256
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Export, Recipe
from raykd.stages import plan, walk
from raykd.stages.load import resolve
from raykd.training import predictions, run_files
from raykd.training.arm import World
from raykd.training.run_arms import run_arms

EXECUTORCH = find_spec("executorch") is not None
SCHEMES: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int8": {"weights": "int8"},
    "int4-g32": {"weights": "int4", "per": "group"},
    "ternary": {"weights": "ternary", "activations": "none"},
}


def recipe_of(quant: dict[str, Any] | None, **export: bool) -> Recipe:
    """A student that trains for a moment, without a teacher."""
    raw: dict[str, Any] = {
        "name": "forms",
        "technique": "none",
        "control": False,
        "unrounded": False,
    }
    raw |= {
        "data": {"stride": 128},
        "optim": {"steps": 20, "batch": 16, "evaluate_every": 10},
        "export": export,
    }
    raw["student"] = {"settings": {"width": 32, "layers": 1}}
    return resolve(
        raw | ({"phases": [{"until": 0.5}, {"until": 1.0, "quant": quant}]} if quant else {})
    )


def forms_of(quant: dict[str, Any] | None) -> dict[str, bool]:
    """All forms that a student under this scheme has here."""
    found = {"stream": True, "packed": quant is not None}
    return found | {"pte": EXECUTORCH and (quant is None or quant["weights"] != "ternary")}


def train(recipe: Recipe, folder: Path) -> None:
    run_arms(
        recipe, None, folder, world=World(), device=torch.device("cpu"), report=lambda *_: None
    )


SAID = {
    "stream": "np.mean(said, 0)[None]",
    "packed": "logits.numpy()",
    "pte": "logits.numpy().mean(1)",
}


def as_the_card_says(export: Export, form: str, folder: Path) -> np.ndarray:
    """(1 or N, C): what the code of a form in the model card finds for windows.npy, run where the
    card stands.
    """
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(blocks) == len(forms.asked(export))
    code = f"{blocks[forms.asked(export).index(form)]}\nnp.save('said.npy', {SAID[form]})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "said.npy")


@pytest.mark.parametrize("name", SCHEMES)
def test_each_form_answers_as_the_student_that_was_trained(name, tmp_path):
    quant = SCHEMES[name]
    recipe = recipe_of(quant, **forms_of(quant))
    train(recipe, tmp_path)
    dataset = data.load(recipe.data)
    manifest = artefact.export(recipe, dataset, tmp_path)
    folder = tmp_path / "artefact"
    trained = predictions.read(tmp_path / "arms/student-0/predictions.parquet").logits
    assert trained is not None
    assert json.loads((folder / "manifest.json").read_bytes()) == manifest
    names = {forms.FILES[form] for form in forms.asked(recipe.export)}
    assert {p.name for p in folder.iterdir()} >= names
    assert {n for n, entry in manifest["files"].items() if "parity" in entry} == names
    bar = bar_of(recipe.phases[-1].quant if quant else None)
    for file in names:
        entry = manifest["files"][file]
        assert entry["bytes"] == (folder / file).stat().st_size
        assert entry["sha256"] == file_sha256(folder / file)
        assert (
            entry["parity"]["relative"]
            <= (BLOCKS if quant and file == "student.pte" else bar).largest
        )
        print(name, file, entry["bytes"], entry["parity"])
    assert manifest["files"]["student.stream.onnx"]["parity"]["step_agreement"] >= (
        0.98 if quant else 1
    )
    np.save(folder / "windows.npy", dataset.splits["test"].inputs)
    for form in forms.asked(recipe.export):
        said = as_the_card_says(recipe.export, form, folder)
        alone = name == "int8" and form == "stream"
        worst = BLOCKS if quant and (alone or form == "pte") else bar
        assert np.abs(said - trained[: len(said)]).max() <= worst.largest * np.abs(trained).max()
    if recipe.export.packed:
        (folder / "student.packed.safetensors").write_bytes(b"damaged")
        with pytest.raises(StoreError, match="changed after it was written"):
            artefact.unpack_artefact(folder)


def test_a_changed_table_is_a_new_export_and_no_new_training(tmp_path):
    quant = {"weights": "ternary", "activations": "none"}
    folder = walk.export(recipe_of(quant), tmp_path)
    run = folder.parent
    trained = {p: p.stat().st_mtime_ns for p in (run / "arms").rglob("*") if p.is_file()}
    plain = {p.name for p in folder.iterdir()}

    def again(**export: bool) -> set[str]:
        recipe = recipe_of(quant, **export)
        states = {stage["stage"]: stage["done"] for stage in plan.plan(recipe, tmp_path)["stages"]}
        assert states["train"]
        done = states["export"]
        before = (folder / "manifest.json").stat().st_mtime_ns
        assert walk.export(recipe, tmp_path) == folder
        assert done == ((folder / "manifest.json").stat().st_mtime_ns == before)
        assert {p: p.stat().st_mtime_ns for p in trained} == trained
        assert read_json(folder / "manifest.json")["export"] == recipe.export.model_dump()
        made.append(not done)
        return {p.name for p in folder.iterdir()} - plain

    made: list[bool] = []
    both = {"student.stream.onnx", "student.packed.safetensors"}
    assert again(stream=True, packed=True) == both
    assert again(stream=True, packed=True) == both
    (folder / "student.packed.safetensors").unlink()
    assert again(stream=True, packed=True) == both
    assert again() == set()
    assert made == [True, False, True, True]


def test_an_artefact_of_before_the_table_is_whole_without_forms(tmp_path):
    sha256 = hashlib.sha256(b"").hexdigest()
    manifest = {"schema": 1, "format": "onnx int8", "seed": 0, "bytes": 0, "parity": {}}
    manifest |= {"files": {"run.py": {"bytes": 0, "sha256": sha256}}, "answered_by": "run.py"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert not artefact.is_whole(tmp_path, Export())
    (tmp_path / "run.py").touch()
    assert artefact.is_whole(tmp_path, Export())
    assert not artefact.is_whole(tmp_path, Export(stream=True))
    del manifest["answered_by"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert not artefact.is_whole(tmp_path, Export()), "its run.py was never asked"


def test_an_export_keeps_what_the_artefact_answers_on_the_test_rows(tmp_path):
    recipe = recipe_of(None)
    train(recipe, tmp_path)
    dataset = data.load(recipe.data)
    run_artefact.write(recipe, Held(dataset), tmp_path)
    path = tmp_path / run_files.ARTEFACT_ANSWERS
    written = predictions.read(path)
    asked = artefact.predict(tmp_path / "artefact", dataset.splits["test"])
    for name, values in vars(asked).items():
        np.testing.assert_array_equal(getattr(written, name), values, err_msg=name)
    assert run_artefact.is_whole(recipe, tmp_path)
    before = path.read_bytes()
    path.unlink()
    assert not run_artefact.is_whole(recipe, tmp_path)
    run_artefact.answer(Held(dataset), tmp_path)
    assert path.read_bytes() == before
    assert run_artefact.is_whole(recipe, tmp_path)


def test_a_form_that_answers_otherwise_leaves_no_artefact_and_spoils_none(tmp_path, monkeypatch):
    quant = {"weights": "ternary", "activations": "none"}
    recipe = recipe_of(quant, packed=True)
    train(recipe, tmp_path)
    dataset = data.load(recipe.data)
    pack_trits = packed.pack_trits
    with monkeypatch.context() as patch:
        patch.setattr(packed, "pack_trits", lambda codes: pack_trits(-codes))
        with pytest.raises(
            GateError, match=r"as student.packed.safetensors answers them; no artefact was written"
        ):
            artefact.export(recipe, dataset, tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"arms"}
        artefact.export(recipe_of(quant), dataset, tmp_path)
        kept = {p: p.read_bytes() for p in (tmp_path / "artefact").iterdir()}
        with pytest.raises(GateError):
            artefact.export(recipe, dataset, tmp_path)
    assert {p: p.read_bytes() for p in (tmp_path / "artefact").iterdir()} == kept
    assert not artefact.is_whole(tmp_path / "artefact", recipe.export)


def keys(caught: Any) -> set[str]:
    return {problem.key for problem in caught.value.problems}


def test_what_can_not_be_is_refused_before_any_work_with_every_key(tmp_path):
    llama = {
        "classes": 5,
        "steps": 8,
        "width": 8,
        "heads": 2,
        "kv_heads": 1,
        "layers": 1,
        "inner": 8,
    }
    encoder = SeriesEncoder(channels=3, classes=5, steps=8)
    every = Export(stream=True, packed=True, pte=True)
    with pytest.raises(RecipeError) as caught:
        forms.check(every, Llama(**llama), None)
    assert keys(caught) == {"export.stream", "export.packed"} | (
        set() if EXECUTORCH else {"export.pte"}
    )
    assert "found a Llama" in str(caught.value)
    for quant in (
        Quant(weights="ternary"),
        Quant(embeddings="int8"),
        Quant(weights="int4", per="group", group=16),
    ):
        with pytest.raises(RecipeError, match=r"export\.pte: quant"):
            forms.check(every, encoder, quant)
    if not EXECUTORCH:
        with pytest.raises(
            RecipeError,
            match=r"export.pte: needs executorch; type: pip install 'raykd\[executorch\]'",
        ):
            forms.check(Export(pte=True), encoder, Quant())
    with pytest.raises(RecipeError) as caught:
        forms.check(every, encoder, Quant(), kind="text")
    assert keys(caught) == {"export.stream", "export.packed", "export.pte"}
    forms.check(Export(), nn.Linear(3, 3), None)
    for verb in (plan.plan, walk.export, walk.run):
        with pytest.raises(RecipeError, match=r"export\.packed: this student is not rounded"):
            verb(recipe_of(None, packed=True), tmp_path)
    with pytest.raises(RecipeError, match=r"export.strem: unknown key. Did you mean stream\?"):
        recipe_of(None, strem=True)
    assert not list(tmp_path.iterdir())


def test_the_bar_is_that_of_the_answers_largest_difference():
    trained = np.eye(4, dtype=np.float32).repeat(50, 0)
    off = trained + np.float32(1e-3)
    parity = compare(trained, off, Bar(2e-3, 2e-3, 1.0), "200 test rows")
    assert parity["relative"] == pytest.approx(1e-3, rel=1e-3)
    for bar in (Bar(5e-4, 2e-3, 1.0), Bar(2e-3, 5e-4, 1.0)):
        with pytest.raises(GateError, match="on 200 test rows"):
            compare(trained, off, bar, "200 test rows")


@pytest.mark.parametrize(
    ("width", "quant", "message"),
    [
        (64, Quant(weights="ternary"), "TQ2_0 takes rows of a multiple of 256, found 64"),
        (256, Quant(weights="ternary", per="group", group=64), "has a scale for 256 neighbours"),
        (48, Quant(weights="int8"), "Q8_0 takes rows of a multiple of 32, found 48"),
    ],
)
def test_what_no_block_of_gguf_holds_is_refused_before_training(width, quant, message):
    pytest.importorskip("gguf")
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "inner": 256}
    module = Llama(classes=300, steps=16, width=width, **sizes)
    with pytest.raises(RecipeError, match=message) as refused:
        forms.check(Export(gguf=True), module, quant, kind="text")
    assert [problem.key for problem in refused.value.problems] == ["export.gguf"]
    forms.check(Export(gguf=True), module, None, kind="text")
