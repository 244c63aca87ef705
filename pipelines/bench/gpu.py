"""A language student and its teacher on one device: step, memory, head, scoring, waits.

    python -m pipelines.bench.gpu [--device cuda|cpu] [--small] [--only PART ...]

On a CUDA device it takes some minutes; `--small` runs the same code in seconds. The last line is
JSON with every key. What the device cannot measure is null there, and a line above it says why.

* step_ms_fp32, step_ms_bf16, step_ms_compile: wall time of a training step; compiled in bf16
* memory_mb_fp32, memory_mb_bf16, memory_mb_compile: the device's peak in these trainings
* mfu_fp32, mfu_bf16: the student's arithmetic over what a large matrix product reaches in the same
  numbers
* head_time_ratio, head_memory_ratio: a loss over 151,936 tokens and its gradients, walked from the
  hidden states, over torch's own log_softmax of all logits
* score_tokens_per_second: a teacher in bf16 whose answers are encoded; score_ratio: over a bare
  loop of its forward passes
* syncs_per_step: how often a training step waits for the device
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.bench.table import machine
from raykd.data import Rows
from raykd.losses.fused import sparse_kl
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.weights import weights_of
from raykd.recipe.precision import Precision
from raykd.recipe.tables import Optim, TermSpec
from raykd.stages.load import resolve
from raykd.targets import SparseTargets
from raykd.teacher.scorer import Header, Scorer
from raykd.training.arm import Arm
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train
from raykd.training.state import State

ARM = Arm("student", 0, {"ce": TermSpec()})
HEAD_VOCAB = 151_936


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    model: dict[str, Any]
    vocab: int
    steps: int  # tokens of a row
    batch: int
    trained: int  # steps of a training
    head: tuple[int, int]  # places and width of the hidden states
    scored: int  # rows


WHOLE = Size(
    model={"width": 1024, "layers": 12, "heads": 16, "kv_heads": 8, "inner": 2816},
    vocab=8192,
    steps=512,
    batch=32,
    trained=40,
    head=(8192, 1024),
    scored=512,
)
SMALL = Size(
    model={"width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "inner": 64},
    vocab=300,
    steps=16,
    batch=4,
    trained=3,
    head=(4, 8),
    scored=16,
)


class NotMeasured(Exception):
    """Why a key has no figure here."""


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text(size: Size, rows: int) -> Rows:
    """Rows of drawn tokens, one document each."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, size.vocab, (rows, size.steps + 1), np.int32)
    places = np.broadcast_to(np.arange(size.steps, dtype=np.int32), (rows, size.steps))
    number = np.arange(rows)
    return Rows(
        row_id=number,
        inputs=np.stack([tokens[:, :-1], places], -1),
        mask=np.ones((rows, size.steps), bool),
        label=tokens[:, 1:].astype(np.int64),
        group=number,
    )


def llama(size: Size, device: torch.device) -> Llama:
    torch.manual_seed(0)
    return Llama(classes=size.vocab, steps=size.steps, **size.model).to(device)


def trained(size: Size, device: torch.device, numbers: str, *, is_compiled: bool = False) -> State:
    """A short training, of which a first one of three steps was warm-up."""
    rows = text(size, 2 * size.batch)
    held = DeviceRows(
        row_id=torch.from_numpy(rows.row_id).to(device),
        inputs=torch.from_numpy(rows.inputs).to(device),
        mask=torch.from_numpy(rows.mask).to(device),
        label=torch.from_numpy(rows.label).to(device),
        valence=None,
        teacher={},
        teacher_mask=None,
    )
    precision = Precision.model_validate({"student": numbers})
    module = llama(size, device)
    if is_compiled:
        module.compile()
    for steps in (3, size.trained):
        optim = Optim(steps=steps, batch=size.batch, learning_rate=1e-4, evaluate_every=steps)
        state = train(ARM, optim, Adapter(module), held, lambda _: {}, precision=precision)
    return state


def step_figures(size: Size, device: torch.device, name: str) -> dict[str, float | None]:
    """Time and memory of a step, and its share of the peak, in some numbers."""
    numbers = "bf16" if name == "compile" else name
    state = trained(size, device, numbers, is_compiled=name == "compile")
    told = state.throughput
    found: dict[str, float | None] = {
        f"step_ms_{name}": 1e3 * size.batch / told["rows_per_second"],
    }
    if device.type == "cuda":  # that of a process on a CPU is of all that it has done
        found[f"memory_mb_{name}"] = told["peak_memory_mb"]
    if name != "compile" and "peak_share" in told:
        found[f"mfu_{name}"] = told["peak_share"]
    return found


def head_figures(size: Size, device: torch.device) -> dict[str, float | None]:
    """A loss over a large vocabulary: from the head in chunks, over all logits at once."""
    places, width = size.head
    torch.manual_seed(0)
    hidden = torch.randn(places, width, device=device, requires_grad=True)
    weight = torch.randn(HEAD_VOCAB, width, device=device, requires_grad=True)
    label = torch.randint(HEAD_VOCAB, (places,), device=device)
    start = torch.arange(places + 1, device=device)
    targets = SparseTargets(label, start, torch.ones(places, device=device), HEAD_VOCAB)

    def walked() -> Tensor:
        return sparse_kl(hidden, weight, None, targets, temperature=1.0).mean()

    def whole() -> Tensor:
        log_q = torch.log_softmax(hidden @ weight.T, -1)
        return -log_q.gather(1, label[:, None]).mean()

    times = {}
    peaks = {}
    for work in (walked, whole):
        times[work], peaks[work] = _cost(work, [hidden, weight], device)
    memory = peaks[walked] / peaks[whole] if device.type == "cuda" else None
    return {"head_time_ratio": times[walked] / times[whole], "head_memory_ratio": memory}


def _cost(
    work: Callable[[], Tensor], leaves: list[Tensor], device: torch.device
) -> tuple[float, float]:
    """(seconds of the best of three rounds, bytes that the peak grows by)."""
    best = float("inf")
    before = 0
    for _ in range(3):
        for leaf in leaves:
            leaf.grad = None
        settle(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        work().backward()
        settle(device)
        best = min(best, time.perf_counter() - started)
    grown = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return best, grown


@torch.inference_mode()
def score_figures(size: Size, device: torch.device) -> dict[str, float]:
    """Tokens a second of a scorer in bf16, and over a bare loop of the same forward passes."""
    rows = text(size, size.scored)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.safetensors"
        tokenizer = Path(folder) / "tokenizer.json"  # asked for by the recipe, and not read
        tokenizer.touch()
        module = llama(size, torch.device("cpu"))
        save_file(weights_of(module), path)
        recipe = resolve(
            {
                "name": "gpu",
                "technique": "vanilla",
                "data": {"source": "python_library", "tokenizer": str(tokenizer)},
                "teacher": {"model": "llama", "weights": str(path), "settings": size.model},
                "student": {"model": "llama", "settings": SMALL.model},
                "store": {"codec": "comb", "batch": size.batch, "rows_per_shard": size.scored},
                "precision": {"teacher": "bf16"},
                "scale": {"device": device.type},
            }
        )
        shape = {"channels": 2, "classes": size.vocab, "steps": size.steps}
        scorer = Scorer(recipe, Header(shape, is_text=True, key=0))
    bare_module = module.to(device, torch.bfloat16)
    inputs = torch.from_numpy(rows.inputs)

    def bare() -> None:
        for first in range(0, len(rows), size.batch):
            bare_module(inputs[first : first + size.batch].to(device))
        settle(device)

    seconds = {}
    for work in (bare, lambda: scorer.table(rows)):
        work()
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        seconds[work] = time.perf_counter() - started
    loop, scoring = seconds.values()
    return {
        "score_tokens_per_second": rows.mask.sum() / scoring,
        "score_ratio": loop / scoring,
    }


def syncs_per_step(size: Size, device: torch.device) -> dict[str, float]:
    """How often torch says that a step waits for the device."""
    if device.type != "cuda":
        raise NotMeasured("only CUDA tells of its waits")
    few = trained_syncs(size, device, 2)
    many = trained_syncs(size, device, 10)
    return {"syncs_per_step": (many - few) / 8}


def trained_syncs(size: Size, device: torch.device, steps: int) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trained(replace(size, trained=steps), device, "bf16")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in told)


WORKS: dict[str, tuple[tuple[str, ...], Callable[[Size, torch.device], dict[str, Any]]]] = {
    "fp32": (("step_ms_fp32", "memory_mb_fp32", "mfu_fp32"), partial(step_figures, name="fp32")),
    "bf16": (("step_ms_bf16", "memory_mb_bf16", "mfu_bf16"), partial(step_figures, name="bf16")),
    "compile": (("step_ms_compile", "memory_mb_compile"), partial(step_figures, name="compile")),
    "head": (("head_time_ratio", "head_memory_ratio"), head_figures),
    "score": (("score_tokens_per_second", "score_ratio"), score_figures),
    "syncs": (("syncs_per_step",), syncs_per_step),
}


def measure(size: Size, device: torch.device, only: Collection[str]) -> dict[str, float | None]:
    """Every figure; null where the device has it not, or where it was not asked for."""
    figures: dict[str, float | None] = {}
    for name, (keys, work) in WORKS.items():
        figures |= dict.fromkeys(keys)
        if name not in only:
            continue
        try:
            figures |= work(size, device)
        except NotMeasured as reason:
            print(f"{', '.join(keys)}: null, because {reason}")
        print(json.dumps({key: figures[key] for key in keys}), flush=True)
    return {key: None if value is None else float(f"{value:.4g}") for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--small", action="store_true", help="the same code in seconds")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    torch.set_num_threads(1)
    print(machine())
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    print(json.dumps(measure(SMALL if asked.small else WHOLE, device, asked.only)))


if __name__ == "__main__":
    main()
