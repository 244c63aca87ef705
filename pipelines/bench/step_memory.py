"""How far a language student's step lets the peak of memory grow, each case in its own process.

    python -m pipelines.bench.step_memory CASE      prints the bytes

`head` and `whole` are a student of 151,936 tokens whose head is walked, or multiplied out;
`again` and `kept` one of eight blocks that are computed again, or kept.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipelines.bench.table import Clock
from raykd.losses.objective import Objective
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.recompute import recompute_blocks
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals
from raykd.targets import SparseTargets
from raykd.training.state import Learner

LARGE = 151_936
SMALL = 256
ROWS = 4
STEPS = 256
ENTRIES = 12  # classes of a place in the teacher's sparse targets
WIDTH = 128


def ratio(case: str, against: str) -> float:
    """The growth of one case over that of another."""
    return _growth_of(case) / _growth_of(against)


def time_ratio(rounds: int) -> float:
    """CPU seconds of a step whose head is walked over one whose head is multiplied out."""
    steps = [_step("head"), _step("whole")]
    clock = Clock()
    ratios = []
    for _ in range(rounds + 1):
        spent = []
        for step in steps:
            clock.read()
            step()
            spent.append(clock.read()[0])
        ratios.append(spent[0] / spent[1])
    return float(np.median(ratios[1:]))


def _growth_of(case: str) -> int:
    command = [sys.executable, "-m", "pipelines.bench.step_memory", case]
    return int(subprocess.check_output(command))


def _step(case: str, *, is_first: bool = False) -> Callable[[], None]:
    """A forward and a backward pass of a student, on rows that are the same at every call.

    The first one has a single row, and meets what is made once a process.
    """
    torch.manual_seed(0)
    is_large = case in ("head", "whole")
    vocab = LARGE if is_large else SMALL
    rows = ROWS if is_large else 4 * ROWS
    layers = 1 if is_large else 8
    module = Llama(classes=vocab, steps=STEPS, width=WIDTH, layers=layers, inner=3 * WIDTH)
    if case == "again":
        recompute_blocks(module)
    student = Adapter(module)
    batch = _batch(vocab, 1 if is_first else rows)
    if case == "head":
        student.find_head(batch.inputs[:1], batch.mask[:1])
    terms = (
        {"kd": TermSpec.model_validate({"temperature": 1.0})} if is_large else {"ce": TermSpec()}
    )
    learner = Learner(student, Objective(terms))

    def run() -> None:
        for parameter in learner.parameters():
            parameter.grad = None
        sums, counts = learner(batch)
        learner.objective.total(sums, counts).backward()

    return run


def _batch(vocab: int, rows: int) -> Batch:
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (rows, STEPS), generator=draws)
    inputs = torch.stack([tokens, torch.arange(STEPS).expand(rows, STEPS)], -1).int()
    mask = torch.ones(rows, STEPS, dtype=torch.bool)
    places = rows * STEPS
    stride = vocab // ENTRIES
    ids = torch.arange(ENTRIES) * stride
    ids = ids + torch.randint(stride, (places, ENTRIES), generator=draws)
    weight = torch.full((ids.numel(),), 1 / ENTRIES)
    targets = SparseTargets(ids.flatten(), torch.arange(places + 1) * ENTRIES, weight, vocab)
    return Batch(
        torch.arange(rows),
        inputs,
        mask,
        tokens,
        teacher=Signals(torch.empty(rows, STEPS, 0), mask),
        targets=lambda temperature: targets,
    )


def _growth(case: str) -> int:
    """Bytes by which this process's peak grows in one step, its parameters and rows at hand."""
    torch.set_num_threads(1)
    _step(case, is_first=True)()
    step = _step(case)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = _peak()
    step()
    return _peak() - before


def _peak() -> int:
    """Bytes of resident memory at their highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(_growth(sys.argv[1]))
