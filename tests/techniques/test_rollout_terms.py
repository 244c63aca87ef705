"""Gradients of the on-policy terms against full enumeration, closed forms, and draws.

The reference is autograd through the exact objective in float64: KL(q || p) over all texts of a
vocabulary of three (MiniLLM, arXiv 2306.08543, eq. 1), and sums over all outcomes of verifying a
draft.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from child import start, wait
from safetensors.torch import load_file, save_file
from torch import Tensor

from raykd import techniques
from raykd.errors import RecipeError
from raykd.generation.own_rows import TextShape, write_rows
from raykd.generation.sampling import FrozenTeacher
from raykd.losses.divergences import divergence
from raykd.losses.objective import Objective
from raykd.losses.returns import returns_to_go, whitened
from raykd.models.llama import Llama
from raykd.recipe.source import Source
from raykd.recipe.tables import TermSpec
from raykd.signals import Batch, Rollout, Signals
from raykd.techniques.distilspec import distilspec
from raykd.techniques.ghost import ghost
from raykd.techniques.gkd import gkd
from raykd.techniques.minillm import minillm
from raykd.training.arm import World

techniques.load_terms()
V = 3
LENGTH = 3
EOS = 2
EXACT: dict[str, Any] = {"discount": 1.0, "normalise": False, "clip": 1e9}
KINDS = ("forward", "reverse", "js", "tvd", "lk", "hybrid")


class Tabular:
    """All texts of LENGTH tokens, and two models: a row of float64 logits for each prefix."""

    def __init__(self, eos: int | None, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        numbers = {
            prefix: n
            for n, prefix in enumerate(
                p for k in range(LENGTH) for p in product(range(V), repeat=k)
            )
        }
        self.mine, self.theirs = (
            torch.randn(len(numbers), V, generator=draw, dtype=torch.double) for _ in range(2)
        )
        self.mine.requires_grad_()
        texts = [
            t
            for t in product(range(V), repeat=LENGTH)
            if eos not in t or not any(t[t.index(eos) + 1 :])
        ]
        self.label = torch.tensor(texts)
        self.at = torch.tensor([[numbers[t[:i]] for i in range(LENGTH)] for t in texts])
        ended = (self.label == eos).cumsum(1) if eos is not None else torch.zeros_like(self.label)
        self.mask = (ended - (self.label == eos).long() if eos is not None else ended) == 0

    def log(self, table: Tensor) -> Tensor:
        """(texts, LENGTH): log probabilities of each token under one of the tables, 0 after the
        end.
        """
        found = table[self.at].log_softmax(-1).gather(-1, self.label[..., None])[..., 0]
        return torch.where(self.mask, found, 0.0)

    def exact(self) -> Tensor:
        """The gradient of KL(q || p) over texts in the student's table."""
        log_q = self.log(self.mine).sum(1)
        return torch.autograd.grad(
            (log_q.exp() * (log_q - self.log(self.theirs).sum(1))).sum(), self.mine
        )[0]

    def estimated(self, share: float = 0.0, weight_of: Any = None, **settings: Any) -> Tensor:
        """The mean of minillm's gradient over all texts, each as likely as it is drawn."""
        log_q = self.log(self.mine).detach()
        log_p = self.log(self.theirs)
        mixture = share * log_p.exp() + (1 - share) * log_q.exp()
        weight = log_q.exp() / mixture
        batch = Batch(
            torch.arange(len(self.label)),
            torch.zeros(*self.label.shape, 2),
            self.mask,
            self.label,
            teacher=Signals(self.theirs[self.at], self.mask),
            rollout=Rollout(log_q, weight if weight_of is None else weight_of(weight), 0),
        )
        value, mask = minillm(Signals(self.mine[self.at], self.mask), batch, **EXACT | settings)
        return torch.autograd.grad(
            (mixture.prod(1) * torch.where(mask, value, 0.0).sum(1)).sum(), self.mine
        )[0]


def apart(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("eos", [None, EOS])
def test_the_texts_are_all_texts(eos):
    table = Tabular(eos)
    assert len(table.label) == (27 if eos is None else 1 + 2 + 4 + 8)
    for logits in (table.mine, table.theirs):
        assert table.log(logits).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("weights", ["token", "prefix"])
def test_minillms_mean_gradient_is_that_of_the_kl_over_texts(weights, eos):
    table = Tabular(eos)
    assert apart(table.estimated(weights=weights), table.exact()) < 1e-10


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_teacher_mixed_texts_with_products_of_weights_are_exact(share, eos):
    table = Tabular(eos)
    assert apart(table.estimated(share, weights="prefix"), table.exact()) < 1e-10


def test_weights_of_one_token_are_biased_in_proportion_to_the_teachers_share():
    """At 0.2 by three tenths of the gradient, the mean over eight pairs of random models."""
    found = [Tabular(None, seed) for seed in range(8)]
    bias = {
        share: sum(apart(t.estimated(share), t.exact()) for t in found) / 8
        for share in (0.05, 0.1, 0.2)
    }
    assert 0.2 < bias[0.2] < 0.4
    assert bias[0.1] / bias[0.05] == pytest.approx(2, rel=0.05)
    assert bias[0.2] / bias[0.1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    "change", [{"include_current_reward": True}, {"discount": 0.5}, {"discount": 0.0}]
)
def test_counting_a_reward_twice_or_discounting_is_another_gradient(change):
    table = Tabular(None)
    assert apart(table.estimated(**change), table.exact()) > 0.05


def test_without_a_future_only_the_single_step_part_is_left():
    table = Tabular(None)
    log_q = table.log(table.mine).detach()
    rows = table.mine[table.at].log_softmax(-1)
    theirs = table.theirs[table.at].log_softmax(-1)
    single = (log_q.sum(1).exp()[:, None] * (rows.exp() * (rows - theirs)).sum(-1)).sum()
    expected = torch.autograd.grad(single, table.mine)[0]
    assert apart(table.estimated(discount=0.0), expected) < 1e-10


@pytest.mark.parametrize(
    "settings", [{}, {"normalise": True}, {"include_current_reward": True}, {"weights": "prefix"}]
)
def test_a_student_that_is_its_teacher_has_no_expected_gradient(settings):
    table = Tabular(None)
    table.theirs = table.mine.detach() + 2.0
    assert table.estimated(0.3, **settings).abs().max() < 1e-12


def test_a_return_is_relative_and_counts_what_remains():
    mask = torch.tensor([[False, True, True, True, False]])
    reward = torch.tensor([[torch.nan, 1.0, 10.0, 100.0, torch.inf]])
    assert returns_to_go(reward, mask, discount=0.5)[0].tolist() == [0, 5 + 25, 50, 0, 0]
    assert returns_to_go(reward, mask, discount=0.5, current=True)[0].tolist() == [
        0,
        1 + 5 + 25,
        10 + 50,
        100,
        0,
    ]
    assert returns_to_go(reward, mask, discount=0.0, current=True)[0].tolist() == [0, 1, 10, 100, 0]
    assert returns_to_go(mask.float(), mask)[0].tolist() == [0, 2, 1, 0, 0]


def one_text(log_ratio: float, weight: float) -> tuple[Signals, Batch]:
    """Two tokens; the second has a reward of log 1.96, and log q_new - log q_old of the first is
    `log_ratio`.
    """
    mask = torch.ones(1, 2, dtype=torch.bool)
    mine = Signals(torch.zeros(1, 2, 2), mask)
    theirs = Signals(torch.tensor([[[0.0, 0.0], [4.0, 0.0]]]), mask)
    log_q = torch.full((1, 2), 0.5).log() - torch.tensor([[log_ratio, 0.0]])
    rollout = Rollout(log_q, torch.full((1, 2), weight), 0)
    label = torch.zeros(1, 2, dtype=torch.int64)
    return mine, Batch(
        torch.zeros(1), torch.zeros(1, 2, 2), mask, label, teacher=theirs, rollout=rollout
    )


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 1.0), (1.5, 1.2), (0.5, 0.5)])
def test_a_ratio_is_clipped_where_a_good_token_is_likelier_already(ratio, kept):
    """A > 0: -min(A s, A clip(s)) (PPO, arXiv 1707.06347, eq. 7), s = w q / q_old; and no gradient
    where it clips.
    """
    for log_ratio, weight in ((torch.tensor(ratio).log().item(), 1.0), (0.0, ratio)):
        mine, batch = one_text(log_ratio, weight)
        logits = mine.logits.requires_grad_()
        value, _ = minillm(mine, batch, discount=1.0, reward_clip=0.3)
        assert value[0, 0].item() == pytest.approx(
            -0.3 * kept, rel=1e-5
        )  # no KL at the first token: q = p
        gradient = torch.autograd.grad(value[0, 0], logits)[0][0, 0]
        assert gradient[0].item() == pytest.approx(-0.3 * ratio * 0.5 * (ratio == kept), abs=1e-6)


def whiten_on(rank: int, size: int, meeting: Path, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    values, mask = rewards()
    share = World(rank, size).share(len(values))
    save_file({"values": whitened(values[share], mask[share])}, out / f"{rank}.safetensors")
    dist.destroy_process_group()


def rewards() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.randint(1, 7, (11, 1), generator=draw)
    return 3 * torch.randn(11, 6, generator=draw) + 2, mask


def test_whitening_is_over_the_valid_tokens_of_all_workers(tmp_path):
    values, mask = rewards()
    alone = whitened(torch.where(mask, values, torch.nan), mask)
    assert alone[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert alone[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert wait(
        [start(whiten_on, rank, 2, tmp_path / "meeting", tmp_path) for rank in range(2)]
    ) == [0, 0]
    shared = torch.cat([load_file(tmp_path / f"{rank}.safetensors")["values"] for rank in range(2)])
    torch.testing.assert_close(shared, alone, rtol=1e-6, atol=1e-6)


def pair_of(places: int = 5, classes: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Logits (places, classes) of a student, which take gradients, and of a teacher; float64."""
    draw = torch.Generator().manual_seed(seed)
    z, y = (2 * torch.randn(places, classes, generator=draw, dtype=torch.double) for _ in range(2))
    return z.requires_grad_(), y


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_pass_gradcheck_and_equal_their_definitions(kind):
    z, y = pair_of()
    log_p = y.log_softmax(-1)
    q = z.softmax(-1)
    p = y.softmax(-1)
    found = divergence(z.log_softmax(-1), log_p, kind, 0.3)
    m = 0.3 * p + 0.7 * q
    a = torch.minimum(p, q).sum(-1)
    kl = (p * (p / q).log()).sum(-1)
    expected = {
        "forward": kl,
        "reverse": (q * (q / p).log()).sum(-1),
        "js": 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1),
        "tvd": 1 - a,
        "lk": -a.log(),
        "hybrid": (-a).exp() * kl + (1 - (-a).exp()) * (1 - a),
    }[kind]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if kind != "hybrid":  # its mixing weight takes no gradient
        assert torch.autograd.gradcheck(
            lambda z: divergence(z.log_softmax(-1), log_p, kind, 0.3), (z,)
        )


def test_the_gradients_of_overlap_are_closed_forms():
    """grad a = q (1[q < p] - sum q 1[q < p]); lk's is that over -a, tvd's its negative, hybrid's a
    mixture.
    """
    z, y = pair_of()
    p = y.softmax(-1)
    q = z.softmax(-1).detach()
    below = (q < p).double()
    grad_a = q * (below - (q * below).sum(-1, keepdim=True))
    a = torch.minimum(p, q).sum(-1, keepdim=True)
    k = (-a).exp()
    expected = {"tvd": -grad_a, "lk": -grad_a / a, "hybrid": k * (q - p) - (1 - k) * grad_a}
    for kind, gradient in expected.items():
        found = torch.autograd.grad(
            divergence(z.log_softmax(-1), y.log_softmax(-1), kind).sum(), z
        )[0]
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


def test_lk_learns_where_tvd_stalls():
    z = torch.tensor([[30.0, 0.0]], requires_grad=True)
    y = torch.tensor([[0.0, 30.0]])
    found = [
        torch.autograd.grad(divergence(z.log_softmax(-1), y.log_softmax(-1), kind), z)[0]
        for kind in ("tvd", "lk")
    ]
    assert found[0].abs().max() < 1e-10
    assert found[1].abs().max() > 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_the_teacher_rules_out_costs_no_nan(kind):
    z, y = pair_of()
    log_p = y.clone().index_fill(1, torch.tensor([2]), -torch.inf).log_softmax(-1)
    value = divergence(z.log_softmax(-1), log_p, kind)
    assert not value.isnan().any()
    if kind != "reverse":  # infinite there, rightly
        assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()


def drafts(
    rows: int = 1, temperature: float = 1.0, **fields: Tensor
) -> tuple[Tensor, Tensor, Batch]:
    """(z, y, batch): `rows` drafts of one position each, at one context (1, 1, V)."""
    z, y = pair_of(1)
    mask = torch.ones(rows, 1, dtype=torch.bool)
    none = torch.zeros(rows, 1, dtype=torch.int64)
    found = {"accepted": ~mask, "rejected": ~mask, "correction": none, "tail": none} | fields
    label = found.pop("label", none)
    rollout = Rollout(none.double(), mask.double(), 0, temperature, **found)
    teacher = Signals(y[None].expand(rows, -1, -1), mask)
    return (
        z,
        y,
        Batch(none[:, 0], torch.zeros(rows, 1, 2), mask, label, teacher=teacher, rollout=rollout),
    )


def outcomes() -> tuple[Tensor, dict[str, Tensor]]:
    """Every (token, verdict, correction) of one position as a row, with its probability."""
    z, y = pair_of(1)
    q = z.detach().softmax(-1)[0]
    p = y.softmax(-1)[0]
    accept = (p / q).clamp(max=1)
    residual = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    size = len(q)
    x, c = (
        i.flatten() for i in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    )
    rejected = (q * (1 - accept))[x] * residual[c]
    likely = torch.cat([rejected, q * accept])
    label = torch.cat([x, torch.arange(size)])
    correction = torch.cat([c, torch.zeros(size, dtype=torch.int64)])
    is_rejected = torch.arange(len(likely)) < len(x)
    fields = {
        "label": label,
        "correction": correction,
        "rejected": is_rejected,
        "accepted": ~is_rejected,
    }
    return likely, {k: v[:, None] for k, v in fields.items()}


def mean_gradient(form: str) -> tuple[Tensor, Tensor, Tensor]:
    """(the enumerated mean of a form's gradient, p, q)."""
    likely, fields = outcomes()
    assert likely.sum().item() == pytest.approx(1, abs=1e-12)
    z, y, batch = drafts(len(likely), **fields)
    value, mask = ghost(Signals(z[None].expand(len(likely), -1, -1), batch.mask), batch, form=form)
    assert mask.all()
    return (
        torch.autograd.grad((likely * value[:, 0]).sum(), z)[0][0],
        y.softmax(-1)[0],
        z.detach().softmax(-1)[0],
    )


def test_ghosts_pair_has_the_mean_gradient_of_the_forward_kl():
    found, p, q = mean_gradient("pair")
    torch.testing.assert_close(found, q - p, rtol=1e-10, atol=1e-10)


def test_ghosts_correction_has_its_closed_form():
    found, p, q = mean_gradient("correction")
    tvd = (p - q).abs().sum() / 2
    torch.testing.assert_close(found, tvd * q - (p - q).clamp(min=0), rtol=1e-10, atol=1e-10)


def test_ghosts_pair_agrees_with_the_forward_kl_on_drafts_as_they_are_drawn():
    """Twenty thousand verified drafts after one context: within 3.5 standard errors in each of 7
    classes.
    """
    torch.manual_seed(0)
    student, teacher = (Llama(classes=7, steps=8, width=16, layers=1, inner=16) for _ in range(2))
    for parameter in [*student.parameters(), *teacher.parameters()]:
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    rows = 20_000
    table = Source(kind="drafts", length=1, share=1.0)
    tokens = torch.stack([torch.full((rows, 1), 4), torch.zeros(rows, 1, dtype=torch.int64)], -1)
    mask = torch.ones(rows, 1, dtype=torch.bool)
    batch = write_rows(
        table,
        TextShape(8),
        0,
        0,
        student,
        FrozenTeacher(teacher),
        Batch(tokens[:, 0, 0], tokens, mask, tokens[..., 0]),
        share=slice(rows),
    )()
    logits = student(batch.inputs)["logits"].detach().double().requires_grad_()
    value, tested = ghost(Signals(logits, batch.mask), batch, form="pair")
    assert tested.all()
    each = torch.autograd.grad(value.sum(), logits)[0][:, 0]
    assert batch.teacher
    expected = (logits.softmax(-1) - batch.teacher.logits.double().softmax(-1))[0, 0]
    assert ((each.mean(0) - expected).abs() <= 3.5 * each.std(0) / rows**0.5).all()
    assert expected.abs().max() > 20 * (each.std(0) / rows**0.5).max()


@pytest.mark.parametrize("form", ["soft", "correction", "pair"])
def test_a_draft_without_a_rejection_teaches_nothing(form):
    z, _, batch = drafts(4, accepted=torch.ones(4, 1, dtype=torch.bool))
    value, _ = ghost(Signals(z[None].expand(4, -1, -1), batch.mask), batch, form=form)
    assert (value == 0).all()
    assert (torch.autograd.grad(value.sum(), z)[0] == 0).all()


@pytest.mark.parametrize("tail", [0.0, 0.7, 1.0])
def test_expected_rejections_are_the_mean_of_drawn_ones(tail):
    """Over all verdicts on a draft of four tokens, to float64's last digits."""
    draw = torch.Generator().manual_seed(2)
    z, y = (torch.randn(4, 6, generator=draw, dtype=torch.double) for _ in range(2))
    label = torch.randint(6, (1, 4), generator=draw)
    mask = torch.ones(1, 4, dtype=torch.bool)
    log_q, log_p = (x.log_softmax(-1).gather(1, label.T).T for x in (z, y))
    a = (log_p - log_q).exp().clamp(max=1)[0]
    steps = torch.arange(4)
    assert (a < 1).sum() >= 2

    def value(at: int, rejections: Any) -> Tensor:
        rollout = Rollout(
            log_q,
            torch.ones_like(log_q),
            0,
            1.0,
            (steps < at)[None],
            (steps == at)[None],
            label,
            (steps - at).clamp(min=0)[None],
        )
        batch = Batch(
            label[0],
            torch.zeros(1, 4, 2),
            mask,
            label,
            teacher=Signals(y[None], mask),
            rollout=rollout,
        )
        return ghost(Signals(z[None], mask), batch, rejections=rejections, tail=tail).value

    likely = [a[:at].prod() * (1 - a[at] if at < 4 else 1) for at in range(5)]
    mean = sum((p * value(at, "drawn") for at, p in enumerate(likely)), torch.zeros(1, 4))
    torch.testing.assert_close(value(4, "expected"), mean, rtol=1e-12, atol=1e-14)


def test_a_rejected_token_is_not_pushed_down_for_ever():
    _, _, batch = drafts(
        rejected=torch.ones(1, 1, dtype=torch.bool), correction=torch.ones(1, 1, dtype=torch.int64)
    )
    gradients = []
    for low in (-10.0, -20.0):
        z = torch.tensor([[[low, 0.0, 0.0, 0.0, 0.0, 0.0]]], requires_grad=True)
        gradients.append(
            torch.autograd.grad(ghost(Signals(z, batch.mask), batch, form="pair").value.sum(), z)[0]
        )
    assert gradients[0][0, 0, 0] > 0.9
    assert gradients[1][0, 0, 0].abs() < 1e-6


def test_ghost_refuses_text_that_was_not_verified():
    z, _, batch = drafts()
    assert batch.rollout
    bare = Batch(batch.row_id, batch.inputs, batch.mask, batch.label, teacher=batch.teacher)
    bare = Batch(**{**vars(bare), "rollout": Rollout(batch.rollout.log_q, batch.rollout.weight, 0)})
    with pytest.raises(RecipeError, match=r'source.kind = "drafts"'):
        ghost(Signals(z[None], batch.mask), bare)


def test_drafts_are_judged_at_their_temperature_and_gkd_at_one():
    z, y, batch = drafts(temperature=2.0)
    mine = Signals(z[None], batch.mask)
    cold, warm = (
        divergence((z / t).log_softmax(-1), (y / t).log_softmax(-1), "forward") for t in (1.0, 2.0)
    )
    assert distilspec(mine, batch, divergence="forward").value.item() == pytest.approx(
        warm.item(), rel=1e-10
    )
    assert gkd(mine, batch, beta=0.0).value.item() == pytest.approx(cold.item(), rel=1e-10)


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward"), (1.0, "reverse")])
def test_the_ends_of_gkd_are_forward_and_reverse_and_nearly_so_beside_them(beta, kind):
    """Near its ends js is beta (1 - beta)-ish small: over min(beta, 1 - beta) it tends to the end's
    divergence.
    """
    z, y, batch = drafts()
    mine = Signals(z[None], batch.mask)
    expected = divergence(z.log_softmax(-1), y.log_softmax(-1), kind)
    torch.testing.assert_close(gkd(mine, batch, beta=beta).value[0], expected, rtol=1e-12, atol=0)
    beside = gkd(mine, batch, beta=abs(beta - 1e-7)).value / 1e-7
    torch.testing.assert_close(beside[0], expected, rtol=1e-4, atol=1e-6)


def test_each_kind_of_batch_is_counted_by_its_own_terms():
    z, _, own = drafts(3)
    data = Batch(**{**vars(own), "rollout": None, "label": own.label[:, 0]})
    objective = Objective({"ce": TermSpec(), "kd": TermSpec(), "gkd": TermSpec()})
    mine = Signals(z[None].expand(3, -1, -1), own.mask)
    assert objective(mine, data)[1].tolist() == [3, 3, 0]
    assert objective(mine, own)[1].tolist() == [0, 0, 3]
    assert objective(mine, own)[0][:2].tolist() == [0, 0]
