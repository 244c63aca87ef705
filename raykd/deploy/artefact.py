"""The deployable student of series or sentences: a folder with what it takes to run it, whole or
absent.

student.onnx          the best seed's student, by validation accuracy, for onnxruntime: codes and
                      scales if it was trained rounded
student.safetensors   the weights, if it was not: for raykd, and all there is of a student that
                      ONNX cannot hold
model.json            the model's name and settings, class names, and how a row must look
config.json, model.safetensors, tokenizer_config.json
                      of a text classifier of transformers that is not rounded, in place of
                      student.safetensors: transformers reads the folder as its own
tokenizer.json        of sentences: what makes tokens of a text
run.py                classifies rows, or texts, of any length up to the longest, each by itself
student.*             the other forms that `[export]` asks for, each compared with the student
README.md             a model card to fill in
manifest.json         bytes and sha256 of each file, the measured parity, bytes by kind, latency
                      and what is computed in float32, with the reason

What the report says of the artefact is what its run.py answered on the test rows, as a process.
"""

from collections.abc import Collection, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raykd import models
from raykd.data import Dataset, Rows
from raykd.deploy import classifier_folder, forms, latency, own_script, packed, sizes
from raykd.deploy.manifest import STUDENT, is_complete, read_manifest
from raykd.deploy.manifest import check as check_files
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.deploy.parity import EXACT, Bar, Parity, bar_of, compare, refusal
from raykd.errors import GateError, RecipeError, StoreError
from raykd.files.atomic import read_json, whole_folder, write_bytes, write_json
from raykd.files.digests import file_sha256
from raykd.models.adapter import Adapter
from raykd.models.hf_classifier import TransformersClassifier
from raykd.quant import swap
from raykd.recipe import imports
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Export, Recipe
from raykd.recipe.tables import StudentRef
from raykd.recipe.weight_files import TRANSFORMERS
from raykd.training import phases, predictions, run_files
from raykd.training.arms import best_seed
from raykd.training.device_rows import to_device
from raykd.training.predictions import Predictions, of_logits

FORMAT = "safetensors fp32"
LARGEST_DIFFERENCE = 1e-4  # of logits; the same weights in the same arithmetic differ by less
WEIGHTS = "student.safetensors"
ONNX = "student.onnx"
MODEL = "model.json"
TENSORS = "model.safetensors"  # the weights of a folder that transformers reads
TOKENIZER = "tokenizer.json"
ALONE = 512  # test rows that the trained student reads one by one, too
# Of float32 in another runtime. Where two logits are equal, either may be the larger one.
SAME = Bar(EXACT.relative, EXACT.largest, 0.0)
SHORTER = 0.05  # of the largest logit: more than rounding, less than another answer
DESCRIBED: dict[str, type] = {  # what model.json has
    "model": str,
    "settings": dict,
    "classes": list,
    "channels": int,
    "steps": int,
}
SCRIPTED = "answered_by"  # key of the manifest: the script whose answers were measured

Logits = NDArray[np.float32]


def export(
    recipe: Recipe, dataset: Dataset, folder: Path, rest: Iterable[Rows] = ()
) -> dict[str, Any]:
    """Write `artefact/` in a run folder, its answers on the test rows beside it; its manifest.

    GateError, and no folder, if it answers otherwise than the trained student. `rest` are test rows
    behind those of `dataset`, which are only answered.
    """
    # Those of an artefact that is about to be replaced.
    (folder / run_files.ARTEFACT_ANSWERS).unlink(missing_ok=True)
    seed = best_seed(recipe, folder)
    arm = run_files.student(folder, seed)
    kept = predictions.read(arm / run_files.PREDICTIONS).logits
    with whole_folder(run_files.artefact(folder)) as staged:
        write_json(staged / MODEL, _model(recipe, dataset))
        trained = _trained(staged, arm, dataset) if kept is None else kept
        (staged / WEIGHTS).write_bytes((arm / run_files.WEIGHTS).read_bytes())
        measured = _write_student(recipe, dataset, staged, trained)
        is_folder = _write_folder(staged, dataset)
        _describe_rows(staged, dataset)
        _add_cards(staged, recipe, dataset)
        answers = predict(staged, dataset.splits["test"])
        assert answers.logits is not None
        parity = _parity(staged, arm, dataset, trained, answers.logits, recipe.quant)
        form_parity = _forms(recipe, dataset, staged, arm, trained)
        if is_folder:
            test = dataset.splits["test"]
            form_parity[TENSORS] = classifier_folder.parity(staged, test, trained, SAME)
        manifest = _manifest(staged, seed, recipe.quant, parity)
        manifest |= measured
        manifest |= {"export": recipe.export.model_dump()}
        manifest |= {STUDENT: file_sha256(arm / run_files.WEIGHTS)}
        for name, measures in form_parity.items():
            manifest["files"][name] |= {"parity": measures}
        write_json(staged / run_files.MANIFEST, manifest)
    exported = run_files.artefact(folder)
    later = (predict(exported, rows) for rows in rest)
    predictions.write_all(folder / run_files.ARTEFACT_ANSWERS, answers, later)
    write_bytes(folder / run_files.STUDENT, (arm / run_files.WEIGHTS).read_bytes())
    return manifest


def _write_folder(staged: Path, dataset: Dataset) -> bool:
    """Let transformers read a text classifier of its own that is not rounded; whether it is one."""
    is_of_transformers = _described(staged)["model"] == TRANSFORMERS
    if not dataset.is_sentences or not is_of_transformers or not (staged / WEIGHTS).exists():
        return False
    module = load_artefact(staged).module
    assert isinstance(module, TransformersClassifier)
    classifier_folder.write(module, staged, dataset.classes)
    (staged / WEIGHTS).unlink()
    return True


def _add_cards(staged: Path, recipe: Recipe, dataset: Dataset) -> None:
    """Write run.py and README.md, and of sentences the tokeniser that they need."""
    title = f"{recipe.name} ({recipe.technique})"
    if not dataset.is_sentences:
        copy_cards(staged, title, run="run.py")
        _card_rows(staged)
        return
    if recipe.data.tokenizer:
        (staged / TOKENIZER).write_bytes(Path(recipe.data.tokenizer).read_bytes())
    copy_cards(staged, title, run="run_text.py", readme="README_text.md")
    described = _described(staged)
    card = staged / "README.md"
    longest = described["rows"]["longest"]
    told = card.read_text("utf-8").replace("LONGEST", str(longest))
    told = told.replace("CLASSES", ", ".join(described["classes"]))
    if (staged / TENSORS).exists():
        told = classifier_folder.HUB + told
        if recipe.data.tokenizer:
            classifier_folder.write_tokenizer(Path(recipe.data.tokenizer), staged, longest)
    card.write_text(told, "utf-8")


def _trained(staged: Path, arm: Path, dataset: Dataset) -> Logits:
    """(N, C): what the trained student answers, where its predictions hold no logits because rows
    are read in parts.
    """
    student = Adapter(_student(_described(staged), arm / run_files.WEIGHTS))
    rows = to_device(dataset.splits["test"], "test", None, frozenset(), torch.device("cpu"))
    return predictions.sequence_logits(student, rows)


def is_whole(folder: Path, forms_table: Export) -> bool:
    """Whether a folder holds an artefact with all its files, in just the forms of `[export]`.

    StoreError if a file is not the one that was exported.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.get(SCRIPTED) is None:  # its run.py was never asked
        return False
    if manifest.get("export", Export().model_dump()) != forms_table.model_dump():
        return False
    return is_complete(folder, manifest)


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
        text = (resources.files("raykd.deploy") / "card" / card).read_text("utf-8")
        (folder / name).write_text(text.replace("STUDENT", title), "utf-8")


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: bytes and sha256} of every file in a folder."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _write_student(
    recipe: Recipe, dataset: Dataset, staged: Path, trained: Logits
) -> dict[str, Any]:
    """Write the ONNX file; what the manifest says of it.

    It takes the place of a rounded student's weights. A student in full precision keeps these, and
    only these where ONNX cannot hold it.
    """
    quant = recipe.quant
    try:
        file, is_free = _onnx_of(staged, dataset)
        (staged / ONNX).write_bytes(file)
        if quant is None:
            compare(trained, _onnx_logits(staged, dataset.splits["test"]), SAME, ONNX)
    except (RecipeError, GateError) as error:
        if quant is not None:
            raise
        (staged / ONNX).unlink(missing_ok=True)
        return {"needs_raykd": _why(error)}
    if quant is None:
        return {"free_steps": is_free}
    tensors = sizes.tensors_of(load_artefact(staged).module)
    (staged / WEIGHTS).unlink()
    refs = {"teacher": recipe.teacher, "fp32 student": recipe.student.bare}
    others = {
        name: models.build_model(ref, **dataset.shape, key=name)
        for name, ref in refs.items()
        if ref
    }
    row = torch.from_numpy(dataset.splits["test"].inputs[:1].copy())
    left = swap.left(others["fp32 student"], quant)
    return {
        "free_steps": is_free,
        "latency": latency.latency(file, others, row),
        "tensors": tensors,
        "bytes_by_kind": sizes.bytes_of(file, tensors),
        "computed_in_float32": unrounded(left, quant, others["fp32 student"]),
    }


def unrounded(left: list[swap.Left], quant: Quant, module: nn.Module) -> list[dict[str, str]]:
    """What is computed with in float32: its name, the reason, and how it is stored.

    `module` is the student in full precision.
    """
    shapes = {name: value.dim() for name, value in module.named_parameters(remove_duplicate=False)}
    rows = []
    for layer in left:
        is_matrix = shapes.get(layer.name, shapes.get(f"{layer.name}.weight", 0)) > 1
        stored = "int8" if quant.rest == "int8" and is_matrix else "float32"
        rows.append({**layer._asdict(), "stored": stored})
    return rows


def _onnx_of(staged: Path, dataset: Dataset) -> tuple[bytes, bool]:
    """The student's ONNX file, and whether it takes rows of any length.

    A student that takes one number of steps has a file of that; RecipeError if it has none.
    """
    rows = torch.from_numpy(dataset.splits["test"].inputs[:2].copy())
    while len(rows) < 2:  # the tracer takes one row for a constant
        rows = torch.cat([rows, rows])
    steps = rows.shape[1]
    if steps > 2:
        try:
            file = write_onnx.rows_to_onnx(load_artefact(staged).module, rows, free_steps=True)
            if _reads_shorter(file, load_artefact(staged), rows[:1, : steps // 2]):
                return file, True
        except RecipeError:
            pass
    return write_onnx.rows_to_onnx(load_artefact(staged).module, rows, free_steps=False), False


@torch.inference_mode()
def _reads_shorter(file: bytes, student: Adapter, row: torch.Tensor) -> bool:
    """Whether a file answers a shorter row (1, T, K) as the student does; neither may be able."""
    mask = torch.ones(row.shape[:2], dtype=torch.bool)
    try:
        trained = student(row, mask).sequence_logits().numpy()
    except Exception:  # a module of one number of steps fails in a way of its own
        return False
    session = onnx_session.session(file)
    try:
        answered = onnx_session.row_logits(session, onnx_session.feed_of(row.numpy(), mask.numpy()))
    except Exception:  # onnxruntime's errors share no class: it holds the example's length
        return False
    return bool(np.abs(trained - answered).max() <= SHORTER * max(np.abs(trained).max(), 1e-6))


def _why(error: RecipeError | GateError) -> str:
    """Why there is no ONNX file, in one line."""
    return " ".join(str(error).removeprefix("export: ").partition("; no artefact")[0].split())


def _describe_rows(staged: Path, dataset: Dataset) -> None:
    """Say in model.json how a row must look."""
    described = _described(staged)
    # of rows that are read in parts, the first of validation and test
    length = np.concatenate([rows.mask.sum(1) for rows in dataset.splits.values()])
    longest = dataset.shape["steps"]
    is_ragged = bool((length < longest).any())
    takes_any = _takes_any(staged)
    of_series = {
        "dtype": "float32",
        "axes": ["steps", "channels"],
        "channels": dataset.shape["channels"],
        "order": "the channels in the order of the training data",
        "units": "those of the training data: nothing is scaled here",
    }
    of_sentences = {"dtype": "int64", "axes": ["steps"], "tokens": len(dataset.tokens)}
    rows = of_sentences if dataset.is_sentences else of_series
    rows |= {
        "shortest": 1 if takes_any or is_ragged else longest,
        "longest": longest,
        "seen": {"shortest": int(length.min()), "longest": int(length.max())},
        "padding": "none" if takes_any else "zeros",
    }
    write_json(staged / MODEL, described | {"rows": rows})


def _card_rows(staged: Path) -> None:
    """Say in README.md how a row must look."""
    described = _described(staged)
    rows = described["rows"]
    seen = rows["seen"]
    lengths = (
        f"{rows['shortest']} to {rows['longest']}"
        if rows["shortest"] < rows["longest"]
        else f"{rows['longest']}"
    )
    filled = "nothing" if rows["padding"] == "none" else "zeros, which run.py adds"
    lines = [
        f"* **Steps**: {lengths}. Training data had {seen['shortest']} to {seen['longest']}.",
        f"* **Channels**: {rows['channels']} in each step, in the order of the training data.",
        f"* **Units**: {rows['units']}.",
        f"* **Numbers**: {rows['dtype']}, finite.",
        f"* **Filled up with**: {filled}.",
        f"* **Classes**: {', '.join(described['classes'])}.",
    ]
    card = staged / "README.md"
    told = "\n" + "\n".join(lines) + "\n"
    card.write_text(card.read_text("utf-8").replace("\nROWS\n", told), "utf-8")


def _takes_any(staged: Path) -> bool:
    """Whether the student of a folder takes rows of any length, without filling them up."""
    if (staged / ONNX).exists():
        return onnx_session.takes_any_length(onnx_session.session(staged / ONNX))
    student = load_artefact(staged)
    shape = _described(staged)
    dtype = torch.int32 if "tokens" in shape else torch.float32
    row = torch.zeros(1, max(1, shape["steps"] // 2), shape["channels"], dtype=dtype)
    try:
        with torch.inference_mode():
            student(row, torch.ones(row.shape[:2], dtype=torch.bool))
    except Exception:  # a module of one number of steps fails in a way of its own
        return False
    return True


def load_artefact(folder: Path, *, allow_import: Collection[str] = ()) -> Adapter:
    """The student of an artefact folder in full precision, in eval mode.

    Called with inputs (B, T, K) and a mask (B, T), it gives the `Signals` of its model. A rounded
    student is executed by onnxruntime: see run.py beside it, or `unpack_artefact`. StoreError if a
    file is not the one that the folder's manifest names.

    A model of the user's own is imported from the current directory, or from the installed packages
    that `allow_import` names; RecipeError for any other.

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
    check_files(folder)
    imports.permit(allow_import)
    weights = WEIGHTS if (folder / WEIGHTS).exists() else TENSORS
    return Adapter(_student(_described(folder), folder / weights)).eval()


def unpack_artefact(folder: Path, *, allow_import: Collection[str] = ()) -> Adapter:
    """The rounded student of an artefact folder with a packed file, in eval mode.

    It answers as the trained student. StoreError if the file is damaged. `allow_import` is that of
    `load_artefact`.

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
    check_files(folder)
    imports.permit(allow_import)
    module = _built(_described(folder))
    packed.read((folder / forms.FILES["packed"]).read_bytes(), module)
    return Adapter(module).eval()


def _described(folder: Path) -> dict[str, Any]:
    """The model.json of an artefact folder. StoreError if it describes no model."""
    path = folder / MODEL
    described = read_json(path)
    wrong = ["all"] if not isinstance(described, dict) else []
    wrong = wrong or [
        name for name, kind in DESCRIBED.items() if not isinstance(described.get(name), kind)
    ]
    if wrong:
        raise StoreError(
            f"{path} is damaged: {', '.join(wrong)} missing or of another kind; put it back as it "
            f"was, or delete {folder} and type: raykd export RECIPE"
        )
    return described


def _built(described: Mapping[str, Any]) -> nn.Module:
    """The module that a model.json describes, in full precision and untrained."""
    ref = StudentRef(model=described["model"], settings=described["settings"])
    shape = {
        "channels": described["channels"],
        "steps": described["steps"],
        "classes": len(described["classes"]),
        "tokens": described.get("tokens"),
    }
    return models.build_model(ref, **shape, key="artefact")


def _student(described: Mapping[str, Any], weights: Path) -> nn.Module:
    """The module that a model.json describes, with trained weights, rounded as its last phase."""
    module = _built(described)
    quant = described.get("quant")
    if quant:
        phases.round_as(module, Quant.model_validate(quant))
    # transformers names a tensor by its own model, which lies in the student
    if weights.name == TENSORS and isinstance(module, TransformersClassifier):
        models.load_weights(module.model, weights, "artefact")
    else:
        models.load_weights(module, weights, "artefact")
    return module


def predict(folder: Path, rows: Rows) -> Predictions:
    """The artefact's predictions of test rows, as its run.py answers each."""
    if "rows" in _described(folder):
        return of_logits(rows, own_script.row_logits(folder, rows))
    if (folder / ONNX).exists():  # of an older export, whose script takes no rows of their own
        return of_logits(rows, _onnx_logits(folder, rows))
    return predictions.of_model(
        load_artefact(folder),
        rows,
        to_device(rows, "test", None, frozenset(), torch.device("cpu")),
    )


def _onnx_logits(folder: Path, rows: Rows) -> Logits:
    """(N, C): what the ONNX file answers in the batches of an evaluation."""
    return onnx_session.sequence_logits(folder / ONNX, rows, predictions.EVAL_BATCH)


def _model(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    quant = recipe.quant
    described = {"model": recipe.student.model, "settings": recipe.student.settings}
    described |= {"quant": quant.model_dump(mode="json") if quant else None}
    return described | dataset.shape | {"classes": list(dataset.classes)}


def _parity(
    staged: Path,
    arm: Path,
    dataset: Dataset,
    trained: Logits,
    answered: Logits,
    quant: Quant | None,
) -> Parity:
    """How far the artefact's logits (N, C) are from the trained student's on the test split.

    `answered` are those of run.py, which reads row by row. Where activations are rounded over a
    call, these are held against the student as it reads row by row, and the file against it in the
    batches of an evaluation. GateError if they are too far.
    """
    where = f"{len(trained)} test rows"
    if not (staged / ONNX).exists():
        return _same(trained, answered, where)
    bar = bar_of(quant) if quant else SAME
    if quant is None or not quant.over_the_call:
        parity = compare(trained, answered, bar, f"{where}, as run.py answers them")
        together = _onnx_logits(staged, dataset.splits["test"]) if quant else answered
    else:
        together = _onnx_logits(staged, dataset.splits["test"])
        parity = compare(trained, together, bar, where)
        few = dataset.splits["test"].take(slice(0, ALONE))
        student = Adapter(_student(_described(staged), arm / run_files.WEIGHTS)).eval()
        alone = _row_by_row(student, few, takes_any=_takes_any(staged))
        by_script = f"{len(few)} test rows, each alone, as run.py answers them"
        compare(alone, answered[: len(few)], bar, by_script)
    same = answered.argmax(1) == together.argmax(1)
    return parity | {"alone_agreement": float(same.mean())}


@torch.inference_mode()
def _row_by_row(student: Adapter, rows: Rows, *, takes_any: bool) -> Logits:
    """(N, C): the student's logits of rows that it reads one by one, without what fills them up."""
    logits = []
    for row, mask in zip(rows.inputs, rows.mask, strict=True):
        last = int(np.flatnonzero(mask)[-1]) + 1 if takes_any else len(mask)
        inputs = torch.from_numpy(row[None, :last].copy())
        answer = student(inputs, torch.from_numpy(mask[None, :last].copy()))
        logits.append(answer.sequence_logits().float().numpy())
    return np.concatenate(logits)


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
    name = next(name for name in (ONNX, WEIGHTS, TENSORS) if name in files)
    onnx_format = f"onnx {quant.weights if quant else 'fp32'}"
    return {
        "schema": 1,
        "format": onnx_format if name == ONNX else FORMAT,
        "seed": seed,
        "bytes": files[name]["bytes"],
        "parity": parity,
        SCRIPTED: "run.py",
        "files": files,
    }
