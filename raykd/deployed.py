"""An ONNX student as onnxruntime executes it, on one thread of a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.data.rows import Rows


def session(file: Path | bytes) -> Any:
    """An onnxruntime session over a file, or over what one holds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"]
    )


def sequence_logits(path: Path, rows: Rows, batch: int) -> NDArray[np.float32]:
    """(N, C): the mean logits over valid steps of every row, `batch` rows to a call.

    The size of a call matters where activations are rounded over the whole of it.
    """
    runs, found = session(path), []
    for first in range(0, len(rows), batch):
        part = rows.take(slice(first, first + batch))
        (logits,) = runs.run(["logits"], {"inputs": np.ascontiguousarray(part.inputs)})
        if logits.ndim == 3:
            mask = part.mask[..., None]
            logits = (logits * mask).sum(1) / np.maximum(mask.sum(1), 1)
        found.append(logits.astype(np.float32))
    return np.concatenate(found)
