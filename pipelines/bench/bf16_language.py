"""A language student of 5 M parameters, trained by raykd's own step in fp32, in bf16, and with
checkpoints.
"""

import argparse
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.bench.table import Clock
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.recipe.precision import Precision
from raykd.recipe.recipe import Scale
from raykd.recipe.tables import Optim, TermSpec
from raykd.training.arm import Arm
from raykd.training.checkpoints import Checkpoints
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train

VOCAB = 256  # bytes
STEPS = 64
MODEL: dict[str, Any] = {"width": 256, "layers": 7, "heads": 4, "kv_heads": 4, "inner": 704}
OPTIM = Optim(steps=40, batch=8, learning_rate=1e-3, evaluate_every=40)
ROUNDS = 3
BETWEEN = 12  # steps from checkpoint to checkpoint, in which the one before is written
ARM = Arm("student", 0, {"ce": TermSpec()})


def quality_difference() -> float:
    """Held-out nats a token after training in bf16, less those after training in fp32."""
    full = _trained("fp32", OPTIM)
    half = _trained("bf16", OPTIM)
    size = sum(p.numel() for p in full.parameters())
    print(f"bf16_quality_difference: {size:,} parameters, {OPTIM.steps} steps")
    held = _rows()[-32:]
    nats = [_nats(module, held) for module in (full, half)]
    print(f"bf16_quality_difference: {nats[0]:.4f} nats in fp32, {nats[1]:.4f} in bf16")
    return nats[1] - nats[0]


def step_ratio() -> float:
    """CPU seconds of a step in bf16 over one in fp32, in turns; the median of rounds."""
    optim = OPTIM.model_copy(update={"steps": 4, "evaluate_every": 4})
    clock = Clock()
    ratios = []
    for _ in range(ROUNDS + 1):
        spent = []
        for numbers in ("bf16", "fp32"):
            clock.read()
            _trained(numbers, optim)
            spent.append(clock.read()[0])
        ratios.append(spent[0] / spent[1])
    return float(np.median(ratios[1:]))


def stall_share() -> float:
    """Seconds that the loop stands still for its checkpoints over the seconds of a training that
    has them as often as the default.

    They are taken every few steps here, and the share is that of the default's steps.
    """
    optim = OPTIM.model_copy(update={"steps": 3 * BETWEEN + 1, "evaluate_every": BETWEEN})
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder))
        started = time.perf_counter()
        _trained("fp32", optim, checkpoints=kept, checkpoint_every=BETWEEN)
        seconds = time.perf_counter() - started
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    a_state = kept.stalled / 3
    a_step = (seconds - kept.stalled) / optim.steps
    every = Scale().checkpoint_every
    print(
        f"checkpoint_stall_share: {1e3 * a_state:.1f} ms a state of {size / 2**20:.0f} MiB, "
        f"{1e3 * a_step:.1f} ms a step, a state every {every} steps"
    )
    return a_state / (a_state + every * a_step)


def _trained(numbers: str, optim: Optim, **keywords: Any) -> Llama:
    torch.manual_seed(0)
    module = Llama(classes=VOCAB, steps=STEPS, **MODEL)
    precision = Precision.model_validate({"student": numbers})
    rows = device_rows()
    train(ARM, optim, Adapter(module), rows, lambda _: {}, precision=precision, **keywords)
    return module


@torch.inference_mode()
def _nats(module: Llama, rows: Tensor) -> float:
    logits = module.eval()(rows[:, :-1])["logits"]
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def _rows() -> Tensor:
    """(N, STEPS + 1) int64: bytes of the standard library, as windows in turn."""
    paths = [Path(module.__file__ or "") for module in (argparse, textwrap)]
    data = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8).astype(np.int64)
    count = len(data) // (STEPS + 1)
    return torch.from_numpy(data[: count * (STEPS + 1)].reshape(count, STEPS + 1))


def device_rows() -> DeviceRows:
    """The rows that are learnt from."""
    rows = _rows()[:-32]
    places = torch.arange(STEPS).expand(len(rows), STEPS)
    return DeviceRows(
        row_id=torch.arange(len(rows)),
        inputs=torch.stack([rows[:, :-1], places], -1).int(),
        mask=torch.ones(len(rows), STEPS, dtype=torch.bool),
        label=rows[:, 1:],
        valence=None,
        teacher={},
        teacher_mask=None,
    )
