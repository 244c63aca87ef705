"""The other forms of a student that `[export]` asks for, each compared with the trained student.

    stream   student.stream.onnx          onnx/write_stream: a window read step by step
    packed   student.packed.safetensors   packed: a rounded student in the fewest bytes
    pte      student.pte                  pte: an ExecuTorch program, one window per call
    gguf     student.gguf                 gguf/write: a language model for llama.cpp

Each of the first three is opened again and answers all test rows. GateError if it misses the bar
of its arithmetic. `text_artefact` writes the last.
"""

from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd.data.rows import Rows
from raykd.deploy import packed, pte
from raykd.deploy.gguf import write as write_gguf
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write_stream
from raykd.deploy.onnx.stream import StreamReader
from raykd.deploy.parity import BLOCKS, Parity, bar_of, compare
from raykd.errors import Problem, RecipeError
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Export
from raykd.training import phases, predictions
from raykd.training.device_rows import to_device

FILES = {
    "stream": "student.stream.onnx",
    "packed": "student.packed.safetensors",
    "pte": "student.pte",
    "gguf": "student.gguf",
}
ROWS = {  # what rows a form is of
    "stream": ("series",),
    "packed": ("series", "sentences"),
    "pte": ("series",),
    "gguf": ("text",),
}

Logits = NDArray[np.float32]
Module = Callable[[], nn.Module]  # gives a new one at each call, because writing a form changes it


def asked(export: Export) -> list[str]:
    """The forms that a table asks for."""
    return [form for form in FILES if getattr(export, form)]


def check(export: Export, module: nn.Module, quant: Quant | None, *, kind: str = "series") -> None:
    """RecipeError, with the key of each fault, if a student has no such form.

    `quant` is that of its last phase, `kind` what its rows are: series, text or sentences.
    """
    problems = [
        Problem(f"export.{form}", f"is of rows of {' or '.join(ROWS[form])}; write false")
        for form in asked(export)
        if kind not in ROWS[form]
    ]
    if problems:
        raise RecipeError(problems)
    if export.gguf and find_spec("gguf") is None:
        problems.append(Problem("export.gguf", "needs gguf; type: pip install 'raykd[gguf]'"))
    if export.gguf:
        problems += _refused("gguf", lambda: _check_gguf(module, quant))
    if export.stream:
        problems += _refused("stream", lambda: write_stream.check(module))
    if export.packed and quant is None:
        what = (
            "this student is not rounded, and student.safetensors holds it; "
            "write packed = false, or a last phase with a quant"
        )
        problems.append(Problem("export.packed", what))
    if export.pte and quant is not None:
        problems += _refused("pte", lambda: pte.check(quant))
    if export.pte and find_spec("executorch") is None:
        problems.append(
            Problem("export.pte", "needs executorch; type: pip install 'raykd[executorch]'")
        )
    if problems:
        raise RecipeError(problems)


def write(
    export: Export,
    folder: Path,
    rows: Rows,
    trained: Logits,
    quant: Quant | None,
    student: Module,
    plain: Module,
) -> dict[str, Parity]:
    """Write each form into a folder, and how to use it into README.md there; {file: its parity}.

    `trained` (N, C) are the trained student's sequence logits of the test `rows`. `student` gives
    that student, rounded as in its last phase, and `plain` the module as its model builds it.
    """
    parity = {}
    for form in asked(export):
        path = folder / FILES[form]
        if form == "stream":
            path.write_bytes(write_stream.to_onnx(_encoder(student())))
            parity[path.name] = _stream_parity(path, rows, trained, quant, student)
        elif form == "packed":
            path.write_bytes(packed.write(student()))
            answers = _packed_logits(path, rows, plain())
            parity[path.name] = compare(trained, answers, bar_of(quant), _where(rows, path.name))
        else:
            path.write_bytes(_program(student(), torch.from_numpy(rows.inputs[:1].copy()), quant))
            # XNNPACK rounds activations in a way of its own, also those of students that were
            # trained with float ones.
            bar = BLOCKS if quant else bar_of(None)
            answers = _program_logits(path, rows)
            parity[path.name] = compare(trained, answers, bar, _where(rows, path.name))
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            told = resources.files("raykd.deploy") / "card" / f"{form}.md"
            card.write("\n" + told.read_text("utf-8"))
    return parity


def _where(rows: Rows, name: str) -> str:
    """Which rows a form is compared on, as an error names them."""
    return f"{len(rows)} test rows, as {name} answers them"


def _stream_parity(
    path: Path, rows: Rows, trained: Logits, quant: Quant | None, student: Module
) -> Parity:
    """The parity of whole windows, and of reading step by step: `step_agreement`.

    Where activations of a call share a range, a single step is compared with the module that reads
    the same steps, else with the trained student.
    """
    bar = bar_of(quant)
    whole = _stream_logits(path, rows, rows.inputs.shape[1])
    parity = compare(trained, whole, bar, _where(rows, path.name))
    by_step = _stream_logits(path, rows, 1)
    expected = trained
    if quant is not None and quant.over_the_call:
        expected = _step_logits(_encoder(student()), rows)
    compare(expected, by_step, bar, _where(rows, f"{path.name}, step by step,"))
    return parity | {"step_agreement": float((trained.argmax(1) == by_step.argmax(1)).mean())}


def _stream_logits(path: Path, rows: Rows, count: int) -> Logits:
    """(N, C): what a stream answers on all rows, `count` steps per call."""
    logits = []
    for batch in _batches(rows):
        reader = StreamReader(path, rows=len(batch))
        answers = [
            reader.step(batch.inputs[:, first : first + count])["logits"]
            for first in range(0, batch.inputs.shape[1], count)
        ]
        logits.append(onnx_session.mean_over(np.concatenate(answers, 1), batch.mask))
    return np.concatenate(logits)


@torch.inference_mode()
def _step_logits(module: write_stream.SeriesEncoder, rows: Rows) -> Logits:
    """(N, C): what the module answers on all rows, one step per call."""
    step = write_stream.StreamStep(module)
    logits = []
    for batch in _batches(rows):
        inputs = torch.from_numpy(batch.inputs.copy())
        state = write_stream.empty(module, len(batch))
        answers = []
        for i in range(inputs.shape[1]):
            answer, _, tail, *keys_and_values = step(inputs[:, i : i + 1], *state)
            half = len(keys_and_values) // 2
            state = (tail, keys_and_values[:half], keys_and_values[half:])
            answers.append(answer)
        logits.append(onnx_session.mean_over(torch.cat(answers, 1).numpy(), batch.mask))
    return np.concatenate(logits)


def _batches(rows: Rows) -> list[Rows]:
    """Batches of EVAL_BATCH rows, as in every evaluation: activation scales may depend on them."""
    return [
        rows.take(slice(first, first + predictions.EVAL_BATCH))
        for first in range(0, len(rows), predictions.EVAL_BATCH)
    ]


def _packed_logits(path: Path, rows: Rows, module: nn.Module) -> Logits:
    """(N, C): what a packed student answers on all rows; `module` takes it up."""
    packed.read(path.read_bytes(), module)
    device_rows = to_device(rows, "test", None, frozenset(), torch.device("cpu"))
    return predictions.sequence_logits(Adapter(module), device_rows)


def _program(module: nn.Module, example: Tensor, quant: Quant | None) -> bytes:
    return pte.lower(module, example) if quant is None else pte.to_pte(module, example, quant)


def _program_logits(path: Path, rows: Rows) -> Logits:
    """(N, C): what a program answers on all rows, one row per call."""
    program = pte.load(path.read_bytes())
    answers = [program(torch.from_numpy(row[None].copy()))[0].numpy() for row in rows.inputs]
    return onnx_session.mean_over(np.concatenate(answers), rows.mask)


def _check_gguf(module: nn.Module, quant: Quant | None) -> None:
    """RecipeError if llama.cpp has no blocks for a student of this shape."""
    assert isinstance(module, Llama)
    shaped = Llama(**module.settings)
    if quant is not None:
        phases.round_as(shaped, quant)
    write_gguf.check(shaped)


def _encoder(module: nn.Module) -> write_stream.SeriesEncoder:
    write_stream.check(module)
    assert isinstance(module, write_stream.SeriesEncoder)
    return module


def _refused(form: str, checked: Callable[[], None]) -> list[Problem]:
    """The problems that a form's own check finds, under its key."""
    key = f"export.{form}"
    try:
        checked()
    except RecipeError as error:
        return [
            problem if problem.key else Problem(key, problem.message) for problem in error.problems
        ]
    return []
