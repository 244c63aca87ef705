"""The sparse fused loss against plain PyTorch: CPU time in turns, peak memory each in a process of
its own.

    python -m pipelines.bench.fused_cost LOSS PLACES      prints the bytes by which the peak grows
    in one step

One step is the loss of PLACES places over 32768 classes, H = 128, from the hidden states on, and
its gradients. The naive loss is what one writes with a teacher at hand: its head's product, two
log_softmax, kl_div; cross-entropy has labels alone. The sparse targets name 32 classes a place,
more than a comb of 50 points leaves of a flat teacher.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.bench.table import Clock
from raykd.losses.fused import sparse_kl
from raykd.targets import SparseTargets

VOCAB = 32768
WIDTH = 128
PLACES = 2048
ENTRIES = 32
LOSSES = ("naive", "cross-entropy", "fused", "products")


class Step:
    """The inputs of every loss, and one step of each by its name."""

    def __init__(self, places: int):
        draws = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(places, WIDTH, generator=draws).requires_grad_()
        self.weight = torch.randn(VOCAB, WIDTH, generator=draws).mul_(WIDTH**-0.5).requires_grad_()
        self.teacher = torch.randn(places, WIDTH, generator=draws)
        self.teacher_weight = torch.randn(VOCAB, WIDTH, generator=draws).mul_(3 * WIDTH**-0.5)
        self.label = torch.randint(VOCAB, (places,), generator=draws)
        stride = VOCAB // ENTRIES
        ids = torch.arange(0, VOCAB, stride) + torch.randint(
            stride, (places, ENTRIES), generator=draws
        )
        weight = torch.full((ids.numel(),), 1 / ENTRIES)
        self.targets = SparseTargets(
            ids.flatten(), torch.arange(places + 1) * ENTRIES, weight, VOCAB
        )

    def __call__(self, loss: str) -> None:
        self.hidden.grad = self.weight.grad = None
        if loss == "products":
            self.products()
        else:
            self.value(loss).backward()

    @torch.no_grad()
    def products(self, rows: int = 128) -> None:
        """The three products that no loss of all classes can do without, `rows` places at a time:
        the floor.
        """
        gradient = torch.zeros_like(self.weight)
        for hidden in self.hidden.split(rows):
            z = hidden @ self.weight.T
            _ = z @ self.weight
            gradient.addmm_(z.T, hidden)

    def value(self, loss: str) -> Tensor:
        if loss == "fused":
            return sparse_kl(self.hidden, self.weight, None, self.targets).mean()
        z = self.hidden @ self.weight.T
        if loss == "cross-entropy":
            return F.cross_entropy(z, self.label)
        with torch.no_grad():
            log_p = (self.teacher @ self.teacher_weight.T).log_softmax(1)
        return F.kl_div(z.log_softmax(1), log_p, log_target=True, reduction="batchmean")


def seconds(rounds: int) -> dict[str, NDArray[np.float64]]:
    """CPU seconds (rounds,) of one step of each loss, in turns."""
    step = Step(PLACES)
    clock = Clock()
    spent = []
    for _ in range(rounds + 1):
        row = []
        for loss in LOSSES:
            clock.read()
            step(loss)
            row.append(clock.read()[0])
        spent.append(row)
    return dict(zip(LOSSES, np.array(spent[1:]).T, strict=True))


def growths(losses: tuple[str, ...], places: int, times: int) -> NDArray[np.float64]:
    """(times, losses): bytes by which each loss's peak grows."""
    command = [sys.executable, "-m", "pipelines.bench.fused_cost"]
    runs = [
        [subprocess.check_output([*command, loss, str(places)]) for loss in losses]
        for _ in range(times)
    ]
    return np.array([[float(text) for text in row] for row in runs])


def growth(loss: str, places: int) -> int:
    """Bytes by which this process's peak grows in one step, after a first step of a few places."""
    torch.set_num_threads(1)
    Step(2)(loss)
    step = Step(places)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = _peak()
    step(loss)
    return _peak() - before


def _peak() -> int:
    """Bytes of resident memory at their highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2])))
