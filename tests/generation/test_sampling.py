"""Text that the student writes: drawn from what it says, scored where it says it, verified as
speculative sampling is.

Distributions stand against the models' own probabilities, within 4 standard errors of a fixed draw.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raykd.errors import DataError, RecipeError
from raykd.generation.drafts import draft_rows
from raykd.generation.sampling import (
    FrozenTeacher,
    TeacherMix,
    cut_prompts,
    inverse_cdf,
    on_policy,
    sample,
)
from raykd.models.llama import Llama
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.quant import Quant
from raykd.signals import Batch, Signals
from raykd.techniques.gkd import gkd
from raykd.training import phases

V = 7
STEPS = 20
EOS = 3
MAKERS = {"on_policy": on_policy, "drafted": draft_rows}


def llama(seed: int, classes: int = V, width: int = 16) -> Llama:
    """Weights large enough that no distribution is flat."""
    torch.manual_seed(seed)
    module = Llama(classes=classes, steps=STEPS, width=width, layers=2, inner=24)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return module


@pytest.fixture(scope="module")
def student() -> Llama:
    return llama(0)


@pytest.fixture(scope="module")
def teacher() -> FrozenTeacher:
    return FrozenTeacher(llama(1, width=24))


def text(rows: int, count: int, seed: int = 0) -> Tensor:
    """(rows, count, 2): random tokens of one document a row."""
    tokens = torch.randint(V, (rows, count), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens, torch.arange(count).expand(rows, -1)], -1).int()


def uniforms(rows: int, count: int, seed: int = 1) -> Tensor:
    return torch.rand(
        rows, count, dtype=torch.double, generator=torch.Generator().manual_seed(seed)
    )


def made(name: str, student: Any, teacher: Any, prompt: Tensor, count: int, **how: Any) -> Batch:
    """A batch of either kind, `count` tokens a row."""
    numbers = uniforms(len(prompt), count if name == "on_policy" else 2 * count + 1)
    return MAKERS[name](
        student, teacher, prompt, row_id=torch.arange(len(prompt)), uniforms=numbers, **how
    )()


def log_q_of(module: Any, inputs: Tensor, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        return (module.eval()(inputs)["logits"].double() / temperature).log_softmax(-1)


def near(found: Tensor, expected: Tensor, trials: int) -> bool:
    """Frequencies within 4 standard errors of the probabilities."""
    return bool(
        ((found - expected).abs() <= 4 * (expected * (1 - expected) / trials).sqrt() + 1e-9).all()
    )


def frequencies(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens, minlength=V).double() / len(tokens)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0, 1, exclude_max=True))
def test_a_drawn_class_holds_its_uniform_and_is_possible(weights, uniform):
    p = torch.tensor([[*weights, 0.5]], dtype=torch.double)
    found = int(inverse_cdf(p, torch.tensor([uniform], dtype=torch.double)))
    below = p.cumsum(1)[0] / p.sum()
    assert p[0, found] > 0
    assert below[found] >= uniform - 1e-15
    assert found == 0 or below[found - 1] <= uniform + 1e-15


def test_the_last_uniform_below_one_draws_the_last_possible_class():
    p = torch.tensor([[0.1] * 10, [0.3, 0.7] + [0.0] * 8], dtype=torch.double)
    assert inverse_cdf(p, torch.full((2,), 1 - 2.0**-53, dtype=torch.double)).tolist() == [9, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_drawn_as_the_student_says(student, temperature):
    rows = 20_000
    prompt = text(1, 4).expand(rows, -1, -1)
    drawn = sample(student, prompt, uniforms=uniforms(rows, 2), temperature=temperature)
    first = log_q_of(student, prompt[:1], temperature)[0, -1].exp()
    assert near(frequencies(drawn.inputs[:, 0, 0]), first, rows)
    token = int(first.argmax())
    same = drawn.inputs[:, 0, 0] == token
    longer = torch.cat([prompt[:1], torch.tensor([[[token, 4]]])], 1)
    second = log_q_of(student, longer, temperature)[0, -1].exp()
    assert near(frequencies(drawn.inputs[same, 1, 0]), second, int(same.sum()))


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_mixed_tokens_come_from_the_mixture_with_bounded_weights(student, teacher, share):
    rows = 20_000
    prompt = text(1, 4).expand(rows, -1, -1)
    drawn = sample(student, prompt, uniforms=uniforms(rows, 1), mixed=TeacherMix(share, teacher))
    q, p = (log_q_of(m, prompt[:1])[0, -1].exp() for m in (student, teacher.module))
    mixture = share * p + (1 - share) * q
    assert near(frequencies(drawn.inputs[:, 0, 0]), mixture, rows)
    torch.testing.assert_close(
        drawn.weight[:, 0], (q / mixture)[drawn.inputs[:, 0, 0]], rtol=1e-5, atol=1e-6
    )
    assert drawn.weight.max() <= 1 / (1 - share) + 1e-12


def test_a_share_of_nothing_is_the_students_own_text_with_weights_of_one(student, teacher):
    plain = sample(student, text(64, 4), uniforms=uniforms(64, 6))
    mixed = sample(student, text(64, 4), uniforms=uniforms(64, 6), mixed=TeacherMix(0.0, teacher))
    assert torch.equal(plain.inputs, mixed.inputs)
    assert (plain.weight == 1).all()
    assert (mixed.weight == 1).all()


def test_a_teacher_without_a_cache_is_read_again_to_the_same_end(student, teacher):
    class Remote:
        def ask(self, inputs: Tensor) -> Callable[[], Tensor]:
            return teacher.ask(inputs)

    found = [
        sample(student, text(64, 4), uniforms=uniforms(64, 6), mixed=TeacherMix(0.5, t))
        for t in (teacher, Remote())
    ]
    assert torch.equal(found[0].inputs, found[1].inputs)
    torch.testing.assert_close(found[0].weight, found[1].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", MAKERS)
def test_a_position_is_about_the_token_after_it(name, temperature, eos, student, teacher):
    """Probabilities of drawing, through the cache, are those of one pass over the whole text, a
    position earlier.
    """
    prompt = text(32, 5)
    count = 6
    batch = made(name, student, teacher, prompt, count, temperature=temperature, eos=eos)
    assert batch.inputs.shape == (32, 5 + count - 1, 2)
    assert torch.equal(batch.inputs[:, :5], prompt)
    assert torch.equal(batch.inputs[:, 1:, 0], batch.label[:, :-1])
    assert torch.equal(batch.inputs[..., 1], torch.arange(5 + count - 1).expand(32, -1))
    assert not batch.mask[:, :4].any()
    assert batch.mask[:, 4].all()
    assert batch.rollout
    assert batch.teacher
    log_q = log_q_of(student, batch.inputs, temperature).gather(-1, batch.label[..., None])[..., 0]
    torch.testing.assert_close(
        batch.rollout.log_q[batch.mask].double(), log_q[batch.mask], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(batch.teacher.logits, teacher.signals(batch.inputs).logits)
    assert torch.equal(batch.teacher.mask, batch.mask)


@pytest.mark.parametrize("name", MAKERS)
def test_a_text_ends_with_its_end_of_text_token_which_counts(name, student, teacher):
    batch = made(name, student, teacher, text(64, 5), 6, eos=EOS)
    ended = (batch.label == EOS) & batch.mask
    assert (ended.sum(1) <= 1).all()
    assert ended.any(1).float().mean() > 0.2
    lengths = torch.where(ended.any(1), ended.long().argmax(1) - 3, 6)
    assert torch.equal(batch.mask.sum(1), lengths)
    assert made(name, student, teacher, text(64, 5), 6).mask.sum() == 64 * 6


def test_rows_are_drawn_alike_however_they_are_shared_out(student, teacher):
    prompt = text(64, 5)
    numbers = uniforms(64, 6)
    whole = sample(student, prompt, uniforms=numbers, mixed=TeacherMix(0.2, teacher))
    for parts in ([32, 32], [1, 20, 43]):
        shares = zip(prompt.split(parts), numbers.split(parts), strict=True)
        found = [sample(student, p, uniforms=u, mixed=TeacherMix(0.2, teacher)) for p, u in shares]
        assert torch.equal(torch.cat([f.inputs for f in found]), whole.inputs)


def test_short_prompts_are_continued_as_if_they_stood_alone(student):
    rows = text(4, 8)
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 8])[:, None]
    mask[0, :4] = (
        False  # an instruction of five tokens, of which the last tells the first of its answer
    )
    prompt = cut_prompts(rows, mask, 6, 8)
    numbers = uniforms(4, 4)
    together = sample(student, prompt, uniforms=numbers)
    for row, size in enumerate([5, 3, 5, 6]):
        assert torch.equal(prompt[row, 6 - size :], rows[row, :size])
        assert (prompt[row, : 6 - size, 1] == 0).all()
        alone = sample(student, rows[row : row + 1, :size], uniforms=numbers[row : row + 1])
        assert torch.equal(alone.inputs, together.inputs[row : row + 1])
        torch.testing.assert_close(alone.log_q, together.log_q[row : row + 1], rtol=1e-5, atol=1e-5)


def test_of_an_instruction_too_long_the_end_is_continued(student):
    rows = text(2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :6] = False
    prompt = cut_prompts(rows, mask, 3, 4)
    numbers = uniforms(2, 4)
    assert torch.equal(prompt[0, :, 0], rows[0, 3:7, 0])
    assert prompt[:, :, 1].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    alone = sample(student, prompt[:1], uniforms=numbers[:1])
    assert torch.equal(alone.inputs, sample(student, prompt, uniforms=numbers).inputs[:1])


def test_what_a_quantised_student_drafts_is_drawn_from_its_rounded_weights(teacher):
    student = llama(0)
    full = copy.deepcopy(student)
    phases.round_as(student, Quant(weights="ternary", activations="none"))
    batch = made("drafted", student, teacher, text(64, 5), 6)
    assert batch.rollout
    rounded, shadow = (
        log_q_of(m, batch.inputs).gather(-1, batch.label[..., None])[..., 0]
        for m in (student, full)
    )
    torch.testing.assert_close(
        batch.rollout.log_q[batch.mask].double(), rounded[batch.mask], rtol=1e-4, atol=1e-4
    )
    assert (batch.rollout.log_q.double() - shadow)[batch.mask].abs().mean() > 0.1


def test_int8_activations_by_token_draw_what_the_whole_pass_scores_up_to_flips_at_ties(teacher):
    student = llama(0)
    phases.round_as(student, Quant(weights="int8", activations="int8_token"))
    batch = made("drafted", student, teacher, text(64, 5), 6)
    assert batch.rollout
    whole = log_q_of(student, batch.inputs).gather(-1, batch.label[..., None])[..., 0]
    apart = (batch.rollout.log_q.double() - whole)[batch.mask].abs()
    assert (apart < 1e-4).double().mean() > 0.95


def test_nothing_is_dropped_while_it_writes_and_every_mode_is_restored(teacher):
    student: Any = llama(0).train()
    student.model.norm = nn.Sequential(student.model.norm, nn.Dropout(0.5))
    student.lm_head.eval()
    modes = [m.training for m in student.modules()]
    first, second = (made("on_policy", student, teacher, text(16, 5), 6) for _ in range(2))
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(first.label, second.label)
    assert first.rollout
    log_q = log_q_of(student, first.inputs).gather(-1, first.label[..., None])[..., 0]
    torch.testing.assert_close(
        first.rollout.log_q[first.mask].double(), log_q[first.mask], rtol=1e-5, atol=1e-5
    )


def test_no_gradient_flows_through_the_sampling_or_the_teacher(student, teacher):
    batch = made("on_policy", student, teacher, text(4, 5), 6, mixed=0.3)
    assert batch.rollout
    assert batch.teacher
    assert not any(
        x.requires_grad for x in (batch.rollout.log_q, batch.rollout.weight, batch.teacher.logits)
    )


@pytest.mark.parametrize("name", MAKERS)
def test_padded_columns_are_never_drawn_and_take_no_gradient(name):
    student = llama(0, classes=V + 3)
    teacher = FrozenTeacher(llama(1, classes=V + 5))
    batch = made(name, student, teacher, text(64, 5), 6, vocab=V)
    assert batch.label.max() < V
    assert batch.teacher
    assert batch.teacher.logits.shape[-1] == V
    logits = student(batch.inputs)["logits"].detach().requires_grad_()
    gkd(Signals(logits, batch.mask), batch).value.sum().backward()
    assert logits.grad is not None
    assert (logits.grad[..., V:] == 0).all()
    assert logits.grad[..., :V].abs().sum() > 0


@pytest.mark.parametrize("name", MAKERS)
def test_what_can_not_be_written_is_said(name, student, teacher):
    with pytest.raises(
        RecipeError, match=r"teacher's head has 9 columns and the student's 7.*give vocab ="
    ):
        made(name, student, FrozenTeacher(llama(1, classes=9)), text(2, 5), 6)
    with pytest.raises(
        DataError, match=r"18 tokens of prompt and 6 new ones make 23 positions.*built for 20"
    ):
        made(name, student, teacher, text(2, 18), 6)
    with pytest.raises(RecipeError, match="SeriesEncoder keeps no cache"):
        made(name, SeriesEncoder(channels=2, classes=V, steps=8), teacher, text(2, 5), 6)


def test_a_text_may_fill_the_context_to_its_last_position(student, teacher):
    assert made("on_policy", student, teacher, text(2, STEPS - 5), 6).inputs.shape[1] == STEPS


@pytest.fixture(scope="module")
def many(student, teacher) -> Batch:
    """One context, drafted after twenty thousand times, two tokens each."""
    return made("drafted", student, teacher, text(1, 4).expand(20_000, -1, -1), 2)


def test_a_draft_is_accepted_as_often_as_the_distributions_overlap(many, student, teacher):
    q, p = (log_q_of(m, many.inputs[:1, :4])[0, -1].exp() for m in (student, teacher.module))
    overlap = torch.minimum(p, q).sum()
    found = many.rollout.accepted[:, 3].double().mean()
    assert 0.2 < overlap < 0.9
    assert near(found, overlap, len(many.label))


def test_what_verification_puts_out_is_distributed_as_the_teacher(many, teacher):
    """The first token, and the second after one context of the first (arXiv 2211.17192, appendix
    A.1).
    """
    r = many.rollout
    out = torch.where(r.rejected, r.correction, many.label)
    first = log_q_of(teacher.module, many.inputs[:1, :4])[0, -1].exp()
    assert near(frequencies(out[:, 3]), first, len(out))
    token = int(frequencies(many.label[r.accepted[:, 3], 3]).argmax())
    same = r.accepted[:, 3] & (many.label[:, 3] == token)
    second = log_q_of(teacher.module, many.inputs[same][:1])[0, -1].exp()
    assert near(frequencies(out[same, 4]), second, int(same.sum()))


@pytest.mark.parametrize("eos", [None, EOS])
def test_a_draft_is_accepted_then_rejected_once_and_then_a_tail(eos, student, teacher):
    batch = made("drafted", student, teacher, text(256, 5), 6, eos=eos)
    r = batch.rollout
    assert r
    assert r.accepted is not None
    assert r.rejected is not None
    assert r.tail is not None
    parts = r.accepted.long() + r.rejected.long() + (r.tail > 0).long()
    assert torch.equal(parts, batch.mask.long())
    assert (r.rejected.sum(1) <= 1).all()
    for row in range(256):
        order = "".join(
            "a" if a else "r" if j else "t"
            for a, j, m in zip(r.accepted[row], r.rejected[row], batch.mask[row], strict=True)
            if m
        )
        assert order == "a" * order.count("a") + "r" * order.count("r") + "t" * order.count("t")
        assert ("t" in order) <= ("r" in order)
        assert r.tail[row][r.tail[row] > 0].tolist() == list(range(1, order.count("t") + 1))
    assert {"r", "t"} <= {"r" if r.rejected.any() else "", "t" if (r.tail > 0).any() else ""}


def test_a_student_that_is_its_teacher_is_never_rejected(student):
    batch = made("drafted", student, FrozenTeacher(copy.deepcopy(student)), text(256, 5), 6)
    assert batch.rollout
    assert torch.equal(batch.rollout.accepted, batch.mask)
