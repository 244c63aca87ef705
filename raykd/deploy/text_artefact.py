"""The deployable language model: a folder with what it takes to run it, whole or absent.

student.onnx     codes and scales, keys and values in and out, for stock onnxruntime
model.json       the model's settings and its Quant
tokenizer.json   byte-level BPE, if there is one
student.gguf     if `[export]` asks for it: the same codes, for llama.cpp
run.py           loads them and continues a prompt
README.md        a model card to fill in
manifest.json    bytes and sha256 of each file, the measured parity, bytes by kind
"""

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd import models
from raykd.data import Dataset, Rows, byte_bpe
from raykd.deploy import own_script, sizes
from raykd.deploy.artefact import ONNX, SCRIPTED, copy_cards, files_of, unrounded
from raykd.deploy.forms import FILES
from raykd.deploy.gguf import write as write_gguf
from raykd.deploy.manifest import STUDENT
from raykd.deploy.onnx import write_decoder
from raykd.deploy.onnx.decoder import Decoder, OnnxReader
from raykd.deploy.parity import bar_of, gate
from raykd.errors import DataError, GateError, RecipeError
from raykd.files.atomic import whole_folder, write_bytes, write_json
from raykd.files.digests import file_sha256
from raykd.generation import judge_drafter
from raykd.generation.acceptance import Acceptance
from raykd.generation.own_rows import TextShape
from raykd.models.llama import Llama
from raykd.quant import swap
from raykd.recipe.drafter import Drafter
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Recipe
from raykd.training import phases, predictions, run_files
from raykd.training.arms import best_seed
from raykd.training.predictions import Predictions, TestPlaces

LEAST = 1000  # positions that an artefact is judged on, at least
MOST = 32  # rows with these positions, at most unless LEAST needs more
ROWS = 8  # per call
ALONE = 2  # rows that are also read token by token
SCRIPTED_ROWS = 16  # rows that run.py itself reads, as a process


def export(
    recipe: Recipe, dataset: Dataset, folder: Path, rest: Iterable[Rows] = ()
) -> dict[str, Any]:
    """Write `artefact/` of a run over text, its answers on the test rows beside it; its manifest.

    It is `export_decoder` of the best seed's student. With `[drafter]`, how the file does as the
    teacher's drafter is written, too. `rest` are test rows behind those of `dataset`, which are
    only answered.
    """
    # Those of an artefact that is about to be replaced.
    (folder / run_files.ARTEFACT_ANSWERS).unlink(missing_ok=True)
    seed = best_seed(recipe, folder)
    weights = run_files.student(folder, seed) / run_files.WEIGHTS
    module = check(models.build_model(recipe.student.bare, **dataset.shape, key="student"), recipe)
    if recipe.quant:
        phases.round_as(module, recipe.quant)
    models.load_weights(module, weights, "student")
    artefact = run_files.artefact(folder)
    manifest = export_decoder(
        module,
        artefact,
        tokens=_judged(dataset.splits["test"]),
        title=f"{recipe.name} ({recipe.technique})",
        tokenizer=Path(recipe.data.tokenizer) if recipe.data.tokenizer else None,
        gguf=recipe.export.gguf,
        end=recipe.data.end,
        noted={
            "seed": seed,
            "export": recipe.export.model_dump(),
            STUDENT: file_sha256(weights),
        },
    )
    if recipe.drafter:
        acceptance = _acceptance(artefact, recipe, dataset, recipe.drafter)
        acceptance.write(folder / run_files.DRAFTS)
    answers = predict(artefact, dataset.splits["test"])
    later = (predict(artefact, rows) for rows in rest)
    predictions.write_all(folder / run_files.ARTEFACT_ANSWERS, answers, later)
    write_bytes(folder / run_files.STUDENT, weights.read_bytes())
    return manifest


def _acceptance(folder: Path, recipe: Recipe, dataset: Dataset, how: Drafter) -> Acceptance:
    """How the file itself does as the teacher's drafter."""
    assert recipe.teacher is not None
    module = models.build_model(recipe.teacher, **dataset.shape, key="teacher").eval()
    teacher = judge_drafter.reader(module, "teacher")
    drafter = OnnxReader(Decoder(folder / ONNX, rows=1))
    test = dataset.splits["test"]
    shape = TextShape(
        steps=dataset.shape["steps"],
        eos=dataset.classes.index(recipe.data.end),
        vocab=len(dataset.classes),
    )
    texts = judge_drafter.teacher_texts(teacher, test, how, shape)
    return judge_drafter.judge(teacher, drafter, test, how, shape, texts)


def check(module: nn.Module, recipe: Recipe) -> Llama:
    """The module, if it can be exported with the recipe's tokeniser. RecipeError otherwise."""
    if not isinstance(module, Llama):
        raise RecipeError(
            f"student.model: a {type(module).__name__} has no form that writes text; "
            'use "llama", or stop at raykd train'
        )
    _check_tokenizer(module, Path(str(recipe.data.tokenizer)))
    return module


def predict(folder: Path, rows: Rows) -> Predictions:
    """The artefact's predictions of test rows, which hold one document each."""
    decoder = Decoder(folder / ONNX)
    singly = _reads_singly(folder)
    answers: list[NDArray[np.int64]] = []
    log_q: list[NDArray[np.float32]] = []
    for tokens, mask, label in zip(rows.inputs[..., 0], rows.mask, rows.label, strict=True):
        last = int(np.flatnonzero(mask)[-1]) + 1
        z = _alone(decoder, tokens[:last], singly=singly)[mask[:last]].astype(np.float64)
        log_softmax = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        known = label[mask]
        of_label = np.take_along_axis(log_softmax, known.clip(min=0)[:, None], 1)[:, 0]
        answers.append(z.argmax(1))
        log_q.append(np.where(known >= 0, of_label, np.nan).astype(np.float32))
    places = TestPlaces.of(rows)
    return Predictions(places.place, places.label, np.concatenate(answers), np.concatenate(log_q))


def _reads_singly(folder: Path) -> bool:
    """Whether run.py reads a text token by token, as its model.json says."""
    return json.loads((folder / "model.json").read_bytes()).get("reads_singly", False)


def _alone(decoder: Decoder, tokens: NDArray[np.integer], *, singly: bool) -> NDArray[np.float32]:
    """(T, V): the logits after each token of one text (T,), in the calls that run.py makes."""
    decoder.reset(1)
    cuts = range(len(tokens) + 1) if singly else (0, len(tokens))
    return np.concatenate([decoder.step(tokens[None, a:b])[0] for a, b in pairwise(cuts)])


def _script_rows(folder: Path, texts: NDArray[np.int64]) -> int:
    """How many texts run.py has read as a process, with each decision that of the file.

    GateError if one differs.
    """
    few = texts[:SCRIPTED_ROWS]
    decoder = Decoder(folder / ONNX)
    singly = _reads_singly(folder)
    expected = [_alone(decoder, row, singly=singly).argmax(-1) for row in few]
    with tempfile.TemporaryDirectory(prefix="raykd-") as place:
        given = Path(place, "texts.npz")
        np.savez(given, **{f"text{number}": row for number, row in enumerate(few)})
        limit = own_script.LEAST_S + own_script.ROW_S * few.size
        printed = own_script.run(folder, "--next", given, limit_s=limit)
    decided = [list(map(int, line.split())) for line in printed.splitlines()]
    if decided != [row.tolist() for row in expected]:
        raise GateError(
            f"export: run.py decides otherwise than was measured, on {len(few)} texts; "
            "no artefact was written"
        )
    return len(few)


def _judged(rows: Rows) -> Tensor:
    """(N, T) tokens of a split whose rows hold one document: beginnings of rows, of one length.

    The length is the one that gives the most positions.
    """
    steps = np.arange(1, rows.mask.shape[1] + 1)
    length = np.where(rows.mask, steps, 0).max(1)
    most = np.maximum(MOST, -(-LEAST // np.maximum(steps - 1, 1)))
    count = np.minimum((length[:, None] >= steps).sum(0), most)  # rows of each length
    best = int((count * (steps - 1)).argmax())
    long_enough = rows.inputs[length > best][: most[best]]
    return torch.from_numpy(long_enough[:, : best + 1, 0].astype(np.int64))


def export_decoder(
    module: Llama,
    folder: Path,
    *,
    tokens: Tensor,
    title: str = "Student",
    tokenizer: Path | None = None,
    gguf: bool = False,
    end: str = "<|endoftext|>",
    noted: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write the folder of a Llama, its layers rounded or not; its manifest.

    The module is not changed. `tokens` (N, T) int64 is text that it was not trained on. With `gguf`
    a file for llama.cpp is added, with the same codes; `end` is the tokeniser's token that ends a
    text. `noted` goes into the manifest.

    GateError, and no folder, if the file answers otherwise than the module; DataError for too few
    tokens; RecipeError if the tokeniser is another's, or the module has no ONNX form.
    """
    tokens = tokens.cpu()
    _check(module, tokens, tokenizer)
    trained = copy.deepcopy(module).cpu().eval()
    quant = _quant(trained)
    with whole_folder(folder) as staged:
        tensors = sizes.tensors_of(trained)
        file = write_decoder.to_onnx(copy.deepcopy(trained))
        (staged / ONNX).write_bytes(file)
        write_json(staged / "model.json", _model(trained, quant))
        if tokenizer is not None:
            (staged / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        copy_cards(staged, title, run="run_lm.py", readme="README_lm.md")
        if gguf:
            write_gguf.write(trained, staged / FILES["gguf"], tokenizer=tokenizer, end=end)
        manifest = {
            "schema": 1,
            "format": f"onnx {quant.weights}" if quant else "onnx fp32",
            "bytes": len(file),
            "files": files_of(staged),
            "parity": _parity(trained, staged / ONNX, tokens, quant),
            "tensors": tensors,
            "bytes_by_kind": sizes.bytes_of(file, tensors),
            "computed_in_float32": _left(trained, quant),
            SCRIPTED: "run.py",
            "rows_run": _script_rows(staged, tokens.numpy()),
        }
        manifest |= noted
        write_json(staged / run_files.MANIFEST, manifest)
    return manifest


def _check(module: Llama, tokens: Tensor, tokenizer: Path | None) -> None:
    rows, count = tokens.shape[:2]
    steps = module.settings["steps"]
    if tokens.dim() != 2 or not 2 <= count <= steps or rows * (count - 1) < LEAST:
        raise DataError(
            f"tokens: {rows} rows of {count}; give rows of 2 to {steps}, "
            f"with {LEAST:,} tokens that follow another"
        )
    if tokenizer is not None:
        _check_tokenizer(module, tokenizer)


def _check_tokenizer(module: Llama, path: Path) -> None:
    tokens = len(byte_bpe.read(path).tokens)
    classes = module.settings["classes"]
    if tokens != classes:
        raise RecipeError(
            f"tokenizer {path}: {tokens} tokens, and the model has {classes} classes; name its own"
        )


def _quant(module: Llama) -> Quant | None:
    """The Quant that the module's rounded layers share."""
    quants = [layer.quant for _, layer in swap.quantised(module) if layer.quant is not None]
    assert all(quant == quants[0] for quant in quants), "layers under different Quants"
    return quants[0] if quants else None


def _model(module: Llama, quant: Quant | None) -> dict[str, Any]:
    described = {"model": "raykd.models.llama:Llama", "settings": module.settings}
    described |= {"quant": quant.model_dump(mode="json") if quant else None}
    # Activations of a call share a range: a text that is read at once would see its own end.
    return described | {"reads_singly": quant is not None and quant.over_the_call}


def _left(module: Llama, quant: Quant | None) -> list[dict[str, Any]]:
    if quant is None:
        return []
    with torch.device("meta"):
        plain = Llama(**module.settings)
        return unrounded(swap.left(plain, quant), quant, plain)


class _Answers(NamedTuple):
    """What was answered at each position of rows (N, T)."""

    decided: NDArray[np.int64]  # (N, T): the likeliest token
    following: NDArray[np.float64]  # (N, T - 1): log-probabilities of the tokens that followed


def _parity(trained: Llama, file: Path, tokens: Tensor, quant: Quant | None) -> dict[str, Any]:
    """Module and file compared over the same tokens in the same calls. GateError if they differ.

    Rows are read in two calls, with the cache between them. Where activations are rounded over a
    call, one flip at a tie may move the range of everything in that call. There each token is read
    by itself, as a text is written.
    """
    texts = tokens.numpy()
    count = tokens.shape[1]
    halves = [0, count // 2, count]
    singly = list(range(count + 1))
    by_call = quant is not None and quant.over_the_call
    batch = 1 if by_call else ROWS
    cuts = singly if by_call else halves
    differences: list[NDArray[np.float32]] = []
    largest = 0.0
    answers: dict[str, list[_Answers]] = {"trained": [], "artefact": []}
    for first in range(0, len(texts), batch):
        rows = texts[first : first + batch]
        of_module = _module_logits(trained, rows, cuts)
        of_file = _file_logits(file, rows, cuts)
        differences.append(np.abs(of_file - of_module).max(-1).ravel())
        largest = max(largest, float(np.abs(of_module).max()))
        answers["trained"].append(_answers(of_module, rows))
        answers["artefact"].append(_answers(of_file, rows))
    difference = np.concatenate(differences)
    decided = {
        name: np.concatenate([batch.decided for batch in batches])
        for name, batches in answers.items()
    }
    following = {
        name: np.concatenate([batch.following for batch in batches])
        for name, batches in answers.items()
    }
    agreement = float((decided["trained"] == decided["artefact"]).mean())
    gate(difference / largest, agreement, bar_of(quant), f"{difference.size} tokens")
    alone = np.concatenate([_file_logits(file, row[None], singly) for row in texts[:ALONE]])
    among = _file_logits(file, texts[:ROWS], halves)[:ALONE]
    return {
        "positions": difference.size,
        "max_abs_diff": float(difference.max()),
        "relative": float(difference.max()) / largest,
        "agreement": agreement,
        "alone_agreement": float((alone.argmax(-1) == among.argmax(-1)).mean()),
        "nll": {name: -float(log_p.mean()) for name, log_p in following.items()},
        "accuracy": {
            name: float((tokens[:, :-1] == texts[:, 1:]).mean()) for name, tokens in decided.items()
        },
    }


def _module_logits(module: Llama, rows: NDArray[np.int64], cuts: list[int]) -> NDArray[np.float32]:
    """(B, T, V): the module's logits with its cache, in calls between the cuts."""
    cache = module.cache(len(rows))
    ids = torch.from_numpy(rows)
    with torch.inference_mode():
        logits = [module(ids[:, a:b], cache)["logits"] for a, b in pairwise(cuts)]
        return torch.cat(logits, 1).numpy()


def _file_logits(file: Path, rows: NDArray[np.int64], cuts: list[int]) -> NDArray[np.float32]:
    """(B, T, V): the file's logits, in the same calls."""
    decoder = Decoder(file, rows=len(rows))
    return np.concatenate([decoder.step(rows[:, a:b]) for a, b in pairwise(cuts)], 1)


def _answers(logits: NDArray[np.float32], rows: NDArray[np.int64]) -> _Answers:
    before = logits[:, :-1].astype(np.float64)
    before -= before.max(-1, keepdims=True)
    followed = np.take_along_axis(before, rows[:, 1:, None], -1)[..., 0]
    return _Answers(logits.argmax(-1), followed - np.log(np.exp(before).sum(-1)))
