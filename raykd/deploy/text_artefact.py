"""The deployable language model: a folder that is whole or absent, with what it takes to run it and
proof that it does.

student.onnx     codes and scales, keys and values in and out, for stock onnxruntime
model.json       the model's settings and its Quant
tokenizer.json   where it is given: byte-level BPE
student.gguf     where it is asked for: the same codes, for llama.cpp
run.py           loads them and continues a prompt
README.md        a model card to fill in
manifest.json    bytes and sha256 of each file, the parity that was measured, bytes by kind
"""

import copy
from collections.abc import Mapping
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
from raykd.deploy import sizes
from raykd.deploy.artefact import ONNX, copy_cards, files_of
from raykd.deploy.forms import FILES
from raykd.deploy.gguf import write as write_gguf
from raykd.deploy.onnx import write_decoder
from raykd.deploy.onnx.decoder import Decoder, OnnxReader
from raykd.deploy.parity import bar_of, gate
from raykd.errors import DataError, RecipeError
from raykd.files.atomic import whole_folder, write_bytes, write_json
from raykd.generation import judge_drafter
from raykd.generation.acceptance import Acceptance
from raykd.generation.own_rows import TextShape
from raykd.models.llama import Llama
from raykd.quant import swap
from raykd.recipe.drafter import Drafter
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Recipe
from raykd.training import phases, run_files
from raykd.training.arms import best_seed
from raykd.training.predictions import Predictions, TestPlaces

LEAST, MOST = 1000, 32  # positions that an artefact is judged on, and rows that they stand in
ROWS = 8  # to a call
ALONE = 2  # rows that are read token by token beside whole ones


def export(recipe: Recipe, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Write `artefact/` of a run over text, with its answers on the test rows beside, and give its
    manifest: `export_decoder` of the best seed's student.
    """
    # the answers of an artefact that is about to go
    (folder / run_files.ARTEFACT_ANSWERS).unlink(missing_ok=True)
    seed = best_seed(recipe, folder)
    weights = run_files.student(folder, seed) / run_files.WEIGHTS
    module = check(models.build_model(recipe.student.bare, **dataset.shape, key="student"), recipe)
    if quant := recipe.quant:
        phases.round_as(module, quant)
    models.load_weights(module, weights, "student")
    target, title = run_files.artefact(folder), f"{recipe.name} ({recipe.technique})"
    path = Path(recipe.data.tokenizer) if recipe.data.tokenizer else None
    tokens, asked = _judged(dataset.splits["test"]), recipe.export
    noted = {"seed": seed, "export": asked.model_dump()}
    manifest = export_decoder(
        module,
        target,
        tokens=tokens,
        title=title,
        tokenizer=path,
        gguf=asked.gguf,
        end=recipe.data.end,
        noted=noted,
    )
    if how := recipe.drafter:
        _drafts(target, recipe, dataset, how).write(folder / run_files.DRAFTS)
    predict(target, dataset).write(folder / run_files.ARTEFACT_ANSWERS)
    write_bytes(folder / run_files.STUDENT, weights.read_bytes())
    return manifest


def _drafts(folder: Path, recipe: Recipe, dataset: Dataset, how: Drafter) -> Acceptance:
    """How the file itself does as the teacher's drafter."""
    assert recipe.teacher is not None
    module = models.build_model(recipe.teacher, **dataset.shape, key="teacher").eval()
    teacher, drafter = (
        judge_drafter.reader(module, "teacher"),
        OnnxReader(Decoder(folder / ONNX, rows=1)),
    )
    text = TextShape(
        dataset.shape["steps"], dataset.classes.index(recipe.data.end), len(dataset.classes)
    )
    test = dataset.splits["test"]
    return judge_drafter.judge(
        teacher, drafter, test, how, text, judge_drafter.teacher_texts(teacher, test, how, text)
    )


def check(module: nn.Module, recipe: Recipe) -> Llama:
    """The module, if it is one that can be exported with the recipe's tokeniser.

    RecipeError otherwise.
    """
    if not isinstance(module, Llama):
        raise RecipeError(
            f"student.model: a {type(module).__name__} has no form that writes text; "
            'use "llama", or stop at raykd train'
        )
    _check_tokenizer(module, Path(str(recipe.data.tokenizer)))
    return module


def predict(folder: Path, dataset: Dataset) -> Predictions:
    """The artefact's predictions of the test split, whose rows hold one document each."""
    rows, parts, decoder = dataset.splits["test"], [], Decoder(folder / ONNX)
    for first in range(0, len(rows), ROWS):
        part = rows.take(slice(first, first + ROWS))
        decoder.reset(len(part))
        z = decoder.step(part.inputs[..., 0].astype(np.int64))[part.mask].astype(np.float64)
        log_q = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        true = part.label[part.mask]
        own = np.take_along_axis(log_q, true.clip(min=0)[:, None], 1)[:, 0]
        parts.append((z.argmax(1), np.where(true >= 0, own, np.nan).astype(np.float32)))
    answer, log_q = (np.concatenate(values) for values in zip(*parts, strict=True))
    places = TestPlaces.of(rows)
    return Predictions(places.place, places.label, answer, log_q)


def _judged(rows: Rows) -> Tensor:
    """(N, T) tokens of a split whose rows hold one document: its beginnings of one length, as many
    as there can be.
    """
    steps = np.arange(1, rows.mask.shape[1] + 1)
    length = np.where(rows.mask, steps, 0).max(1)
    most = np.maximum(MOST, -(-LEAST // np.maximum(steps - 1, 1)))
    held = np.minimum((length[:, None] >= steps).sum(0), most)
    best = int((held * (steps - 1)).argmax())
    return torch.from_numpy(
        rows.inputs[length > best][: most[best], : best + 1, 0].astype(np.int64)
    )


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
    """Write the folder of a Llama, its layers rounded or not, and give its manifest. The module is
    not changed.

    With `gguf` a file for llama.cpp stands beside, with the same codes; `end` is the tokeniser's
    token that ends a text. What is `noted` goes into the manifest.

    `tokens` (N, T) int64 is text that it was not trained on. GateError, and no folder, where the
    file answers otherwise; DataError for too few tokens, RecipeError where the tokeniser is another
    or the module has no ONNX form.
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
        name = f"onnx {quant.weights}" if quant else "onnx fp32"
        manifest = {"schema": 1, "format": name, "bytes": len(file), "files": files_of(staged)}
        manifest |= {"parity": _parity(trained, staged / ONNX, tokens, quant), "tensors": tensors}
        manifest |= {
            "bytes_by_kind": sizes.bytes_of(file, tensors),
            "computed_in_float32": _left(trained, quant),
        }
        manifest |= noted
        write_json(staged / run_files.MANIFEST, manifest)
    return manifest


def _check(module: Llama, tokens: Tensor, tokenizer: Path | None) -> None:
    rows, count = tokens.shape[:2]
    steps = module.settings["steps"]
    if tokens.dim() != 2 or not 2 <= count <= steps or rows * (count - 1) < LEAST:
        raise DataError(
            f"tokens: {rows} rows of {count}; give rows of 2 to {steps}, with {LEAST:,} tokens that follow another"
        )
    if tokenizer is not None:
        _check_tokenizer(module, tokenizer)


def _check_tokenizer(module: Llama, path: Path) -> None:
    found, classes = len(byte_bpe.read(path).tokens), module.settings["classes"]
    if found != classes:
        raise RecipeError(
            f"tokenizer {path}: {found} tokens, and the model has {classes} classes; name its own"
        )


def _quant(module: Llama) -> Quant | None:
    """The Quant that the module's rounded layers share."""
    found = [layer.quant for _, layer in swap.quantised(module) if layer.quant is not None]
    assert all(quant == found[0] for quant in found), "layers under different Quants"
    return found[0] if found else None


def _model(module: Llama, quant: Quant | None) -> dict[str, Any]:
    described = {"model": "raykd.models.llama:Llama", "settings": module.settings}
    return described | {"quant": quant.model_dump(mode="json") if quant else None}


def _left(module: Llama, quant: Quant | None) -> list[dict[str, Any]]:
    if quant is None:
        return []
    with torch.device("meta"):
        return [each._asdict() for each in swap.left(Llama(**module.settings), quant)]


class Read(NamedTuple):
    """What was answered at each position:

    (N, T) decisions, (N, T - 1) log-probabilities of what followed there.
    """

    decided: NDArray[np.int64]
    following: NDArray[np.float64]


def _parity(trained: Llama, file: Path, tokens: Tensor, quant: Quant | None) -> dict[str, Any]:
    """Module and file over the same tokens in the same calls. GateError if apart.

    Rows are read in two calls, the cache between them. Where activations are rounded over a call,
    one flip at a tie may move the range of all that is in it; there each token is read by itself,
    as a text is written.
    """
    held, count = tokens.numpy(), tokens.shape[1]
    halves, singly = [0, count // 2, count], list(range(count + 1))
    by_call = quant is not None and quant.over_the_call
    together, cuts = (1, singly) if by_call else (ROWS, halves)
    apart, largest = [], 0.0
    reads: dict[str, list[Read]] = {"trained": [], "artefact": []}
    for first in range(0, len(held), together):
        rows = held[first : first + together]
        wanted, found = _of_module(trained, rows, cuts), _of_file(file, rows, cuts)
        apart.append(np.abs(found - wanted).max(-1).ravel())
        largest = max(largest, float(np.abs(wanted).max()))
        reads["trained"].append(_read(wanted, rows))
        reads["artefact"].append(_read(found, rows))
    each = np.concatenate(apart)
    decided = {
        name: np.concatenate([part.decided for part in parts]) for name, parts in reads.items()
    }
    agreement = float((decided["trained"] == decided["artefact"]).mean())
    gate(each / largest, agreement, bar_of(quant), f"{each.size} tokens")
    alone = np.concatenate([_of_file(file, row[None], singly) for row in held[:ALONE]]).argmax(-1)
    among = _of_file(file, held[:ROWS], halves)[:ALONE].argmax(-1)
    return {
        "positions": each.size,
        "max_abs_diff": float(each.max()),
        "relative": float(each.max()) / largest,
        "agreement": agreement,
        "alone_agreement": float((alone == among).mean()),
        "nll": {
            name: -float(np.concatenate([p.following for p in parts]).mean())
            for name, parts in reads.items()
        },
        "accuracy": {
            name: float((found[:, :-1] == held[:, 1:]).mean()) for name, found in decided.items()
        },
    }


def _of_module(module: Llama, rows: NDArray[np.int64], cuts: list[int]) -> NDArray[np.float32]:
    """(B, T, V): the module's logits with its cache, in calls between the cuts."""
    cache, ids = module.cache(len(rows)), torch.from_numpy(rows)
    with torch.inference_mode():
        return torch.cat(
            [module(ids[:, a:b], cache)["logits"] for a, b in pairwise(cuts)], 1
        ).numpy()


def _of_file(file: Path, rows: NDArray[np.int64], cuts: list[int]) -> NDArray[np.float32]:
    """(B, T, V): the file's logits, in the same calls."""
    decoder = Decoder(file, rows=len(rows))
    return np.concatenate([decoder.step(rows[:, a:b]) for a, b in pairwise(cuts)], 1)


def _read(logits: NDArray[np.float32], rows: NDArray[np.int64]) -> Read:
    before = logits[:, :-1].astype(np.float64)
    before -= before.max(-1, keepdims=True)
    following = np.take_along_axis(before, rows[:, 1:, None], -1)[..., 0] - np.log(
        np.exp(before).sum(-1)
    )
    return Read(logits.argmax(-1), following)
