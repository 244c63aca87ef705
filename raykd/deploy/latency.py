"""How long one row takes: an artefact beside its teacher and its student in full precision.

All are timed in one run, on one thread. Times are medians of interleaved rounds of this process's
CPU time, which other processes on the machine disturb least.
"""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from raykd.deploy.onnx import session as onnx_session
from raykd.deploy.onnx import write as write_onnx
from raykd.errors import RecipeError
from raykd.models import adapter

ROUNDS = 25
LEAST_S = 2e-3  # of a round: many calls of a quick model
# The processor's flags that decide how fast it multiplies int8.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


def latency(artefact: bytes, others: Mapping[str, nn.Module], row: Tensor) -> dict[str, Any]:
    """{rows, threads, flags}: each model's time over the artefact's, for one `row` (1, T, K).

    A row is {model, runtime, ratio}; a ratio above 1 means that the artefact is quicker. Each model
    has a row for torch and, if it can be written as ONNX, one for onnxruntime. The `others` are
    changed by that.
    """
    mask = torch.ones(row.shape[:2], dtype=torch.bool)
    inputs = {"inputs": row.numpy(), **onnx_session.feed_of(row.numpy(), mask.numpy())}
    runs = {("artefact", "onnxruntime"): _session(artefact, inputs)}
    for name, module in others.items():
        runs[name, "torch"] = _eager(module.eval(), row)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, module in others.items():
            try:
                file = write_onnx.to_onnx(module, row, any_rows=False)
                runs[name, "onnxruntime"] = _session(file, inputs)
            except RecipeError:  # such a module has the row of torch alone
                continue
        times = medians(runs)
    finally:
        torch.set_num_threads(threads)
    of_artefact = times.pop(("artefact", "onnxruntime"))
    rows = [
        {"model": name, "runtime": runtime, "ratio": spent / of_artefact}
        for (name, runtime), spent in times.items()
    ]
    return {"rows": rows, "threads": 1, "flags": cpu_flags()}


def medians(runs: Mapping[Any, Callable[[], Any]], rounds: int = ROUNDS) -> dict[Any, float]:
    """Seconds of CPU time of one call of each, the median over rounds that take turns."""
    counts = {
        key: max(1, round(LEAST_S / max(_spent(call, 3), 1e-7))) for key, call in runs.items()
    }
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, call in runs.items():
            seconds[key].append(_spent(call, counts[key]))
    return {key: median(times) for key, times in seconds.items()}


def cpu_flags() -> str:
    """The instructions of this processor that decide how fast integers are multiplied."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return " ".join([platform.machine(), *(flag for flag in FLAGS if flag in words)])


def _spent(call: Callable[[], Any], count: int) -> float:
    call()
    started = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - started) / count


def _session(data: bytes, inputs: dict[str, Any]) -> Callable[[], Any]:
    session = onnx_session.session(data)
    asked = {value.name: inputs[value.name] for value in session.get_inputs()}
    return lambda: session.run(["logits"], asked)


def _eager(module: nn.Module, row: Tensor) -> Callable[[], Any]:
    mask = torch.ones(row.shape[:2], dtype=torch.bool)

    def run() -> None:
        with torch.inference_mode():
            adapter.call(module, row, mask)

    return run
