"""Micro-batches against whole ones: the largest difference of loss and gradients over every term.

Each term of every technique counts on random signals of six rows, as a student would give them. The
counts come from what is known before it answers, as in training.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raykd import techniques
from raykd.losses.objective import Objective
from raykd.losses.terms import TERMS, Answered, needs_of, wants_of
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Rollout, Signals
from raykd.store.layer_signals import is_signal

ROWS = 6
STEPS = 5
CLASSES = 4
WIDTH = 6
SIZES = (1, 2, 4)


def largest_difference() -> tuple[float, list[str]]:
    """(the largest difference over the whole's loss or largest gradient, terms without micro)."""
    techniques.load_terms()
    apart = 0.0
    refused = set()
    for technique in techniques.all_techniques():
        specs = {n: TermSpec(**s) for n, s in technique.recipe["terms"].items()}
        for name, spec in specs.items():
            if TERMS[name].compares(spec.settings):
                refused.add(name)
            else:
                apart = max(apart, *(_apart({name: spec}, size) for size in SIZES))
    return apart, sorted(refused)


def _apart(terms: dict[str, TermSpec], size: int) -> float:
    names = sorted(filter(is_signal, wants_of(terms) | needs_of(terms)))
    mask = torch.arange(STEPS) < torch.tensor([5, 4, 2, 3, 5, 2])[:, None]
    batch = _batch(mask, names)
    if any(TERMS[name].own for name in terms):
        batch = replace(batch, label=batch.label[:, None].expand(mask.shape), rollout=_drawn(mask))
    torch.manual_seed(0)
    objective = Objective(terms, (_signals(1, mask, names), batch))
    progress = max(spec.since for spec in terms.values())
    loss, gradients = _whole(objective, batch, mask, names, progress)
    parted, others = _in_parts(objective, batch, mask, names, progress, size)
    scale = max(float(g.abs().max()) for g in gradients)
    pairs = zip(gradients, others, strict=True)
    gradient = max(float((a - b).abs().max()) for a, b in pairs) / scale
    return max(abs(float(loss - parted)) / abs(float(loss)), gradient)


def _whole(
    objective: Objective, batch: Batch, mask: Tensor, names: list[str], progress: float
) -> tuple[Tensor, list[Tensor]]:
    student = _signals(1, mask, names)
    leaves = _leaves(student)
    loss = objective.total(*objective(student, batch, progress))
    return loss.detach(), _filled(torch.autograd.grad(loss, leaves, allow_unused=True), leaves)


def _in_parts(
    objective: Objective,
    batch: Batch,
    mask: Tensor,
    names: list[str],
    progress: float,
    size: int,
) -> tuple[Tensor, list[Tensor]]:
    student = _signals(1, mask, names)
    leaves = _leaves(student)
    layers = {name: layer.shape[1] for name, layer in student.layers.items()}
    slices = [slice(first, first + size) for first in range(0, ROWS, size)]
    parts = [batch.rows(at) for at in slices]
    known = [Answered(mask[at], layers) for at in slices]
    foretold = [objective.counts(a, p, progress) for a, p in zip(known, parts, strict=True)]
    counts = torch.stack(foretold).sum(0)
    loss = torch.zeros(())
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for at, part in zip(slices, parts, strict=True):
        sums, _ = objective(student.rows(at), part, progress)
        part_loss = objective.total(sums, counts)
        found = torch.autograd.grad(part_loss, leaves, allow_unused=True)
        total = [a + b for a, b in zip(total, _filled(found, leaves), strict=True)]
        loss += part_loss.detach()
    return loss, total


def _signals(seed: int, mask: Tensor, names: list[str]) -> Signals:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, STEPS, CLASSES, generator=draw).requires_grad_()
    valence = (torch.rand(ROWS, STEPS, generator=draw) * 2 - 1).requires_grad_()
    layers = {}
    for name in names:
        steps = 1 if name.startswith("embedding.") else STEPS
        layers[name] = torch.randn(ROWS, steps, WIDTH, generator=draw).requires_grad_()
    return Signals(logits, mask, valence, layers)


def _batch(mask: Tensor, names: list[str]) -> Batch:
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(ROWS, STEPS, 3, generator=draw)
    label = torch.arange(ROWS) % CLASSES
    return Batch(torch.arange(ROWS), inputs, mask, label, None, _signals(2, mask, names))


def _drawn(mask: Tensor) -> Rollout:
    """Text that was drafted and tested, in every row rejected at its second token."""
    steps = torch.arange(STEPS).expand(mask.shape)
    return Rollout(
        torch.full(mask.shape, -1.4),
        torch.ones(mask.shape),
        lag=0,
        accepted=(steps < 1) & mask,
        rejected=(steps == 1) & mask,
        correction=torch.zeros_like(steps),
        tail=(steps - 1).clamp(min=0) * mask,
    )


def _leaves(student: Signals) -> list[Tensor]:
    assert student.valence is not None
    return [student.logits, student.valence, *student.layers.values()]


def _filled(found: Any, leaves: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
