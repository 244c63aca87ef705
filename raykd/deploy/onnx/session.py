"""An ONNX student as onnxruntime executes it, on one thread of a CPU."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import Rows
from raykd.errors import InfraError, RaykdError, StoreError
from raykd.recipe.quant import ONNXRUNTIME


def session(file: Path | bytes, *, lut: bool = False) -> Any:
    """An onnxruntime session over a file or its bytes, on one thread.

    With `lut`, 2-bit weights are multiplied by lookup tables. StoreError if it is no ONNX file,
    InfraError if this onnxruntime does not execute it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Without VNNI, x86's products of uint8 and int8 overflow unless this forbids it.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if lut:
        # An onnxruntime that does not know this option ignores it.
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    source = file if isinstance(file, bytes) else str(file)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class
        raise _refused(file, str(error), onnxruntime.__version__) from None


def _refused(file: Path | bytes, reason: str, version: str) -> RaykdError:
    """Why a file has no session, with the operators that onnxruntime named."""
    import onnx
    from google.protobuf.message import DecodeError

    path = "an ONNX file" if isinstance(file, bytes) else file
    message = " ".join(reason.split())[-200:]
    try:
        proto = onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)
        kinds = sorted({node.op_type for node in proto.graph.node})
    except (OSError, DecodeError):
        kinds = []
    if not kinds:
        return StoreError(f"{path} cannot be read as an ONNX file: {message}; export it again")
    named = [kind for kind in kinds if re.search(rf"\b{kind}\b", reason)]
    what = f"does not execute {' and '.join(named)} as it stands in" if named else "refuses"
    do = f"pip install 'onnxruntime>={ONNXRUNTIME}', which executes every file that raykd writes"
    return InfraError(f"onnxruntime {version} {what} {path}: {message}; {do}")


def sequence_logits(path: Path, rows: Rows, batch: int) -> NDArray[np.float32]:
    """(N, C): what a file answers for every row, `batch` rows per call, padded as the rows are.

    The size of a call matters where activations are rounded over all of it. Files of older exports
    take no mask; the mean over valid steps is made here then.
    """
    student = session(path)
    means = []
    for first in range(0, len(rows), batch):
        part = rows.take(slice(first, first + batch))
        logits = row_logits(student, feed_of(part.inputs, part.mask))
        means.append(mean_over(logits, part.mask))
    return np.concatenate(means)


def feed_of(inputs: NDArray[Any], mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """What a student's file takes: of series inputs (B, T, K) and their mask (B, T), of sentences
    (B, T, 1) their tokens, both int64.
    """
    if inputs.dtype.kind == "f":
        return {"inputs": inputs, "mask": mask}
    tokens = inputs[..., 0].astype(np.int64)
    return {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}


def row_logits(student: Any, feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """What the session of a student of series or sentences answers to a `feed_of` B rows.

    (B, C); of files of older exports (B, T, C), where logits are of steps.
    """
    asked = {value.name for value in student.get_inputs()}
    given = {value.name for value in student.get_outputs()}
    output = "row_logits" if "row_logits" in given else "logits"
    arrays = {name: np.ascontiguousarray(values) for name, values in feed.items() if name in asked}
    return student.run([output], arrays)[0]


def takes_any_length(student: Any) -> bool:
    """Whether the session of a student of series takes rows of any number of steps."""
    return not isinstance(student.get_inputs()[0].shape[1], int)


def mean_over(logits: NDArray[np.floating], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(N, C): the mean of logits (N, T, C) over the steps of a mask (N, T).

    Logits (N, C) of whole rows stay as they are.
    """
    if logits.ndim == 3:
        logits = (logits * mask[..., None]).sum(1) / np.maximum(mask.sum(1)[:, None], 1)
    return logits.astype(np.float32)


def value(array: NDArray[Any]) -> Any:
    """An array as onnxruntime's own value, to go from call to call without a copy."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
