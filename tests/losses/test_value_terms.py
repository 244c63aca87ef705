"""Where a value head is asked: at the steps of the row, where the future is known, in one document.

The references are the same rows without padding, documents that stand alone, and numbers by hand.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.losses.objective import Objective
from raykd.losses.shared_terms import future_valence, kd, value
from raykd.losses.terms import TERMS, TermValues
from raykd.losses.valence import at_last_step, realised_future
from raykd.models.adapter import Adapter
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Signals
from raykd.techniques.attention import attention
from raykd.training.device_rows import DeviceRows

CHANNELS = 3
CLASSES = 4
LENGTHS = (5, 2, 3)


class OnceWithHead(nn.Module):
    """Answers once a row, and has a value at every step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(CHANNELS, CLASSES)
        self.value = nn.Linear(CHANNELS, 1)

    def forward(self, inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
        mean = (inputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.head(mean), "valence": self.value(inputs)[..., 0].tanh()}


def rows_of(steps: int, trajectory: Tensor | None = None, **fields: Tensor) -> DeviceRows:
    mask = torch.arange(steps) < torch.tensor(LENGTHS)[:, None]
    inputs = torch.randn(3, 5, CHANNELS, generator=torch.Generator().manual_seed(1))
    inputs = nn.functional.pad(inputs, (0, 0, 0, steps - 5)) * mask[..., None]
    given = {
        "row_id": torch.arange(3),
        "inputs": inputs,
        "mask": mask,
        "label": torch.tensor([0, 1, 3]),
        "valence": None,
        "teacher": {},
        "teacher_mask": None,
    }
    if trajectory is not None:
        logits = torch.zeros(3, 1, CLASSES)
        teacher = {"trajectory": nn.functional.pad(trajectory, (0, steps - 5)), "logits": logits}
        given |= {"teacher": teacher, "teacher_mask": torch.ones(3, 1, dtype=torch.bool)}
    return DeviceRows(**given | fields)


def measured(rows: DeviceRows, **terms: dict) -> tuple[float, float, list[Tensor]]:
    """(sum, count, gradients of the value head) of one term for a student that answers once."""
    adapter = Adapter(OnceWithHead())
    batch = rows.batch(torch.arange(3))
    specs = {name: TermSpec.model_validate(table) for name, table in terms.items()}
    sums, counts = Objective(specs)(adapter(batch.inputs, batch.mask), batch)
    sums.sum().backward()
    head = adapter.module.value
    assert head.weight.grad is not None
    return sums.item(), counts.item(), [head.weight.grad, head.bias.grad]


FUTURE = torch.linspace(-0.9, 0.8, 15).reshape(3, 5)


@pytest.mark.parametrize("steps", [5, 9])
def test_a_value_head_of_a_student_that_answers_once_counts_at_its_steps(steps):
    rows = rows_of(steps, FUTURE)
    total, count, gradients = measured(rows, value={})
    said = OnceWithHead()(rows.inputs[:, :5], rows.mask[:, :5])["valence"]
    apart = (said - FUTURE).square()
    assert count == sum(LENGTHS)
    assert total == pytest.approx(sum(apart[i, :n].sum().item() for i, n in enumerate(LENGTHS)))
    for mine, short in zip(gradients, measured(rows_of(5, FUTURE), value={})[2], strict=True):
        torch.testing.assert_close(mine, short)


@pytest.mark.parametrize("steps", [5, 9])
def test_such_a_student_is_held_against_its_confidence_after_the_last_step(steps):
    total, count, _ = measured(rows_of(steps), future_valence={"discount": 0.5})
    rows = rows_of(5)
    answer = OnceWithHead()(rows.inputs, rows.mask)
    sure = 2 * answer["logits"].softmax(1)[torch.arange(3), rows.label] - 1
    apart = (answer["valence"] - sure[:, None]).square()  # one known step: the future is its value
    assert count == sum(LENGTHS)
    assert total == pytest.approx(sum(apart[i, :n].sum().item() for i, n in enumerate(LENGTHS)))


def test_an_answer_to_a_row_is_a_valence_at_its_last_step():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    found = at_last_step(torch.tensor([[0.5], [-0.5], [1.0]]), mask)
    assert torch.equal(
        found.nan_to_num(9), torch.tensor([[9, 0.5, 9], [9, 9, -0.5], [9.0, 9.0, 9.0]])
    )


def test_value_counts_nowhere_where_the_future_is_unknown():
    """It was learnt as 0 there."""
    unknown = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    total, count, gradients = measured(rows_of(5, FUTURE.masked_fill(unknown, torch.nan)), value={})
    rows = rows_of(5)
    said = OnceWithHead()(rows.inputs, rows.mask)["valence"]
    counted = rows.mask & ~unknown
    assert count == counted.sum() == 4
    assert total == pytest.approx((said - FUTURE).square()[counted].sum().item())
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_other_steps_than_those_of_the_row_are_refused():
    class Longer(OnceWithHead):
        def forward(self, inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
            said = super().forward(inputs, mask)
            return said | {"valence": torch.cat([said["valence"]] * 2, 1)}

    class Twice(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.cat([inputs, inputs], 1)

    rows = rows_of(5)
    with pytest.raises(RecipeError, match=r"of 5 steps with valence \(3, 10\); give \(3, 5\)"):
        Adapter(Longer())(rows.inputs, rows.mask)
    with pytest.raises(RecipeError, match=r"with logits \(3, 10, 3\); give .* one answer"):
        Adapter(Twice())(rows.inputs, rows.mask)


def test_values_and_where_they_count_must_have_one_shape(monkeypatch):
    def spread(student: Signals, batch: Batch) -> TermValues:
        return TermValues(student.logits[..., 0].expand(-1, 5), student.mask)

    monkeypatch.setitem(TERMS, "spread", TERMS["ce"]._replace(make=spread))
    with pytest.raises(RecipeError, match=r"terms\.spread: gives values \(3, 5\) .* \(3, 1\)"):
        measured(rows_of(5), spread={})


# documents in one row


PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [2, 3, 0, 0, 1, 2, 3, 4]])
DOCUMENTS = [  # (row, first step, end)
    (0, 0, 4),
    (0, 4, 7),
    (0, 7, 8),
    (1, 0, 2),
    (1, 2, 3),
    (1, 3, 8),
]


def packed(**fields: object) -> Batch:
    tokens = torch.stack([torch.arange(16).reshape(2, 8), PLACES], -1).int()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :2] = False  # a prompt
    mask[1, 4] = False
    return Batch(torch.arange(2), tokens, mask, torch.zeros(2, 8, dtype=torch.int64), **fields)


def alone(batch: Batch, row: int, first: int, end: int) -> Batch:
    """One document of a batch as a row."""
    at = (slice(row, row + 1), slice(first, end))
    valence = None if batch.valence is None else batch.valence[at]
    parts = {name: getattr(batch, name)[at] for name in ("inputs", "mask", "label")}
    return replace(batch, row_id=batch.row_id[row : row + 1], valence=valence, **parts)


def test_steps_of_text_are_numbered_by_document_and_series_have_none():
    assert packed().document.tolist() == [[1, 1, 1, 1, 2, 2, 2, 3], [0, 0, 1, 2, 2, 2, 2, 2]]
    assert rows_of(5).batch(torch.arange(3)).document is None


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_a_future_ends_with_its_document(discount):
    batch = packed(valence=torch.linspace(-1, 1, 16).reshape(2, 8).roll(3, 1))
    found, known = realised_future(batch.valence, batch.mask, discount, batch.document)
    for row, first, end in DOCUMENTS:
        part = alone(batch, row, first, end)
        expected, expected_known = realised_future(part.valence, part.mask, discount)
        torch.testing.assert_close(found[row, first:end], expected[0])
        assert torch.equal(known[row, first:end], expected_known[0])


def test_a_value_head_of_text_learns_the_future_of_its_document():
    batch = packed(valence=torch.linspace(-1, 1, 16).reshape(2, 8))
    head = torch.linspace(1, 0, 16).reshape(2, 8)
    logits = torch.zeros(2, 8, 4)
    found = future_valence(Signals(logits, batch.mask, head), batch)
    for row, first, end in DOCUMENTS:
        part = alone(batch, row, first, end)
        at = (slice(row, row + 1), slice(first, end))
        expected = future_valence(Signals(logits[at], part.mask, head[at]), part)
        torch.testing.assert_close(found.value[at], expected.value)


@pytest.mark.parametrize(
    ("mode", "shape"), [("relation", (8, 6)), ("scores", (8, 2, 8))], ids=["relation", "scores"]
)
def test_documents_do_not_see_each_other_in_attention_terms(mode, shape):
    kind = "scores" if mode == "scores" else "hidden"
    draw = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, *shape, generator=draw) for _ in range(2))
    logits = torch.zeros(2, 8, 4)

    def value_of(batch: Batch, mine: Tensor, theirs: Tensor, logits: Tensor) -> Tensor:
        teacher = Signals(logits, batch.mask, layers={f"{kind}.b": theirs})
        student = Signals(logits, batch.mask, layers={f"{kind}.a": mine})
        found = attention(student, replace(batch, teacher=teacher), pairs=[("a", "b")], mode=mode)
        return torch.where(found.mask, found.value, 0.0)

    batch = packed()
    found = value_of(batch, mine, theirs, logits)
    for row, first, end in DOCUMENTS:
        at = (slice(row, row + 1), slice(first, end))
        keys = (*at, slice(None), slice(first, end)) if mode == "scores" else at
        part = alone(batch, row, first, end)
        expected = value_of(part, mine[keys], theirs[keys], logits[at])
        torch.testing.assert_close(found[at], expected)


def test_the_mean_over_a_row_of_text_is_no_answer():
    batch = packed()
    signals = Signals(torch.zeros(2, 8, 4), batch.mask)
    with pytest.raises(RecipeError, match=r'terms\.kd: text .* on = "steps"'):
        kd(signals, replace(batch, teacher=signals), on="sequence")
    trajectory = replace(batch, teacher=Signals(signals.logits, batch.mask, torch.zeros(2, 1)))
    with pytest.raises(RecipeError, match=r"terms\.value: the student answers at 8 steps"):
        value(replace(signals, valence=torch.zeros(2, 8)), trajectory)
