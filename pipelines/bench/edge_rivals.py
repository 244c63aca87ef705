"""Ways to run an encoder on one thread of a CPU, others' and ours: their files, answers at batch 1,
and CPU time.

All start from the same float32 weights, and none trains after rounding them: accuracies are what
rounding alone leaves. torchao and ExecuTorch have their own scales and leave out the layers that
ours leave out; onnxruntime's own quantiser takes every product with constant weights.
"""

import copy
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raykd.data.rows import Rows
from raykd.deploy import pte
from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.models.adapter import field
from raykd.recipe.quant import GROUP, Quant
from raykd.training import phases
from raykd.training.predictions import of_logits

Answer = Callable[[Tensor], Tensor]  # inputs (1, T, K) -> logits (1, T, C) or (1, C)
Made = tuple[int, Answer]  # bytes of the file, and what it answers
OURS = {
    "int8 per tensor": Quant(per="tensor"),
    "int8 per channel": Quant(),
    "int4 g32": Quant(weights="int4", per="group"),
    "ternary": Quant(weights="ternary"),
}


@dataclass(frozen=True)
class Row:
    """One way: its file's bytes, a call that answers the example, and its accuracy if there are
    test rows.
    """

    name: str
    bytes: int
    run: Callable[[], Tensor]
    accuracy: float | None


def rows_for(encoder: nn.Module, example: Tensor, test: Rows | None = None) -> list[Row]:
    """A row for every way whose package is installed, float32 in eager torch first; `example` is
    (1, T, K).

    Test rows are answered one by one. What is left out is printed with the package that it needs.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, package, make in _ways(Path(folder)):
            if importlib.util.find_spec(package) is None:
                print(f"{name} is left out: {package} is not installed")
                continue
            size, answer = make(copy.deepcopy(encoder).eval(), example)
            accuracy = None if test is None else accuracy_of(answer, test)
            found.append(Row(name, size, partial(answer, example), accuracy))
    return found


def cpu_seconds(rows: Sequence[Row], rounds: int = 30, calls: int = 20) -> NDArray[np.float64]:
    """(rounds, rows): CPU seconds of a call, the rows taking turns of `calls` calls, after a round
    to warm up.

    CPU time of the whole process, which neighbours on a busy machine stretch less than wall time.
    Torch's threads are the caller's to set.
    """
    spent = np.empty((rounds + 1, len(rows)))
    for turn in spent:
        for i, row in enumerate(rows):
            start = time.process_time()
            for _ in range(calls):
                row.run()
            turn[i] = (time.process_time() - start) / calls
    return spent[1:]


def speed_ups(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rounds, rows): how many times faster each row is than the first in the same round."""
    return seconds[:, :1] / seconds


def accuracy_of(answer: Answer, rows: Rows) -> float:
    """The accuracy of the mean logits over valid steps, each row answered alone."""
    inputs = torch.from_numpy(np.array(rows.inputs))
    logits = []
    for i, mask in enumerate(rows.mask):
        said = answer(inputs[i : i + 1])[0].numpy()
        logits.append(said if said.ndim == 1 else said[mask].mean(0))
    return of_logits(rows, np.stack(logits)).metrics()["accuracy"]


def _ways(folder: Path) -> list[tuple[str, str, Callable[[nn.Module, Tensor], Made]]]:
    """(name, package, what makes it): every way there is."""
    return [
        ("fp32, torch eager", "torch", lambda module, _: _eager(module)),
        ("fp32, onnxruntime", "onnxruntime", partial(_onnx, folder)),
        (
            "quantize_dynamic per tensor, onnxruntime",
            "onnxruntime",
            partial(_dynamic, folder, False),
        ),
        (
            "quantize_dynamic per channel, onnxruntime",
            "onnxruntime",
            partial(_dynamic, folder, True),
        ),
        ("8da8w, torchao eager", "torchao", lambda module, _: _eager(_converted(module, 8))),
        ("8da4w g32, torchao eager", "torchao", lambda module, _: _eager(_converted(module, 4))),
        ("fp32, ExecuTorch", "executorch", _program),
        ("8da8w, ExecuTorch", "executorch", lambda module, x: _program(_converted(module, 8), x)),
        (
            "8da4w g32, ExecuTorch",
            "executorch",
            lambda module, x: _program(_converted(module, 4), x),
        ),
        *(
            (f"ours {name}, onnxruntime", "onnxruntime", partial(_ours, folder, quant))
            for name, quant in OURS.items()
        ),
    ]


def _eager(module: nn.Module) -> Made:
    """As it is; its bytes are those of torch.save."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return len(file.getvalue()), torch.inference_mode()(partial(_logits, module))


def _logits(module: nn.Module, inputs: Tensor) -> Tensor:
    found = field(module(inputs), "logits")
    assert found is not None
    return found


def _onnx(folder: Path, module: nn.Module, example: Tensor) -> Made:
    return _session(_written(folder, module, example))


def _ours(folder: Path, quant: Quant, module: nn.Module, example: Tensor) -> Made:
    phases.round_as(module, quant)
    return _session(_written(folder, module, example))


def _dynamic(folder: Path, per_channel: bool, module: nn.Module, example: Tensor) -> Made:
    """onnxruntime's own quantiser: int8 weights, activations rounded over the call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "quantised.onnx"
    written = _written(folder, module, example)
    products = [
        "MatMul",
        "Gemm",
    ]  # by default Attention too, of which it makes an operator that refuses its attributes
    quantize_dynamic(written, path, products, per_channel=per_channel, weight_type=QuantType.QInt8)
    return _session(path)


def _written(folder: Path, module: nn.Module, example: Tensor) -> Path:
    path = folder / "encoder.onnx"
    path.write_bytes(write_onnx.to_onnx(module, example))
    return path


def _session(path: Path) -> Made:
    session: Any = onnx_session.session(path)

    def answer(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"inputs": inputs.numpy()})[0])

    return path.stat().st_size, answer


def _converted(module: nn.Module, bits: int) -> nn.Module:
    """torchao's int8 or int4 weights with int8 activations of each step, as its training ends."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8DynamicActivationIntxWeightConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    dtype = getattr(torch, f"int{bits}")
    granularity = PerAxis(0) if bits == 8 else PerGroup(GROUP)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=granularity
    )
    quantize_(
        module,
        config,
        filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and not Quant().skips(name),
    )
    return module


def _program(module: nn.Module, example: Tensor) -> Made:
    """An ExecuTorch program, on one thread."""
    from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]

    portable_lib._unsafe_reset_threadpool(1)  # the only way to ask for it, and nothing runs yet
    data = pte.lower(module, example)
    answer = pte.load(data)
    return len(data), lambda inputs: answer(inputs)[0]
