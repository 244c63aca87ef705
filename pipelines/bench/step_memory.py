"""How far a language student's step lets the peak of memory grow, each case in its own process.

    python -m pipelines.bench.step_memory CASE      prints the bytes

`head` and `whole` are a student of 151,936 tokens whose head is walked, or multiplied out;
`smollm2` and `smollm2 whole` alike the student of examples/smollm2, of 49,152 tokens; `again` and
`kept` one of eight blocks that are computed again, or kept.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.bench.table import Clock
from raykd.losses.objective import Objective
from raykd.models.adapter import Adapter
from raykd.models.llama import Llama
from raykd.models.recompute import recompute_blocks
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals
from raykd.targets import SparseTargets
from raykd.training.state import Learner

ENTRIES = 12  # classes of a place in the teacher's sparse targets


@dataclass(frozen=True)
class Case:
    """A student and the rows of one step."""

    vocab: int
    rows: int
    settings: dict[str, Any]  # of the Llama
    steps: int = 256
    walks: bool = False  # whether its head is left to the losses
    recomputes: bool = False
    terms: tuple[str, ...] = ("kd",)


LARGE = Case(151_936, 4, {"width": 128, "layers": 1, "inner": 384})
DEEP = Case(256, 16, {"width": 128, "layers": 8, "inner": 384}, terms=("ce",))
SMOLLM2 = Case(
    49_152, 8, {"width": 160, "layers": 2, "heads": 5, "kv_heads": 5, "inner": 448}, steps=128
)
CASES = {
    "whole": LARGE,
    "head": replace(LARGE, walks=True),
    "kept": DEEP,
    "again": replace(DEEP, recomputes=True),
    "smollm2 whole": SMOLLM2,
    "smollm2": replace(SMOLLM2, walks=True),
}


def ratio(case: str, against: str) -> float:
    """The growth of one case over that of another."""
    return growth_of(case) / growth_of(against)


def time_ratio(rounds: int) -> float:
    """CPU seconds of a step whose head is walked over one whose head is multiplied out."""
    walked, whole = times(("head", "whole"), rounds)
    return float(np.median(walked / whole))


def times(names: Sequence[str], rounds: int) -> NDArray[np.float64]:
    """(names, rounds): CPU seconds of a step of each case, which take turns."""
    steps = [_step(CASES[name]) for name in names]
    clock = Clock()
    spent = np.zeros((len(steps), rounds + 1))
    for number in range(rounds + 1):
        for place, step in enumerate(steps):
            clock.read()
            step()
            spent[place, number] = clock.read()[0]
    return spent[:, 1:]


def growth_of(case: str) -> int:
    """Bytes by which a case's step lets the peak of a process grow."""
    command = [sys.executable, "-m", "pipelines.bench.step_memory", case]
    return int(subprocess.check_output(command))


def _step(case: Case, *, is_first: bool = False) -> Callable[[], None]:
    """A forward and a backward pass of a student, on rows that are the same at every call.

    The first one has a single row, and meets what is made once a process.
    """
    torch.manual_seed(0)
    module = Llama(classes=case.vocab, steps=case.steps, **case.settings)
    if case.recomputes:
        recompute_blocks(module)
    student = Adapter(module)
    batch = _batch(case, 1 if is_first else case.rows)
    if case.walks:
        student.find_head(batch.inputs[:1], batch.mask[:1])
    settings: dict[str, Any] = {"kd": {"temperature": 1.0}, "ce": {}}
    terms = {name: TermSpec.model_validate(settings[name]) for name in case.terms}
    learner = Learner(student, Objective(terms))

    def run() -> None:
        for parameter in learner.parameters():
            parameter.grad = None
        sums, counts = learner(batch)
        learner.objective.total(sums, counts).backward()

    return run


def _batch(case: Case, rows: int) -> Batch:
    draws = torch.Generator().manual_seed(0)
    vocab = case.vocab
    tokens = torch.randint(vocab, (rows, case.steps), generator=draws)
    inputs = torch.stack([tokens, torch.arange(case.steps).expand(rows, case.steps)], -1).int()
    mask = torch.ones(rows, case.steps, dtype=torch.bool)
    places = rows * case.steps
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
        teacher=Signals(torch.empty(rows, case.steps, 0), mask),
        targets=lambda temperature: targets,
    )


def _growth(case: str) -> int:
    """Bytes by which this process's peak grows in one step, its parameters and rows at hand."""
    torch.set_num_threads(1)
    _step(CASES[case], is_first=True)()
    step = _step(CASES[case])
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
