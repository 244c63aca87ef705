"""The deployable student: a folder that is whole or absent, with what it takes to run it and proof that it does.

artefact/student.safetensors   the best seed's weights, by validation accuracy
         model.json            the model's name and settings, channels, steps and class names
         run.py                loads both and classifies a .npy file
         README.md             a model card to fill in
         manifest.json         bytes and sha256 of each file, and the parity that was measured
"""

import json
import os
import shutil
import uuid
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raykd import measure, models, phases
from raykd.arms import arms_of, read_predictions
from raykd.batches import to_device
from raykd.data import Dataset
from raykd.errors import GateError
from raykd.files import read_json, write_bytes, write_json
from raykd.models.adapter import Adapter
from raykd.recipe import ModelRef, Phase, Recipe, file_sha256

FORMAT = "safetensors fp32"
LARGEST_DIFFERENCE = 1e-4  # of logits; the same weights in the same arithmetic differ by less


def best_seed(recipe: Recipe, folder: Path) -> int:
    """The student's seed with the highest validation accuracy, the first of equals."""
    records = [read_json(folder / "arms" / arm.key / "arm.json") for arm in arms_of(recipe) if arm.name == "student"]
    return max(records, key=lambda record: record["val"]["val_accuracy"])["seed"]


def export(recipe: Recipe, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write `artefact/` in a run folder, and give its manifest. GateError, and no folder, if it answers otherwise."""
    seed = best_seed(recipe, folder)
    arm = folder / "arms" / f"student-{seed}"
    staged = folder / f".artefact-{uuid.uuid4().hex}"
    staged.mkdir()
    try:
        (staged / "student.safetensors").write_bytes((arm / "weights.safetensors").read_bytes())
        write_json(staged / "model.json", _model(recipe, dataset))
        for name in ("run.py", "README.md"):
            text = (resources.files("raykd") / "card" / name).read_text()
            (staged / name).write_text(text.replace("STUDENT", f"{recipe.name} ({recipe.technique})"))
        manifest = _manifest(staged, seed, _parity(staged, dataset, arm))
        write_json(staged / "manifest.json", manifest)
        shutil.rmtree(folder / "artefact", ignore_errors=True)
        os.rename(staged, folder / "artefact")
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    write_bytes(folder / "student.safetensors", (arm / "weights.safetensors").read_bytes())
    return manifest


def load(folder: Path) -> Adapter:
    """The model of an artefact folder, ready to answer."""
    described = json.loads((folder / "model.json").read_bytes())
    ref = ModelRef(model=described["model"], settings=described["settings"])
    shape = {key: described[key] for key in ("channels", "steps")} | {"classes": len(described["classes"])}
    module = models.build(ref, **shape, key="artefact")
    phase = Phase.model_validate({"until": 1.0, "quant": described.get("quant")})
    phases.prepare(module, [phase])
    phases.enter(module, phase)
    models.load_weights(module, folder / "student.safetensors", "artefact")
    return Adapter(module).eval()


def predict(folder: Path, dataset: Dataset) -> NDArray[np.float32]:
    """(N, C): the artefact's sequence logits on the test split."""
    rows = to_device(dataset.splits["test"], "test", None, frozenset(), torch.device("cpu"))
    return measure.sequence_logits(load(folder), rows)


def _model(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    quant = recipe.phases[-1].quant if recipe.phases else None
    described = {"model": recipe.student.model, "settings": recipe.student.settings}
    described |= {"quant": quant.model_dump(mode="json") if quant else None}
    return described | dataset.shape | {"classes": list(dataset.classes)}


def _parity(staged: Path, dataset: Dataset, arm: Path) -> dict[str, float]:
    trained, answered = read_predictions(arm / "predictions.parquet"), predict(staged, dataset)
    worst = float(np.abs(trained - answered).max())
    agreement = float((trained.argmax(1) == answered.argmax(1)).mean())
    if not worst <= LARGEST_DIFFERENCE:
        raise GateError(
            f"export: the artefact's logits differ from the trained student's by {worst:.3g}, more than "
            f"{LARGEST_DIFFERENCE:g}, on {len(trained)} test rows; no artefact was written"
        )
    return {"max_abs_diff": worst, "agreement": agreement}


def _manifest(staged: Path, seed: int, parity: dict[str, float]) -> dict[str, Any]:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(staged.iterdir())}
    size = files["student.safetensors"]["bytes"]
    return {"schema": 1, "format": FORMAT, "seed": seed, "bytes": size, "parity": parity, "files": files}
