"""The other forms of a student that a recipe's `[export]` asks for, each held against the trained
student's answers.

    stream   student.stream.onnx          `onnx.write_stream`: a window step by step packed
    student.packed.safetensors   `packed`: a rounded student in the fewest bytes, for storage pte
    student.pte                  `pte`: an ExecuTorch program, one window to a call gguf
    student.gguf                 `gguf.write`: a language model for llama.cpp (`text_artefact`)

Each of the first three is opened again and asked all test rows. GateError if it misses the bar of
its arithmetic.
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
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write_stream
from raykd.deploy.onnx.stream import StreamReader
from raykd.deploy.parity import BLOCKS, Parity, bar_of, compare
from raykd.errors import Problem, RecipeError
from raykd.models.adapter import Adapter
from raykd.recipe.quant import Quant
from raykd.recipe.recipe import Export
from raykd.training import predictions
from raykd.training.device_rows import to_device

FILES = {
    "stream": "student.stream.onnx",
    "packed": "student.packed.safetensors",
    "pte": "student.pte",
}
FILES |= {"gguf": "student.gguf"}
OF_TEXT = {"gguf"}

Logits = NDArray[np.float32]
Module = Callable[[], nn.Module]  # a new one at each call, for who writes it takes it over


def asked(export: Export) -> list[str]:
    """The forms that a table asks for."""
    return [form for form in FILES if getattr(export, form)]


def check(export: Export, module: nn.Module, quant: Quant | None, *, is_text: bool = False) -> None:
    """RecipeError, each fault with its key, if a student of this kind and last Quant has no such
    form.
    """
    wrong = [form for form in asked(export) if (form in OF_TEXT) != is_text]
    kind = "series" if is_text else "text"
    problems = [Problem(f"export.{form}", f"is of rows of {kind}; write false") for form in wrong]
    if problems:
        raise RecipeError(problems)
    if export.gguf and find_spec("gguf") is None:
        problems.append(Problem("export.gguf", "needs gguf; type: pip install 'raykd[gguf]'"))
    if export.stream:
        problems += _refused("stream", lambda: write_stream.check(module))
    if export.packed and quant is None:
        what = "this student is not rounded, and student.safetensors holds it; write packed = false, or a last phase"
        problems.append(Problem("export.packed", f"{what} with a quant"))
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
    """Write each form into a folder, and how to use it into README.md there; their parity by the
    file's name.

    `trained` (N, C) are the sequence logits of the test `rows`. `student` gives the trained module,
    rounding as its last phase does, and `plain` the module as its model builds it.
    """
    found = {}
    for form in asked(export):
        path = folder / FILES[form]
        if form == "stream":
            path.write_bytes(write_stream.to_onnx(_encoder(student())))
            found[path.name] = _stream_parity(path, rows, trained, quant, student)
        elif form == "packed":
            path.write_bytes(packed.write(student()))
            found[path.name] = compare(
                trained, _unpacked(path, rows, plain()), bar_of(quant), _where(rows, path.name)
            )
        else:
            path.write_bytes(_program(student(), torch.from_numpy(rows.inputs[:1].copy()), quant))
            # XNNPACK rounds activations in a way of its own, those of students trained with float
            # ones too
            bar = BLOCKS if quant else bar_of(None)
            found[path.name] = compare(trained, _executed(path, rows), bar, _where(rows, path.name))
        with (folder / "README.md").open("a") as card:
            card.write("\n" + (resources.files("raykd.deploy") / "card" / f"{form}.md").read_text())
    return found


def _where(rows: Rows, name: str) -> str:
    """On what a form is compared, as an error names it."""
    return f"{len(rows)} test rows, as {name} answers them"


def _stream_parity(
    path: Path, rows: Rows, trained: Logits, quant: Quant | None, student: Module
) -> Parity:
    """Of whole windows; and step by step, `step_agreement`, where activations of one call share no
    range with others.

    Where they do, a step by itself is held against the module that reads the same steps.
    """
    bar, steps = bar_of(quant), rows.inputs.shape[1]
    found = compare(trained, _read(path, rows, steps), bar, _where(rows, path.name))
    apart, by_step = quant is not None and quant.over_the_call, _read(path, rows, 1)
    compare(
        _read_by_torch(_encoder(student()), rows) if apart else trained,
        by_step,
        bar,
        _where(rows, f"{path.name}, step by step,"),
    )
    return found | {"step_agreement": float((trained.argmax(1) == by_step.argmax(1)).mean())}


def _read(path: Path, rows: Rows, count: int) -> Logits:
    """(N, C): what a stream says of all rows, `count` steps to a call."""
    found = []
    for part in _parts(rows):
        stream = StreamReader(path, rows=len(part))
        said = [
            stream.step(part.inputs[:, i : i + count])["logits"]
            for i in range(0, part.inputs.shape[1], count)
        ]
        found.append(onnx_session.mean_over(np.concatenate(said, 1), part.mask))
    return np.concatenate(found)


@torch.inference_mode()
def _read_by_torch(module: write_stream.SeriesEncoder, rows: Rows) -> Logits:
    """(N, C): what the module says of all rows, one step to a call."""
    step, found = write_stream.Step(module), []
    for part in _parts(rows):
        inputs, state, said = (
            torch.from_numpy(part.inputs.copy()),
            write_stream.empty(module, len(part)),
            [],
        )
        for i in range(inputs.shape[1]):
            logits, _, tail, *kept = step(inputs[:, i : i + 1], *state)
            state = (tail, kept[: len(kept) // 2], kept[len(kept) // 2 :])
            said.append(logits)
        found.append(onnx_session.mean_over(torch.cat(said, 1).numpy(), part.mask))
    return np.concatenate(found)


def _parts(rows: Rows) -> list[Rows]:
    """As many rows at a time as everyone who measures a student asks it, for a range of activations
    may be theirs.
    """
    return [
        rows.take(slice(i, i + predictions.EVAL_BATCH))
        for i in range(0, len(rows), predictions.EVAL_BATCH)
    ]


def _unpacked(path: Path, rows: Rows, module: nn.Module) -> Logits:
    packed.read(path.read_bytes(), module)
    held_rows = to_device(rows, "test", None, frozenset(), torch.device("cpu"))
    return predictions.sequence_logits(Adapter(module), held_rows)


def _program(module: nn.Module, example: Tensor, quant: Quant | None) -> bytes:
    return pte.lower(module, example) if quant is None else pte.to_pte(module, example, quant)


def _executed(path: Path, rows: Rows) -> Logits:
    """(N, C): what a program says of each row by itself."""
    answers = pte.load(path.read_bytes())
    said = np.concatenate(
        [answers(torch.from_numpy(row[None].copy()))[0].numpy() for row in rows.inputs]
    )
    return onnx_session.mean_over(said, rows.mask)


def _encoder(module: nn.Module) -> write_stream.SeriesEncoder:
    write_stream.check(module)
    assert isinstance(module, write_stream.SeriesEncoder)
    return module


def _refused(form: str, checked: Callable[[], None]) -> list[Problem]:
    """What a form's own check says, under its key."""
    key = f"export.{form}"
    try:
        checked()
    except RecipeError as error:
        return [
            problem if problem.key else Problem(key, problem.message) for problem in error.problems
        ]
    return []
