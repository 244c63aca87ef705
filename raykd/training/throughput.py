"""How fast a training goes: what it reads a second, how long it waits for rows, and what share of
its device's peak the student's arithmetic is.

All of it is of the steps since this process began, so a resumed training tells of its last part.
Validation, checkpoints and the start are not in it.
"""

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raykd.models.form import computing
from raykd.recipe.precision import Precision
from raykd.signals import Batch, Signals

SIDE = {"cpu": 512, "cuda": 4096}  # of the square matrices whose product shows the peak
TRIES = 5
WORTH_TELLING = 0.05  # of the time, spent waiting for rows
PASSES = 3  # a forward and a backward pass take three times the arithmetic of the forward pass


@dataclass
class Pace:
    """Rows, valid steps and seconds of the steps that this rank has taken."""

    rows: int = 0
    tokens: Tensor | int = 0  # valid steps; a tensor, so that counting waits for no device
    seconds: float = 0.0
    waiting: float = 0.0  # of these, for rows that were not ready, or that the student had to write

    @classmethod
    def begun(cls, device: torch.device) -> "Pace":
        """The pace of steps that begin now; the device's peak of memory begins anew with them."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return cls()

    def read(self, batches: Sequence[Batch], waiting: float) -> None:
        """Count a step's rows, which took so many seconds."""
        self.waiting += waiting
        for batch in batches:
            self.rows += len(batch.row_id)
            self.tokens = self.tokens + batch.mask.sum()

    def rates(self, workers: int) -> dict[str, float]:
        """Rows and tokens a second of all `workers`, at this rank's pace, and the share of the time
        that it waited for rows.
        """
        if not self.seconds:
            return {}
        return {
            "rows_per_second": workers * self.rows / self.seconds,
            "tokens_per_second": workers * float(self.tokens) / self.seconds,
            "waiting_share": self.waiting / self.seconds,
        }

    def told(
        self, student: nn.Module, batch: Batch, precision: Precision, *, workers: int
    ) -> dict[str, float]:
        """The figures by name; `batch` is any one row.

        * rows_per_second, tokens_per_second, waiting_share: as in `rates`; a token is a valid step
        * flops_per_row: a row's forward and backward pass through the student, by torch's counter
        * peak_share: these, over what a large matrix product reaches on this device in the numbers
          of the student
        * peak_memory_mb: of the device in these steps; on a CPU of the process since it began
        """
        if not self.seconds:
            return {}
        device = batch.inputs.device
        told = self.rates(workers) | {"peak_memory_mb": peak_memory(device) / 1e6}
        flops = PASSES * forward_flops(student, batch)
        if flops:
            told["flops_per_row"] = float(flops)
            with suppress(torch.OutOfMemoryError):  # beside what is full no large product has room
                peak = peak_flops(device, precision)
                told["peak_share"] = self.rows / self.seconds * flops / peak
        return told


@torch.no_grad()
def forward_flops(student: nn.Module, batch: Batch) -> int:
    """What a forward pass of these rows takes; a head that is left to the losses counts, too.

    0 where torch cannot count a module's operations: that ends no training.
    """
    was_training = student.training
    student.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            said: Signals = student(batch.inputs, batch.mask)
    except Exception:  # whatever a module of a user's does under the counter
        return 0
    finally:
        student.train(was_training)
    flops = counter.get_total_flops()
    if said.headed is not None:
        flops += 2 * said.headed.hidden.numel() * said.headed.columns
    return flops


@torch.no_grad()
def peak_flops(device: torch.device, precision: Precision) -> float:
    """Operations a second of a large matrix product: the best of a few."""
    side = SIDE[device.type]
    with computing(precision, device):
        left = torch.ones(side, side, device=device)
        best = float("inf")
        for _ in range(TRIES):
            _settle(device)
            started = time.perf_counter()
            torch.matmul(left, left)
            _settle(device)
            best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that the device has held for this process; on a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
