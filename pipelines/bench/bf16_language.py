"""A language student of 5 M parameters, trained by raykd's own step in fp32 and in bf16."""

import argparse
import textwrap
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
from raykd.recipe.tables import Optim, TermSpec
from raykd.training.arm import Arm
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train

VOCAB = 256  # bytes
STEPS = 64
MODEL: dict[str, Any] = {"width": 256, "layers": 7, "heads": 4, "kv_heads": 4, "inner": 704}
OPTIM = Optim(steps=40, batch=8, learning_rate=1e-3, evaluate_every=40)
ROUNDS = 3
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


def _trained(numbers: str, optim: Optim) -> Llama:
    torch.manual_seed(0)
    module = Llama(classes=VOCAB, steps=STEPS, **MODEL)
    precision = Precision.model_validate({"student": numbers})
    rows = _device_rows(_rows()[:-32])
    train(ARM, optim, Adapter(module), rows, lambda _: {}, precision=precision)
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


def _device_rows(rows: Tensor) -> DeviceRows:
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
