"""The deployable student of series: a folder with what it takes to run it, whole or absent.

student.safetensors   the weights of the best seed, by validation accuracy
student.onnx          in its place if it was trained rounded: codes and scales for onnxruntime
model.json            the model's name and settings, channels, steps and class names
run.py                loads both and classifies a .npy file
student.*             the other forms that `[export]` asks for, each compared with the student
README.md             a model card to fill in
manifest.json         bytes and sha256 of each file, the measured parity, bytes by kind, latency
                      and what is computed in float32, with the reason
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raykd import models
from raykd.data import Dataset
from raykd.deploy import forms, latency, packed, sizes
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.deploy.parity import Parity, bar_of, compare, refusal
from raykd.files.atomic import read_json, whole_folder, write_bytes, write_json
from raykd.files.digests import file_sha256
from raykd.models.adapter import Adapter
from raykd.quant import swap
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Export, Recipe
from raykd.recipe.tables import ModelRef
from raykd.training import phases, predictions, run_files
from raykd.training.arms import best_seed
from raykd.training.device_rows import to_device
from raykd.training.predictions import Predictions, of_logits

FORMAT = "safetensors fp32"
LARGEST_DIFFERENCE = 1e-4  # of logits; the same weights in the same arithmetic differ by less
WEIGHTS = "student.safetensors"
ONNX = "student.onnx"
MODEL = "model.json"
ALONE = 512  # test rows that are answered one by one, too

Logits = NDArray[np.float32]


def export(recipe: Recipe, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write `artefact/` in a run folder, its answers on the test rows beside it; its manifest.

    GateError, and no folder, if it answers otherwise than the trained student.
    """
    # Those of an artefact that is about to be replaced.
    (folder / run_files.ARTEFACT_ANSWERS).unlink(missing_ok=True)
    seed = best_seed(recipe, folder)
    arm = run_files.student(folder, seed)
    quant = recipe.quant
    with whole_folder(run_files.artefact(folder)) as staged:
        write_json(staged / MODEL, _model(recipe, dataset))
        (staged / WEIGHTS).write_bytes((arm / run_files.WEIGHTS).read_bytes())
        measured = _rounded(recipe, dataset, staged, quant) if quant else {}
        title = f"{recipe.name} ({recipe.technique})"
        copy_cards(staged, title, run="run_onnx.py" if quant else "run.py")
        trained = predictions.read(arm / run_files.PREDICTIONS).logits
        answers = predict(staged, dataset)
        assert trained is not None
        assert answers.logits is not None
        parity = _parity(staged, dataset, trained, answers.logits, quant)
        form_parity = _forms(recipe, dataset, staged, arm, trained)
        manifest = _manifest(staged, seed, quant, parity)
        manifest |= measured
        manifest |= {"export": recipe.export.model_dump()}
        for name, measures in form_parity.items():
            manifest["files"][name] |= {"parity": measures}
        write_json(staged / run_files.MANIFEST, manifest)
    answers.write(folder / run_files.ARTEFACT_ANSWERS)
    write_bytes(folder / run_files.STUDENT, (arm / run_files.WEIGHTS).read_bytes())
    return manifest


def is_whole(folder: Path, forms_table: Export) -> bool:
    """Whether a folder holds an artefact with all its files, in just the forms of `[export]`."""
    manifest = read_json(folder / run_files.MANIFEST)
    if manifest is None:
        return False
    if manifest.get("export", Export().model_dump()) != forms_table.model_dump():
        return False
    return all((folder / name).is_file() for name in manifest["files"])


def _forms(
    recipe: Recipe, dataset: Dataset, staged: Path, arm: Path, trained: Logits
) -> dict[str, Parity]:
    """Write what `[export]` asks for; {file: its parity}."""
    if not forms.asked(recipe.export):
        return {}
    described = _described(staged)

    def student() -> nn.Module:
        return _student(described, arm / run_files.WEIGHTS).eval()

    def plain() -> nn.Module:
        return _built(described).eval()

    quant = recipe.quant
    rows = dataset.splits["test"]
    return forms.write(recipe.export, staged, rows, trained, quant, student, plain)


def copy_cards(folder: Path, title: str, *, run: str, readme: str = "README.md") -> None:
    """Write run.py and README.md for a student called `title`, from the cards of these names."""
    for name, card in (("run.py", run), ("README.md", readme)):
        text = (resources.files("raykd.deploy") / "card" / card).read_text()
        (folder / name).write_text(text.replace("STUDENT", title))


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: bytes and sha256} of every file in a folder."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _rounded(recipe: Recipe, dataset: Dataset, staged: Path, quant: Quant) -> dict[str, Any]:
    """Write the ONNX file in place of the weights; the sizes and latency for the manifest."""
    rows = torch.from_numpy(dataset.splits["test"].inputs[:2].copy())
    module = load_artefact(staged).module
    tensors = sizes.tensors_of(module)
    file = write_onnx.to_onnx(module, rows)
    (staged / ONNX).write_bytes(file)
    (staged / WEIGHTS).unlink()
    refs = {"teacher": recipe.teacher, "fp32 student": recipe.student.bare}
    others = {
        name: models.build_model(ref, **dataset.shape, key=name)
        for name, ref in refs.items()
        if ref
    }
    return {
        "latency": latency.latency(file, others, rows[:1]),
        "tensors": tensors,
        "bytes_by_kind": sizes.bytes_of(file, tensors),
        "computed_in_float32": [
            layer._asdict() for layer in swap.left(others["fp32 student"], quant)
        ],
    }


def load_artefact(folder: Path) -> Adapter:
    """The student of an artefact folder in full precision, in eval mode.

    Called with inputs (B, T, K) and a mask (B, T), it gives the `Signals` of its model. A rounded
    student is executed by onnxruntime: see run.py beside it, or `unpack_artefact`.

    Example:
        >>> import json, tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from raykd.deploy import load_artefact
        >>> from raykd.models.series_encoder import SeriesEncoder
        >>> folder, settings = Path(tempfile.mkdtemp()), {"width": 16, "heads": 2, "layers": 1}
        >>> described = {"model": "series_encoder", "settings": settings, "classes": ["a", "b"]}
        >>> described |= {"channels": 6, "steps": 50}
        >>> _ = (folder / "model.json").write_text(json.dumps(described))
        >>> student = SeriesEncoder(channels=6, classes=2, steps=50, **settings)
        >>> save_file(student.state_dict(), folder / "student.safetensors")
        >>> signals = load_artefact(folder)(torch.zeros(3, 50, 6), torch.ones(3, 50).bool())
        >>> signals.sequence_logits().shape
        torch.Size([3, 2])
    """
    return Adapter(_student(_described(folder), folder / WEIGHTS)).eval()


def unpack_artefact(folder: Path) -> Adapter:
    """The rounded student of an artefact folder with a packed file, in eval mode.

    It answers as the trained student. StoreError if the file is damaged.

    Example:
        >>> import json, tempfile, torch
        >>> from pathlib import Path
        >>> from raykd.deploy import packed, unpack_artefact
        >>> from raykd.models.series_encoder import SeriesEncoder
        >>> from raykd.recipe.quant import Quant
        >>> from raykd.training.phases import round_as
        >>> folder, settings = Path(tempfile.mkdtemp()), {"width": 16, "heads": 2, "layers": 1}
        >>> described = {"model": "series_encoder", "settings": settings, "classes": ["a", "b"]}
        >>> described |= {"channels": 6, "steps": 50}
        >>> _ = (folder / "model.json").write_text(json.dumps(described))
        >>> student = SeriesEncoder(channels=6, classes=2, steps=50, **settings)
        >>> round_as(student, Quant(weights="ternary"))
        >>> _ = (folder / "student.packed.safetensors").write_bytes(packed.write(student))
        >>> signals = unpack_artefact(folder)(torch.zeros(3, 50, 6), torch.ones(3, 50).bool())
        >>> signals.sequence_logits().shape
        torch.Size([3, 2])
    """
    module = _built(_described(folder))
    packed.read((folder / forms.FILES["packed"]).read_bytes(), module)
    return Adapter(module).eval()


def _described(folder: Path) -> dict[str, Any]:
    """The model.json of an artefact folder."""
    return json.loads((folder / MODEL).read_bytes())


def _built(described: Mapping[str, Any]) -> nn.Module:
    """The module that a model.json describes, in full precision and untrained."""
    ref = ModelRef(model=described["model"], settings=described["settings"])
    shape = {
        "channels": described["channels"],
        "steps": described["steps"],
        "classes": len(described["classes"]),
    }
    return models.build_model(ref, **shape, key="artefact")


def _student(described: Mapping[str, Any], weights: Path) -> nn.Module:
    """The module that a model.json describes, with trained weights, rounded as its last phase."""
    module = _built(described)
    quant = described.get("quant")
    if quant:
        phases.round_as(module, Quant.model_validate(quant))
    models.load_weights(module, weights, "artefact")
    return module


def predict(folder: Path, dataset: Dataset) -> Predictions:
    """The artefact's predictions of the test split."""
    if (folder / ONNX).exists():
        split = dataset.splits["test"]
        return of_logits(
            split, onnx_session.sequence_logits(folder / ONNX, split, predictions.EVAL_BATCH)
        )
    return _by_torch(load_artefact(folder), dataset)


def _by_torch(student: Adapter, dataset: Dataset) -> Predictions:
    split = dataset.splits["test"]
    return predictions.of_model(
        student, split, to_device(split, "test", None, frozenset(), torch.device("cpu"))
    )


def _model(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    quant = recipe.quant
    described = {"model": recipe.student.model, "settings": recipe.student.settings}
    described |= {"quant": quant.model_dump(mode="json") if quant else None}
    return described | dataset.shape | {"classes": list(dataset.classes)}


def _parity(
    staged: Path, dataset: Dataset, trained: Logits, answered: Logits, quant: Quant | None
) -> Parity:
    """How far the artefact's logits (N, C) are from the trained student's on the test split.

    GateError if they are too far.
    """
    where = f"{len(trained)} test rows"
    if quant is None:
        return _same(trained, answered, where)
    parity = compare(trained, answered, bar_of(quant), where)
    few = dataset.splits["test"].take(slice(0, ALONE))
    alone = onnx_session.sequence_logits(staged / ONNX, few, 1).argmax(1)
    together = answered[: len(alone)].argmax(1)
    return parity | {"alone_agreement": float((alone == together).mean())}


def _same(trained: Logits, answered: Logits, where: str) -> Parity:
    """The same for an artefact that holds the trained weights themselves."""
    worst = float(np.abs(trained - answered).max())
    if not worst <= LARGEST_DIFFERENCE:
        raise refusal(f"by {worst:.3g}, more than {LARGEST_DIFFERENCE:g}", where)
    agreement = float((trained.argmax(1) == answered.argmax(1)).mean())
    return {"max_abs_diff": worst, "agreement": agreement}


def _manifest(
    staged: Path, seed: int, quant: Quant | None, parity: dict[str, float]
) -> dict[str, Any]:
    """What the manifest of every artefact says."""
    files = files_of(staged)
    return {
        "schema": 1,
        "format": f"onnx {quant.weights}" if quant else FORMAT,
        "seed": seed,
        "bytes": files[ONNX if quant else WEIGHTS]["bytes"],
        "parity": parity,
        "files": files,
    }
