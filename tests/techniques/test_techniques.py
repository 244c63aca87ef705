"""Laws that every technique and every loss term obeys, and the known numbers of the shared terms.

A new technique or term is tested by being there: the cases are every technique's own terms, and
every registered term with every choice that its signature offers. Numbers stand against float64
numpy formulas of Hinton, Vinyals and Dean 2015 (section 2: the gradient T (q - p) and the
high-temperature limit).
"""

import ast
import inspect
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import by_hand
import numpy as np
import pytest
import torch
from digests import recipe_digest
from safetensors.torch import load_file

from raykd import models, techniques
from raykd.errors import RecipeError
from raykd.losses import shared_terms
from raykd.losses.objective import Objective
from raykd.losses.terms import TERMS, Answered, needs_of, wants_of
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import Optim, TermSpec
from raykd.signals import Batch, Rollout, Signals
from raykd.stages.load import resolve
from raykd.store import layer_signals
from raykd.targets import UNLABELLED
from raykd.techniques import register
from raykd.training.arm import Arm, World
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train
from raykd.training.run_arms import run_arms

techniques.load_terms()
ROOT = Path(__file__).parents[2]
OWN = [  # techniques of the examples' own, named by their modules
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "examples").rglob("*.py"))
    if "\nRECIPE = {" in path.read_text(encoding="utf-8")
]
for name in OWN:
    register(name)
TECHNIQUES = {t.name: t for t in [*techniques.all_techniques(), *map(techniques.find, OWN)]}
B = 6
T = 5
C = 4
D = 6
H = 2
SHAPES = {"hidden": (T, D), "embedding": (1, D), "attention": (T, H, T), "scores": (T, H, T)}
KINKED = ("tvd", "lk", "hybrid")  # divergences whose gradient jumps where p = q
GARBAGE = [1e4, torch.inf, -torch.inf, torch.nan]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on such small tensors wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ATTENTION = {
    "pairs": [["blocks.0.attention", "blocks.2.attention"]]
}  # shows scores; its projection does not


def specs(terms: dict[str, dict[str, Any]]) -> dict[str, TermSpec]:
    return {name: TermSpec(**settings) for name, settings in terms.items()}


def settings_of(name: str) -> list[dict[str, Any]]:
    """Every choice of a term's Literal and bool settings, over those of a technique."""
    make = TERMS[name].make
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    choices = {
        k: get_args(h) or (False, True)
        for k, h in hints.items()
        if h is bool or "Literal[" in str(h)
    }
    named = [t.recipe["terms"][name] for t in TECHNIQUES.values() if name in t.recipe["terms"]]
    base = {k: v for k, v in (named[0] if named else {}).items() if k not in ("weight", *choices)}
    found = [
        base | dict(zip(choices, values, strict=True)) for values in product(*choices.values())
    ]
    return [s | ATTENTION if s.get("mode") == "scores" else s for s in found]


def label_of(settings: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in settings.items())


def is_own(terms: dict[str, Any]) -> bool:
    """Whether terms count in the student's own text; in the data's rows if not.

    A technique may have both kinds.
    """
    return any(TERMS[name].own for name in terms)


def parts_of(terms: dict[str, Any]) -> list[dict[str, Any]]:
    """A technique's terms of the data's rows and those of the student's own text, which never meet
    in a batch.
    """
    parts = [{n: s for n, s in terms.items() if TERMS[n].own == own} for own in (False, True)]
    return [part for part in parts if part]


TERM_CASES = [pytest.param({n: s}, id=f"{n}-{label_of(s)}") for n in TERMS for s in settings_of(n)]
CASES = [
    pytest.param(part, id=f"technique-{n}{'-own' * is_own(part)}")
    for n, t in TECHNIQUES.items()
    for part in parts_of(t.recipe["terms"])
] + TERM_CASES
MATCHING = [
    c for c in TERM_CASES if is_own(c.values[0]) or "logits" in TERMS[next(iter(c.values[0]))].needs
]
DIVERGENT = [
    c
    for c in MATCHING
    if "minillm" not in c.values[0] and c.values[0].get("ghost", {}).get("form", "soft") == "soft"
]
DATA = [case for case in CASES if not is_own(case.values[0])]
EVERY = [specs(case.values[0]) for case in CASES]
LAYERS = sorted(
    filter(layer_signals.is_signal, frozenset().union(*(wants_of(t) | needs_of(t) for t in EVERY)))
)
SPLITTABLE = [
    c
    for c in CASES
    if not any(
        TERMS[n].compares({k: v for k, v in s.items() if k != "weight"})
        for n, s in c.values[0].items()
    )
]
PARTED = [  # terms of the examples' own need not say where they count
    c
    for c in SPLITTABLE
    if not any(TERMS[n].make.__module__.startswith("examples.") for n in c.values[0])
]


def objective_of(terms: dict[str, dict[str, Any]]) -> Objective:
    """Built from any example: only the widths count."""
    torch.manual_seed(0)
    said = signals(0, torch.ones(1, T, dtype=torch.bool))
    steps = torch.ones(1, T, dtype=torch.bool)
    label = torch.zeros(1, dtype=torch.int64)
    example = (said, Batch(label, torch.zeros(1, T, 3), steps, label, None, said))
    return Objective(specs(terms), example)


def signals(seed: int, mask: torch.Tensor) -> Signals:
    """Random signals of every kind that any term reads."""
    draw = torch.Generator().manual_seed(seed)
    rows, steps = mask.shape
    inner = {n: torch.randn(rows, *SHAPES[n.partition(".")[0]], generator=draw) for n in LAYERS}
    return Signals(
        2 * torch.randn(rows, steps, C, generator=draw),
        mask,
        torch.rand(rows, steps, generator=draw) * 2 - 1,
        inner,
    )


@pytest.fixture
def student() -> Signals:
    """Six rows of two to five valid steps."""
    return signals(1, torch.arange(T) < torch.tensor([5, 4, 2, 3, 5, 2])[:, None])


def rollout_of(found: Batch, student: Signals) -> Batch:
    """The same as text that the student wrote and that was drafted and tested."""
    draw = torch.Generator().manual_seed(4)
    label = torch.randint(C, (B, T), generator=draw)
    log_q = student.logits.log_softmax(-1).gather(-1, label[..., None])[..., 0]
    at = torch.tensor([2, 0, 1, 9, 3, 0])[
        :, None
    ]  # the rejection: one row has none, one its tail outside the mask
    steps = torch.arange(T)
    drawn = Rollout(
        log_q + 0.1 * torch.randn(B, T, generator=draw),
        0.5 + 0.7 * torch.rand(B, T, generator=draw),
        lag=1,
        accepted=(steps < at) & found.mask,
        rejected=(steps == at) & found.mask,
        correction=torch.randint(C, (B, T), generator=draw),
        tail=(steps - at).clamp(min=0) * found.mask,
    )
    return replace(found, label=label, rollout=drawn)


@pytest.fixture
def batch(student, request) -> Batch:
    """Rows with labels but one, valence with holes, and another model as teacher; text where the
    terms read that.
    """
    label = torch.tensor([0, 1, 2, 3, UNLABELLED, 1])
    draw = torch.Generator().manual_seed(3)
    valence = torch.rand(B, T, generator=draw) * 2 - 1
    valence[0, 1] = valence[2, 1] = torch.nan
    inputs = torch.randn(B, T, 3, generator=draw)
    saliency = torch.linspace(-1, 1, B)
    answer = torch.tensor([0, 1, 2, 3, 0, 1])
    teacher = signals(2, student.mask)
    found = Batch(
        torch.arange(B),
        inputs,
        student.mask,
        label,
        valence,
        teacher,
        saliency=saliency,
        answer=answer,
    )
    called = getattr(request.node, "callspec", None)
    return (
        rollout_of(found, student) if called and is_own(called.params.get("terms", {})) else found
    )


def tensors(found: Signals) -> list[torch.Tensor]:
    return [v for v in (found.logits, found.valence, *found.layers.values()) if v is not None]


def mapped(found: Signals, change: Any) -> Signals:
    """`found` with every tensor, each seen as (B, T, ...), changed alike."""
    return Signals(
        change(found.logits),
        change(found.mask),
        None if found.valence is None else change(found.valence),
        {k: change(v) for k, v in found.layers.items()},
    )


def rows_of(batch: Batch, index: Any) -> Batch:
    def pick(values: Any) -> Any:
        return values[index]

    fields = {k: pick(v) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(
        batch, **fields, teacher=mapped(batch.teacher, pick), rollout=changed(batch.rollout, pick)
    )


def changed(rollout: Rollout | None, change: Any) -> Rollout | None:
    """`rollout` with every tensor, each (B, T), changed alike."""
    held = (
        {k: change(v) for k, v in vars(rollout).items() if isinstance(v, torch.Tensor)}
        if rollout
        else {}
    )
    return replace(rollout, **held) if rollout else None


def all_count(objective: Objective) -> float:
    """The progress at which every term counts, whatever its `since`."""
    return max(spec.since for spec in objective.specs.values())


def evaluate(
    objective: Objective, student: Signals, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """(sums, counts, gradients of the weighted sum with respect to every tensor of the student).

    Every term counts, whatever its `since`.
    """
    leaves = replace(
        student,
        logits=student.logits.detach().requires_grad_(),
        valence=student.valence.detach().requires_grad_(),
        layers={k: v.detach().requires_grad_() for k, v in student.layers.items()},
    )
    sums, counts = objective(leaves, batch, all_count(objective))
    wanted = tensors(leaves)
    found = torch.autograd.grad(sums.sum(), wanted, allow_unused=True)
    return (
        sums.detach(),
        counts,
        [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)],
    )


@pytest.mark.parametrize("terms", CASES)
def test_values_and_gradients_are_finite_and_something_is_learnt(terms, student, batch):
    sums, counts, gradients = evaluate(objective_of(terms), student, batch)
    assert torch.isfinite(sums).all()
    assert (counts > 0).all()
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("terms", CASES)
def test_masked_places_have_no_gradient_and_garbage_there_changes_nothing(
    terms, garbage, student, batch
):
    def spoil(values: torch.Tensor) -> torch.Tensor:
        if values.dtype == torch.bool:
            return values
        values = values.clone()
        if not values.is_floating_point():  # tokens
            values[~student.mask] = -1
        elif values.shape[1] > 1:  # a pooled layer has no invalid step
            values[~student.mask] = garbage
        if values.dim() == 4:  # of one step over keys
            values.transpose(1, 3)[~student.mask] = garbage
        return values

    objective = objective_of(terms)
    sums, counts, gradients = evaluate(objective, student, batch)
    spoilt = replace(batch, teacher=mapped(batch.teacher, spoil), valence=spoil(batch.valence))
    if batch.rollout:
        spoilt = replace(spoilt, label=spoil(batch.label), rollout=changed(batch.rollout, spoil))
    sums2, counts2, gradients2 = evaluate(objective, mapped(student, spoil), spoilt)
    assert torch.equal(sums, sums2)
    assert torch.equal(counts, counts2)
    for before, after in zip(gradients, gradients2, strict=True):
        assert torch.equal(before, after)
        assert after.shape[1] == 1 or (after[~student.mask] == 0).all()


@pytest.mark.parametrize("terms", CASES)
def test_rows_may_be_permuted(terms, student, batch):
    objective = objective_of(terms)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    sums, counts, gradients = evaluate(objective, student, batch)
    sums2, counts2, gradients2 = evaluate(
        objective, mapped(student, lambda v: v[order]), rows_of(batch, order)
    )
    torch.testing.assert_close(sums2, sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, counts2)
    for before, after in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(after, before[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("terms", CASES)
def test_padding_further_changes_nothing(terms, student, batch):
    def pad(values: torch.Tensor) -> torch.Tensor:
        if values.shape[1] == 1:
            return values
        if values.dim() == 4:  # of steps over keys
            values = torch.nn.functional.pad(values, (0, 3), value=2.0)
        extra = values[:, :1].repeat(1, 3, *(1,) * (values.dim() - 2))
        return torch.cat(
            [values, torch.zeros_like(extra) if values.dtype == torch.bool else extra + 1], 1
        )

    def wider(found: Signals) -> Signals:
        return Signals(
            pad(found.logits),
            pad(found.mask),
            pad(found.valence),
            {k: pad(v) for k, v in found.layers.items()},
        )

    objective = objective_of(terms)
    sums, counts, gradients = evaluate(objective, student, batch)
    padded = replace(
        batch, mask=pad(batch.mask), valence=pad(batch.valence), teacher=wider(batch.teacher)
    )
    if batch.rollout:
        padded = replace(padded, label=pad(batch.label), rollout=changed(batch.rollout, pad))
    sums2, counts2, gradients2 = evaluate(objective, wider(student), padded)
    torch.testing.assert_close(sums2, sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, counts2)
    for before, after in zip(gradients, gradients2, strict=True):
        here = after[tuple(slice(size) for size in before.shape)]
        torch.testing.assert_close(here, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [[6], [3, 3], [1, 5], [2, 1, 3], [1] * 6], ids=str)
@pytest.mark.parametrize("terms", SPLITTABLE)
def test_splitting_a_batch_changes_nothing(terms, parts, student, batch):
    objective = objective_of(terms)
    sums, counts, gradients = evaluate(objective, student, batch)
    ends = np.cumsum(parts)
    slices = [slice(end - n, end) for end, n in zip(ends, parts, strict=True)]
    found = [
        evaluate(objective, mapped(student, lambda v, s=s: v[s]), rows_of(batch, s)) for s in slices
    ]
    torch.testing.assert_close(
        torch.stack([f[0] for f in found]).sum(0), sums, rtol=1e-6, atol=1e-6
    )
    assert torch.equal(torch.stack([f[1] for f in found]).sum(0), counts)
    for number, before in enumerate(gradients):
        torch.testing.assert_close(
            torch.cat([f[2][number] for f in found]), before, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("terms", PARTED)
def test_micro_batches_have_the_loss_and_gradient_of_the_whole(terms, student, batch):
    """Each part is divided by the counts of all, which are known before a student answers."""
    objective = objective_of(terms)
    answered = {name: layer.shape[1] for name, layer in student.layers.items()}
    progress = all_count(objective)
    weights = torch.linspace(0.5, 2, B)
    for whole in (batch, replace(batch, weight=weights), replace(batch, valence=None)):
        mine = mapped(student, lambda v: v.detach().clone())
        leaves = [v.requires_grad_() for v in tensors(mine)]
        sums, counts = objective(mine, whole, progress)
        objective.total(sums, counts).backward()
        wanted = [torch.zeros_like(v) if v.grad is None else v.grad.clone() for v in leaves]
        loss = objective.total(sums, counts)
        for micro in (1, 2, 4):
            slices = [slice(first, first + micro) for first in range(0, B, micro)]
            parts = [whole.rows(at) for at in slices]
            foretold = [
                objective.counts(Answered(student.mask[at], answered), part, progress)
                for at, part in zip(slices, parts, strict=True)
            ]
            everywhere = torch.stack(foretold).sum(0)
            assert torch.equal(everywhere, counts)
            for leaf in leaves:
                leaf.grad = None
            found = torch.zeros(())
            for at, part in zip(slices, parts, strict=True):
                part_sums, _ = objective(mine.rows(at), part, progress)
                objective.total(part_sums, everywhere).backward()
                found += objective.total(part_sums.detach(), everywhere)
            torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=1e-6)
            for leaf, before in zip(leaves, wanted, strict=True):
                after = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("terms", CASES)
def test_a_row_without_a_valid_step_counts_nothing(terms, student, batch):
    objective = objective_of(terms)
    sums, counts, _ = evaluate(
        objective, mapped(student, lambda v: v[1:]), rows_of(batch, slice(1, None))
    )
    mask = student.mask.clone()
    mask[0] = False
    empty = replace(batch, mask=mask, teacher=replace(batch.teacher, mask=mask))
    sums2, counts2, gradients = evaluate(objective, replace(student, mask=mask), empty)
    torch.testing.assert_close(sums2, sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, counts2)
    assert all((g[0] == 0).all() for g in gradients)


@pytest.mark.parametrize("terms", CASES)
def test_the_teacher_receives_no_gradient(terms, student, batch):
    mine = [v.requires_grad_() for v in tensors(student)]
    theirs = [v.requires_grad_() for v in tensors(batch.teacher)]
    objective = objective_of(terms)
    sums, _ = objective(student, batch, all_count(objective))
    sums.sum().backward()
    assert all(v.grad is None for v in theirs)
    assert any(v.grad is not None for v in mine)


@pytest.mark.parametrize("terms", CASES)
def test_halved_precision_is_computed_in_full(terms, student, batch):
    objective = objective_of(terms)
    half = mapped(student, lambda v: v.bfloat16() if v.is_floating_point() else v)
    full = mapped(half, lambda v: v.float() if v.is_floating_point() else v)
    sums, _, gradients = evaluate(objective, half, batch)
    expected, _, _ = evaluate(objective, full, batch)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, expected)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("terms", MATCHING)
def test_terms_that_read_the_teachers_logits_are_still_when_student_is_teacher(
    terms, student, batch
):
    """Twins of drafts have no rejection, and what they drew has no reward; a kink is at rest on its
    very tip.
    """
    shifted = replace(student, logits=student.logits + 3.0)
    if batch.rollout:
        steps = torch.zeros(B, T, dtype=torch.int64)
        log_q = student.logits.log_softmax(-1).gather(-1, batch.label[..., None])[..., 0]
        unrejected = {"accepted": batch.mask, "rejected": steps > 0, "tail": steps}
        batch = replace(batch, rollout=replace(batch.rollout, log_q=log_q, **unrejected))
    for twin in (student, shifted):
        sums, counts, gradients = evaluate(
            objective_of(terms), twin, replace(batch, teacher=student)
        )
        assert (counts > 0).all()
        assert sums.abs().max() < 1e-5  # float32 rounding of some 20 places, each below 1e-7
        if twin is student or next(iter(terms.values())).get("divergence") not in KINKED:
            assert all(g.abs().max() < 1e-5 for g in gradients)


@pytest.mark.parametrize("terms", MATCHING)
def test_constants_on_logits_change_nothing(terms, student, batch):
    objective = objective_of(terms)
    sums, _, _ = evaluate(objective, student, batch)
    draw = torch.Generator().manual_seed(5)
    mine, theirs = (3 * torch.randn(B, T, 1, generator=draw) for _ in range(2))
    moved = replace(batch, teacher=replace(batch.teacher, logits=batch.teacher.logits + theirs))
    sums2, _, _ = evaluate(objective, replace(student, logits=student.logits + mine), moved)
    torch.testing.assert_close(sums2, sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("terms", DIVERGENT)
def test_divergences_are_never_negative(terms, student, batch):
    sums, _, _ = evaluate(objective_of(terms), student, batch)
    assert (sums > 0).all()


@pytest.mark.parametrize("name", list(TERMS))
def test_a_term_says_what_it_computes(name):
    assert (TERMS[name].make.__doc__ or "").strip()


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_a_technique_says_what_it_is_and_names_its_source(name):
    found = TECHNIQUES[name]
    text = ast.get_docstring(ast.parse(found.path.read_text(encoding="utf-8"))) or ""
    assert found.summary
    assert found.summary == text.partition("\n")[0]
    if name != "none":
        assert re.search(r"\b(19|20)\d\d\b|\b\d{4}\.\d{4,5}\b", text)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict[str, Any]:
    """The `[teacher]` table of a tiny encoder with random weights."""
    return by_hand.teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", seed=7)


TOKENIZER = Path(__file__).parents[2] / "examples" / "code_lm" / "tokenizer.json"


def resolved(name: str, teacher: dict[str, Any]) -> Recipe:
    """A technique's recipe over gestures; one that writes its own text is resolved over text, which
    it asks for.
    """
    text = {"tokenizer": str(TOKENIZER)} if "source" in TECHNIQUES[name].recipe else {}
    found = resolve({"technique": name, "teacher": teacher, "data": {"stride": 256} | text})
    return found.model_copy(update={"data": found.data.model_copy(update={"tokenizer": None})})


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_a_techniques_recipe_resolves_and_is_its_json(name, teacher):
    found = resolved(name, teacher)
    assert set(found.terms) == set(TECHNIQUES[name].recipe["terms"])
    back = Recipe.model_validate_json(found.model_dump_json())
    assert back == found
    assert recipe_digest(back) == recipe_digest(found)


@pytest.mark.parametrize("name", list(TECHNIQUES))
def test_a_technique_needs_only_what_scoring_stores(name, teacher):
    found = resolved(name, teacher)
    scorer, dataset = by_hand.scorer_of(found)
    table = scorer.table(dataset.splits["val"].take(slice(3)))
    assert needs_of(found.terms) <= set(table.column_names)


@pytest.mark.parametrize("terms", DATA)
def test_the_loss_falls(terms, teacher):
    module = SeriesEncoder(channels=6, classes=7, **teacher["settings"])
    module.load_state_dict(load_file(teacher["weights"]))
    model = Adapter(module, want=needs_of(specs(terms)) & set(LAYERS))
    draw = torch.Generator().manual_seed(11)
    label = torch.arange(64) % 7
    inputs = torch.randn(64, 8, 6, generator=draw)
    inputs[:, :, 0] += label[:, None]
    mask = torch.arange(8) < torch.randint(4, 9, (64, 1), generator=draw)
    with torch.no_grad():
        said = model(inputs, mask)
    columns = {"logits": 3 * said.logits, "trajectory": said.valence}
    columns |= said.layers
    answer = said.sequence_logits().argmax(1)
    saliency = torch.linspace(-1, 1, 64)
    rows = DeviceRows(
        torch.arange(64),
        inputs * mask[..., None],
        mask,
        label,
        None,
        columns,
        mask,
        saliency=saliency,
        answer=answer,
    )
    torch.manual_seed(0)
    student = SeriesEncoder(channels=6, classes=7, steps=8, width=8)
    want = wants_of(specs(terms))
    optim = Optim(steps=60, batch=32, learning_rate=1e-2, evaluate_every=10)
    state = train(
        Arm("student", 0, specs(terms)), optim, Adapter(student, want=want), rows, lambda _: {}
    )
    assert state.history[-1]["loss"] < 0.9 * state.history[0]["loss"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of softmaxes, in float64."""
    log_p = log_softmax(p.astype(np.float64))
    log_q = log_softmax(q.astype(np.float64))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("t_squared", [True, False])
def test_kd_equals_the_formula(temperature, t_squared, student, batch):
    value, mask = shared_terms.kd(student, batch, temperature=temperature, t_squared=t_squared)
    expected = kl(batch.teacher.logits.numpy() / temperature, student.logits.numpy() / temperature)
    expected = expected * (temperature**2 if t_squared else 1)
    np.testing.assert_allclose(
        value.numpy(), expected, rtol=1e-5, atol=1e-5
    )  # float32: sums of C terms of size ~T
    assert torch.equal(mask, student.mask)


def test_kd_on_the_sequence_compares_mean_logits(student, batch):
    value, mask = shared_terms.kd(student, batch, temperature=2.0, on="sequence")
    assert mask.all()
    for row, steps in enumerate(student.mask.sum(1).tolist()):
        means = [z[row, :steps].numpy().mean(0) / 2 for z in (batch.teacher.logits, student.logits)]
        assert value[row].item() == pytest.approx(4 * kl(*means), rel=1e-5)


def test_kd_with_a_teacher_that_answers_once_compares_sequences(student, batch):
    once = Signals(batch.teacher.sequence_logits().unsqueeze(1), torch.ones(B, 1, dtype=torch.bool))
    value, mask = shared_terms.kd(student, replace(batch, teacher=once))
    expected, _ = shared_terms.kd(student, batch, on="sequence")
    assert mask.shape == (B,)
    assert torch.equal(value, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_the_gradient_of_kd_is_temperature_times_the_difference(temperature, student, batch):
    terms = {"kd": {"temperature": temperature, "on": "steps"}}
    _, _, gradients = evaluate(objective_of(terms), student, batch)
    q, p = ((z / temperature).double().softmax(-1) for z in (student.logits, batch.teacher.logits))
    expected = temperature * (q - p) * student.mask[..., None]
    torch.testing.assert_close(
        gradients[0].double(), expected, rtol=1e-5, atol=1e-5 * temperature
    )  # q - p cancels


def test_without_the_factor_the_gradient_of_kd_is_divided_by_temperature(student, batch):
    _, _, gradients = evaluate(
        objective_of({"kd": {"temperature": 4.0, "t_squared": False}}), student, batch
    )
    q, p = ((z / 4).double().softmax(-1) for z in (student.logits, batch.teacher.logits))
    expected = (q - p) / 4 * student.mask[..., None]
    torch.testing.assert_close(gradients[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_kd_tends_to_matching_centred_logits_as_temperature_rises(student, batch):
    z_s = student.logits.double()
    z_t = batch.teacher.logits.double()
    gap = (z_s - z_s.mean(-1, keepdim=True)) - (z_t - z_t.mean(-1, keepdim=True))
    limit = gap.square().sum(-1) / (2 * C)
    errors = []
    for temperature in (8.0, 32.0, 128.0):
        value, _ = shared_terms.kd(student, batch, temperature=temperature)
        errors.append(((value.double() - limit).abs() / limit).mean().item())
    # the next term of the series is of order 1 / T, so four times the temperature leaves about a
    # quarter of the error
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.03


def test_kd_runs_from_teacher_to_student():
    """On peaked distributions the two directions differ by far: a student that misses a mode pays
    for it.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    two_modes = torch.tensor([[[5.0, 5.0, 0.0]]])
    one_mode = torch.tensor([[[12.0, 0.0, 0.0]]])
    batch = Batch(
        torch.zeros(1), torch.zeros(1, 1, 1), mask, torch.zeros(1, dtype=torch.int64), None
    )
    value, _ = shared_terms.kd(
        Signals(one_mode, mask), replace(batch, teacher=Signals(two_modes, mask)), temperature=1.0
    )
    forward = kl(two_modes.numpy(), one_mode.numpy()).item()
    reverse = kl(one_mode.numpy(), two_modes.numpy()).item()
    assert forward > 5 * reverse
    assert value.item() == pytest.approx(forward, rel=1e-5)


def test_ce_equals_the_formula(student, batch):
    value, mask = shared_terms.ce(student, batch)
    log_q = log_softmax(student.logits.numpy().astype(np.float64))
    for row, label in enumerate(batch.label.tolist()):
        if label == UNLABELLED:
            assert not mask[row].any()
        else:
            assert torch.equal(mask[row], student.mask[row])
            np.testing.assert_allclose(
                value[row].numpy(), -log_q[row, :, label], rtol=1e-5, atol=1e-6
            )


def test_ce_on_the_sequence_judges_mean_logits(student, batch):
    value, mask = shared_terms.ce(student, batch, on="sequence")
    assert torch.equal(mask, batch.label != UNLABELLED)
    for row, steps in enumerate(student.mask.sum(1).tolist()):
        if mask[row]:
            log_q = log_softmax(student.logits[row, :steps].numpy().astype(np.float64).mean(0))
            assert value[row].item() == pytest.approx(-log_q[batch.label[row]], rel=1e-5)


@pytest.mark.parametrize("on", ["steps", "sequence"])
def test_rows_without_a_label_contribute_nothing_to_ce(on, student, batch):
    objective = objective_of({"ce": {"on": on}})
    sums, counts, gradients = evaluate(objective, student, batch)
    kept = batch.label != UNLABELLED
    sums2, counts2, _ = evaluate(
        objective, mapped(student, lambda v: v[kept]), rows_of(batch, kept)
    )
    torch.testing.assert_close(sums, sums2, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, counts2)
    assert (gradients[0][~kept] == 0).all()
    assert (gradients[0][kept].abs().amax((1, 2)) > 0).all()


def test_a_batch_without_any_label_costs_nothing(student, batch):
    objective = objective_of({"ce": {}})
    sums, counts, gradients = evaluate(
        objective, student, replace(batch, label=torch.full((B,), UNLABELLED))
    )
    assert objective.total(sums, counts).item() == 0
    assert counts.item() == 0
    assert (gradients[0] == 0).all()


def test_a_weight_of_0_for_kd_is_ce_alone_bit_for_bit(student, batch):
    alone = objective_of({"ce": {"weight": 0.7}})
    both = objective_of({"ce": {"weight": 0.7}, "kd": {"weight": 0.0}})
    found = [evaluate(objective, student, batch) for objective in (alone, both)]
    assert torch.equal(alone.total(*found[0][:2]), both.total(*found[1][:2]))
    assert torch.equal(found[0][2][0], found[1][2][0])
    assert both.needs == frozenset()


def test_a_weight_of_0_for_ce_ignores_labels(student, batch):
    objective = objective_of({"ce": {"weight": 0.0}, "kd": {"weight": 1.0}})
    other = replace(batch, label=torch.tensor([3, 3, UNLABELLED, 0, 2, UNLABELLED]))
    found = [evaluate(objective, student, b) for b in (batch, other)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2][0], found[1][2][0])


def test_the_loss_is_the_weighted_sum_of_means(student, batch):
    objective = objective_of({"ce": {"weight": 0.2}, "kd": {"weight": 0.8, "temperature": 3.0}})
    sums, counts, _ = evaluate(objective, student, batch)
    parts = [shared_terms.ce(student, batch), shared_terms.kd(student, batch, temperature=3.0)]
    means = [value[mask].double().mean().item() for value, mask in parts]
    assert objective.total(sums, counts).item() == pytest.approx(
        0.2 * means[0] + 0.8 * means[1], rel=1e-6
    )
    assert counts.tolist() == [int(mask.sum()) for _, mask in parts]


def test_future_valence_is_the_squared_error_against_the_discounted_mean():
    mask = torch.tensor([[True, True, True]])
    guess = Signals(torch.zeros(1, 3, 2), mask, torch.tensor([[0.5, 0.0, -0.5]]))
    column = torch.tensor([[1.0, -0.5, 0.25]])
    row = Batch(
        torch.zeros(1), torch.zeros(1, 3, 1), mask, torch.zeros(1, dtype=torch.int64), column
    )
    value, known = shared_terms.future_valence(guess, row, discount=0.5)
    future = [(1 - 0.25 + 0.0625) / 1.75, (-0.5 + 0.125) / 1.5, 0.25]
    assert known.all()
    expected = [(g - f) ** 2 for g, f in zip([0.5, 0, -0.5], future, strict=True)]
    np.testing.assert_allclose(
        value[0].numpy(), expected, rtol=1e-5
    )  # float32; the difference of near numbers


def test_future_valence_falls_back_on_the_confidence_in_the_true_label():
    mask = torch.ones(1, 2, dtype=torch.bool)
    logits = torch.tensor([[[0.0, np.log(3.0)], [0.0, np.log(3.0)]]], dtype=torch.float32)
    row = Batch(torch.zeros(1), torch.zeros(1, 2, 1), mask, torch.tensor([1]), None)
    value, _ = shared_terms.future_valence(Signals(logits, mask, torch.zeros(1, 2)), row)
    np.testing.assert_allclose(value.numpy(), 0.25, rtol=1e-6)  # p = 3/4 throughout, so v = F = 1/2


def test_future_valence_leaves_the_logits_alone(student, batch):
    _, _, gradients = evaluate(
        objective_of({"future_valence": {}}), student, replace(batch, valence=None)
    )
    assert (gradients[0] == 0).all()
    assert gradients[1].abs().sum() > 0


@pytest.mark.parametrize("name", ["future_valence", "value"])
def test_a_student_without_a_value_head_is_a_fault_of_the_recipe(name, student, batch):
    """Exit code 2, as the user can mend it: never 5, which asks to try again."""
    with pytest.raises(RecipeError, match=rf"^terms\.{name}: .*no value head.*return 'valence'"):
        TERMS[name].make(replace(student, valence=None), batch)


def stored(name: str) -> bool:
    """Whether a technique's teacher is its store alone."""
    return (
        bool(needs_of(specs(TECHNIQUES[name].recipe["terms"])))
        and "source" not in TECHNIQUES[name].recipe
    )


@pytest.mark.parametrize("name", list(filter(stored, TECHNIQUES)))
def test_a_student_is_trained_where_there_is_no_teacher(name, tmp_path, monkeypatch):
    """Scored once; then the weights are gone, and an attempt to build a teacher fails the test."""
    weights = tmp_path / "teacher.safetensors"
    recipe = resolve(
        {
            "technique": name,
            "teacher": by_hand.teacher(weights),
            "data": {"stride": 128},
            "optim": {"steps": 40, "batch": 16, "evaluate_every": 20},
        }
    )
    store = by_hand.score(recipe, tmp_path / "stores")
    weights.unlink()
    built = []
    build = models.build_model
    monkeypatch.setattr(
        models,
        "build_model",
        lambda *args, key, **shape: built.append(key) or build(*args, key=key, **shape),
    )
    run_arms(
        recipe,
        store,
        tmp_path / "run",
        world=World(),
        device=torch.device("cpu"),
        report=lambda key, step, metrics: None,
    )
    assert set(built) == {"student"}
    arms = {"student-0", "control-0"} | ({"unrounded-0"} if recipe.phases else set())
    assert {path.name for path in (tmp_path / "run" / "arms").iterdir()} == arms
