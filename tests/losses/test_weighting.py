"""Row weights: the reference formula and code by hand, the effective sample size's law, and what
never changes them.

The closed form for Gaussian saliency, ESS / n -> exp(-boost^2), is the ratio E[w]^2 / E[w^2] of
log-normal weights.
"""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from raykd.losses.objective import Objective
from raykd.losses.weighting import RowWeights, boost_of, ess, standardised, weights
from raykd.recipe.tables import TermSpec, Weighting
from raykd.signals import Batch, Signals
from raykd.training.arm import World

MODES = ["ess", "selfnorm", "capped", "raw", "snippet", "uniform"]
SALIENCY = [0.1, 0.2, 0.6, -0.3]
NORMALISED = ["ess", "selfnorm"]


def of(saliency: list[float] | np.ndarray, **keywords) -> np.ndarray:
    """The weights of one batch, by its own statistics."""
    found = Weighting(**{"statistics": "global_batch"} | keywords)
    return weights(standardised(np.asarray(saliency, np.float64), found), found)[0]


def by_hand(boost: float) -> list[float]:
    """exp(boost (s - mean) / std) with the unbiased standard deviation, in plain Python."""
    mean = statistics.mean(SALIENCY)
    std = statistics.stdev(SALIENCY)
    return [math.exp(boost * (s - mean) / std) for s in SALIENCY]


@pytest.mark.parametrize("boost", [0.5, 1.0, 6.0])
def test_raw_is_the_formula(boost):
    np.testing.assert_allclose(of(SALIENCY, mode="raw", boost=boost), by_hand(boost), rtol=1e-12)


@pytest.mark.parametrize("boost", [0.5, 6.0])
def test_snippet_is_one_number_for_all_rows(boost):
    np.testing.assert_allclose(
        of(SALIENCY, mode="snippet", boost=boost), [statistics.mean(by_hand(boost))] * 4
    )


def test_capped_cuts_the_formula_at_the_cap():
    expected = [min(w, 3.0) for w in by_hand(2.0)]
    np.testing.assert_allclose(of(SALIENCY, mode="capped", boost=2.0, cap=3.0), expected)


def test_selfnorm_is_a_softmax_times_the_number_of_rows():
    raw = by_hand(2.0)
    np.testing.assert_allclose(
        of(SALIENCY, mode="selfnorm", boost=2.0), [4 * w / sum(raw) for w in raw]
    )


SALIENT = hnp.arrays(
    np.float64,
    st.integers(1, 64),
    elements=st.one_of(
        st.floats(-1, 1),
        st.sampled_from([0.0, 1.0, 1e6, -1e6, math.nan]),
        st.floats(-1e-7, 1e-7),
        st.floats(-1e6, 1e6),
    ),
)


@settings(max_examples=500, deadline=None)
@given(SALIENT, st.floats(0.01, 1.0), st.floats(0.0, 20.0))
@example(np.array([math.nan] * 3), 0.5, 6.0)
@example(np.full(64, 0.7), 0.5, 6.0)
@example(np.array([1e6] + [0.0] * 63), 1.0, 8.0)
def test_ess_keeps_its_share_of_the_rows_and_a_mean_of_one(saliency, fraction, boost):
    chosen = Weighting(mode="ess", fraction=fraction, boost=boost, statistics="global_batch")
    found, used = weights(standardised(saliency, chosen), chosen)
    assert np.isfinite(found).all()
    assert ess(found) >= fraction - 1e-3
    assert found.mean() == pytest.approx(1.0, rel=1e-9)
    assert 0 <= used <= boost


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_ess_uses_the_whole_boost_where_it_may_and_else_the_largest_it_can(fraction):
    z = np.random.default_rng(0).standard_normal(256)
    most = boost_of(z, 20.0, fraction)
    assert 0 < most < 20
    assert boost_of(z, 0.99 * most, fraction) == 0.99 * most
    assert ess(np.exp(1.01 * most * z)) < fraction <= ess(np.exp(most * z)) + 1e-9


@pytest.mark.parametrize("boost", [0.25, 0.5, 0.83])
def test_the_effective_sample_of_gaussian_saliency_has_its_closed_form(boost):
    """400,000 draws: the standard error of the ratio, from 50 batches of them, is below 0.4 % at
    these boosts.
    """
    z = np.random.default_rng(1).standard_normal((50, 8000))
    shares = [ess(np.exp(boost * row)) for row in z]
    error = np.std(shares, ddof=1) / math.sqrt(len(shares))
    bias = 8 / 8000  # of a ratio of means over 8000 draws: a few parts in n
    assert abs(np.mean(shares) - math.exp(-(boost**2))) < 3 * error + bias


@pytest.mark.parametrize("mode", MODES)
def test_without_boost_every_row_counts_one(mode):
    assert (of(SALIENCY, mode=mode, boost=0.0) == 1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.7, 1e6, math.nan])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_equal_rows_count_one_each(mode, value, rows):
    np.testing.assert_allclose(of([value] * rows, mode=mode), 1.0, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_noise_below_the_least_spread_is_not_blown_up(mode):
    noise = 0.7 + 1e-7 * np.random.default_rng(2).standard_normal(32)
    np.testing.assert_allclose(of(noise, mode=mode), 1.0, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_order_and_a_constant_change_nothing(mode):
    s = np.random.default_rng(3).standard_normal(32)
    order = np.random.default_rng(4).permutation(32)
    np.testing.assert_allclose(of(s[order], mode=mode), of(s, mode=mode)[order], rtol=1e-9)
    np.testing.assert_allclose(of(s + 5, mode=mode), of(s, mode=mode), rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_an_extreme_row_does_not_overflow(mode):
    dataset = Weighting(mode=mode, statistics="dataset")
    z = np.array([20.0, 0.0, -20.0])
    found, _ = weights(z, dataset)
    assert np.isfinite(found.astype(np.float32)).all()


def test_the_clip_bounds_every_rows_z():
    found = of([1.0] + [0.0] * 63, mode="raw", boost=1.0, clip=2.0)
    assert found[0] == pytest.approx(math.exp(2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("statistics", ["dataset", "global_batch"])
def test_any_number_of_workers_gives_the_same_weights(mode, statistics):
    saliency = torch.from_numpy(np.random.default_rng(5).standard_normal(300))
    row_weights = RowWeights.of(saliency, Weighting(mode=mode, statistics=statistics))
    rows = np.random.default_rng(6).permutation(300)[:50]
    whole, spread = row_weights(rows, slice(0, 50))
    for size in (2, 4):
        parts = [row_weights(rows, World(rank, size).share(50)) for rank in range(size)]
        np.testing.assert_array_equal(np.concatenate([w for w, _ in parts]), whole)
        assert {s for _, s in parts} == {spread}


def test_with_dataset_statistics_a_row_weighs_the_same_in_every_batch():
    saliency = torch.from_numpy(np.random.default_rng(7).standard_normal(300))
    row_weights = RowWeights.of(saliency, Weighting(mode="ess"))
    every, spread = row_weights(np.arange(300), slice(0, 300))
    assert every.mean() == pytest.approx(1, rel=1e-6)
    assert spread.ess == pytest.approx(0.5, abs=1e-3)
    alone, _ = row_weights(np.array([17]), slice(0, 1))
    assert alone[0] == every[17]


def test_local_statistics_are_those_of_a_workers_own_rows():
    saliency = torch.arange(8.0)
    row_weights = RowWeights.of(
        saliency, Weighting(mode="raw", boost=1.0, statistics="local_batch")
    )
    first, _ = row_weights(np.arange(8), World(0, 2).share(8))
    second, _ = row_weights(np.arange(8), World(1, 2).share(8))
    np.testing.assert_allclose(first, second)
    np.testing.assert_allclose(first, of([0, 1, 2, 3], mode="raw", boost=1.0), rtol=1e-6)


def rows_of_steps(steps: int) -> tuple[Signals, Batch, Tensor]:
    """Four rows of up to `steps` steps, their batch, and the weights of the formula."""
    torch.manual_seed(0)
    mask = torch.arange(steps) < torch.tensor([steps, 1, max(1, steps - 1), steps])[:, None]
    student = torch.randn(4, steps, 3, dtype=torch.float64)
    teacher = torch.randn(4, steps, 3, dtype=torch.float64)
    label = torch.tensor([0, 2, 1, 1])
    batch = Batch(
        torch.arange(4), torch.zeros(4, steps, 1), mask, label, None, Signals(teacher, mask)
    )
    return Signals(student, mask), batch, torch.tensor(by_hand(6.0))


def loss_of(student: Signals, batch: Batch, weight: Tensor | None, **terms) -> Tensor:
    objective = Objective({name: TermSpec(**settings) for name, settings in terms.items()})
    return objective.total(*objective(student, replace(batch, weight=weight)))


def test_the_weighted_loss_is_the_formula():
    """L = (1 / N) sum_i w_i lambda_1 KL(softmax(z_T / T) || softmax(z_S / T)), a row's KL the mean
    over its steps.
    """
    student, batch, w = rows_of_steps(5)
    log_q, log_p = ((s.logits / 4).log_softmax(-1) for s in (student, batch.teacher))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    rows = [float(divergence[i, : int(n)].mean()) for i, n in enumerate(student.mask.sum(1))]
    expected = sum(0.8 * float(w[i]) * rows[i] for i in range(4)) / 4
    found = loss_of(student, batch, w, kd={"weight": 0.8, "temperature": 4.0, "t_squared": False})
    assert found.item() == pytest.approx(
        expected, rel=5e-6
    )  # float32: at T = 4 a KL is the difference of near numbers


def test_the_snippets_loss_is_the_reference_code():
    """The reference's own lines: batch means of CE, T^2 KL and MSE, times the mean weight."""
    student, batch, _ = rows_of_steps(1)
    value = torch.rand(4, 1)
    truth = torch.rand(4, 1)
    valence = torch.tensor(SALIENCY)
    z_s = student.logits[:, 0]
    z_t = batch.teacher.logits[:, 0]
    w = torch.exp(6.0 * (valence - valence.mean()) / (valence.std() + 1e-8))
    kl = F.kl_div(F.log_softmax(z_s / 4, 1), F.softmax(z_t / 4, 1), reduction="batchmean") * 4**2
    expected = (
        F.cross_entropy(z_s, batch.label) + 0.8 * kl + 0.6 * F.mse_loss(value, truth)
    ) * w.mean()

    weight = torch.from_numpy(of(SALIENCY, mode="snippet", least_std=1e-8))
    found = loss_of(
        Signals(student.logits, student.mask, value),
        Batch(*list(vars(batch).values())[:5], Signals(batch.teacher.logits, batch.mask, truth)),
        weight,
        ce={"weight": 1.0},
        kd={"weight": 0.8, "temperature": 4.0},
        value={"weight": 0.6},
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_weights_of_one_give_the_mean_over_rows_of_the_mean_over_steps(steps):
    student, batch, _ = rows_of_steps(steps)
    found = loss_of(student, batch, torch.ones(4), ce={})
    rows = [loss_of(*_row(student, batch, i), None, ce={}) for i in range(4)]
    assert found.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-6)


def _row(student: Signals, batch: Batch, i: int) -> tuple[Signals, Batch]:
    at = slice(i, i + 1)
    fields = [v[at] if isinstance(v, Tensor) else v for v in list(vars(batch).values())[:5]]
    return Signals(student.logits[at], student.mask[at]), Batch(*fields)


def test_a_rows_gradient_is_proportional_to_its_weight():
    student, batch, w = rows_of_steps(3)
    gradients = []
    for weight in (torch.ones(4), w):
        logits = student.logits.clone().requires_grad_()
        loss_of(Signals(logits, student.mask), batch, weight, kd={}).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * w[:, None, None], rtol=1e-6, atol=1e-12)


def test_a_term_may_be_left_out_of_the_weighting():
    student, batch, w = rows_of_steps(3)
    plain, weighted = (loss_of(student, batch, x, ce={}) for x in (torch.ones(4), w))
    left_out = loss_of(student, batch, w, ce={"weighted": False})
    assert left_out.item() == pytest.approx(plain.item())
    assert weighted.item() != pytest.approx(plain.item())
