"""Laws and closed forms of valence: normalised return-to-go, prefix confidence, coherence,
saliency.

The reference for the return-to-go is its definition, sum_k g^k v_{t+k} / sum_k g^k over the known
steps from t on, in float64. Coherence stands against its two limits, saliency against arithmetic by
hand.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raykd.losses.valence import coherence, prefix_confidence, realised_future, saliency
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.tables import Valence
from raykd.targets import UNLABELLED

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 8))


@st.composite
def trajectories(draw):
    """(valence with NaN holes, mask) as float32 and bool arrays of one shape."""
    shape = draw(SHAPES)
    value = draw(
        hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32, allow_subnormal=False))
    )
    hole = draw(hnp.arrays(bool, shape))
    mask = draw(hnp.arrays(bool, shape))
    return np.where(hole, np.float32(np.nan), value), mask


def defined(value: np.ndarray, mask: np.ndarray, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """The return-to-go by its definition, and where it is known."""
    out = np.zeros(value.shape)
    known = np.zeros(value.shape, bool)
    here = mask & np.isfinite(value)
    for row, t in zip(*np.nonzero(mask), strict=True):
        later = np.flatnonzero(here[row, t:])
        weight = float(discount) ** later
        if weight.sum() > 0:
            out[row, t] = (weight * value[row, t:][later]).sum() / weight.sum()
            known[row, t] = True
    return out, known


def future(value: np.ndarray, mask: np.ndarray, discount: float) -> tuple[np.ndarray, np.ndarray]:
    found, known = realised_future(torch.from_numpy(value), torch.from_numpy(mask), discount)
    return found.numpy(), known.numpy()


@settings(deadline=None)
@given(trajectories(), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
def test_the_future_is_what_it_is_defined_to_be(drawn, discount):
    value, mask = drawn
    found, known = future(value, mask, discount)
    expected, expected_known = defined(value, mask, discount)
    assert np.array_equal(known, expected_known)
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-6
    )  # float32: at most 8 terms of size 1


@settings(deadline=None)
@given(trajectories(), st.floats(0, 1))
def test_the_future_stays_within_the_valence_and_is_0_where_unknown(drawn, discount):
    value, mask = drawn
    found, known = future(value, mask, discount)
    assert (np.abs(found) <= 1 + 1e-6).all()
    assert (found[~known] == 0).all()
    assert not (known & ~mask).any()


@settings(deadline=None)
@given(trajectories())
def test_discount_0_gives_the_valence_itself(drawn):
    value, mask = drawn
    found, known = future(value, mask, 0.0)
    assert np.array_equal(known, mask & np.isfinite(value))
    assert np.array_equal(found[known], value[known])


@settings(deadline=None)
@given(trajectories())
def test_discount_1_gives_the_mean_of_the_remainder(drawn):
    value, mask = drawn
    found, known = future(value, mask, 1.0)
    left = np.where(mask, value, np.nan)
    for row, t in zip(*np.nonzero(known), strict=True):
        assert found[row, t] == pytest.approx(
            np.nanmean(left[row, t:].astype(np.float64)), abs=1e-6
        )


@settings(deadline=None)
@given(trajectories(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(width=32))
def test_padding_and_what_stands_at_invalid_steps_change_nothing(drawn, discount, garbage):
    value, mask = drawn
    found, known = future(value, mask, discount)
    wider = np.pad(
        np.where(mask, value, np.float32(garbage)), ((0, 0), (0, 3)), constant_values=garbage
    )
    found2, known2 = future(wider, np.pad(mask, ((0, 0), (0, 3))), discount)
    assert np.array_equal(found2[:, : mask.shape[1]], found)
    assert np.array_equal(known2[:, : mask.shape[1]], known)
    assert not known2[:, mask.shape[1] :].any()


def test_missing_steps_are_left_out_of_both_sums():
    value = np.array([[0.5, np.nan, -1.0, np.nan]], np.float32)
    mask = np.ones((1, 4), bool)
    found, known = future(value, mask, 0.5)
    np.testing.assert_allclose(found[0, :3], [(0.5 - 0.25) / 1.25, -1.0, -1.0], rtol=1e-6)
    assert known.tolist() == [[True, True, True, False]]


def test_a_long_gap_under_a_small_discount_keeps_the_value():
    value = np.full((1, 17), np.nan, np.float32)
    value[0, -1] = 0.75
    found, known = future(value, np.ones((1, 17), bool), 0.01)
    assert known.all()
    np.testing.assert_allclose(found, 0.75, rtol=1e-5)


def random_logits(
    rows: int = 4, steps: int = 6, classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, steps, classes, generator=draw)
    mask = torch.arange(steps) < torch.tensor([6, 4, 1, 3])[:, None]
    return logits, mask, torch.tensor([0, 1, 2, 1])


def test_prefix_confidence_is_the_softmax_of_mean_logits_so_far():
    logits, mask, label = random_logits()
    found = prefix_confidence(logits, mask, label)
    for row, t in mask.nonzero().tolist():
        mean = logits[row, : t + 1].double().mean(0)
        assert found[row, t].item() == pytest.approx(
            2 * mean.softmax(-1)[label[row]].item() - 1, abs=1e-6
        )
    assert found[~mask].isnan().all()


def test_prefix_confidence_lies_between_its_bounds():
    logits = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]], [[7.0, 7.0]]])
    found = prefix_confidence(
        logits, torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    )
    assert found.squeeze(1).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("t", range(1, 6))
def test_prefix_confidence_of_a_causal_model_reads_no_later_step(t):
    torch.manual_seed(0)
    model = SeriesEncoder(channels=3, classes=4, steps=16, width=8)
    inputs = torch.randn(5, 6, 3)
    mask = torch.ones(5, 6, dtype=torch.bool)
    label = torch.arange(5) % 4
    changed = inputs.clone()
    changed[:, t:] = 9 * torch.randn(5, 6 - t, 3)
    with torch.no_grad():
        before, after = (
            prefix_confidence(model(x)["logits"], mask, label) for x in (inputs, changed)
        )
    # the same sums in the same order, but attention may block its rows otherwise for other values
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, t:], after[:, t:], atol=1e-3)


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan])
def test_prefix_confidence_ignores_invalid_steps_and_padding(garbage):
    logits, mask, label = random_logits()
    label[3] = UNLABELLED
    found = prefix_confidence(logits, mask, label)
    spoilt = logits.masked_fill(~mask[..., None], garbage)
    wider = torch.nn.functional.pad(spoilt, (0, 0, 0, 2), value=garbage)
    padded = prefix_confidence(wider, torch.nn.functional.pad(mask, (0, 2)), label)
    assert torch.equal(found[mask], prefix_confidence(spoilt, mask, label)[mask])
    assert torch.equal(found[mask], padded[:, :6][mask])
    assert padded[:, 6:].isnan().all()


def test_an_unlabelled_row_is_judged_by_the_class_of_its_full_sequence():
    logits, mask, label = random_logits()
    own = torch.stack([logits[i][mask[i]].mean(0) for i in range(4)]).argmax(-1)
    hidden = prefix_confidence(logits, mask, torch.full_like(label, UNLABELLED))
    assert torch.equal(hidden[mask], prefix_confidence(logits, mask, own)[mask])
    assert (own != label).any()  # so that a leak of the true label would show
    assert not torch.equal(hidden[mask], prefix_confidence(logits, mask, label)[mask])


def test_a_row_is_judged_by_its_own_label_alone():
    logits, mask, label = random_logits()
    found = prefix_confidence(logits, mask, label)
    other = torch.where(torch.arange(4) == 2, label, (label + 1) % 3)
    assert torch.equal(prefix_confidence(logits, mask, other)[2, :1], found[2, :1])
    assert not torch.equal(prefix_confidence(logits, mask, other)[0], found[0])


@pytest.mark.parametrize("classes", [2, 7, 100])
def test_coherence_is_0_for_uniform_and_1_for_one_hot(classes):
    mask = torch.ones(2, 3, dtype=torch.bool)
    uniform = torch.full((2, 3, classes), 4.2)
    certain = torch.zeros(2, 3, classes)
    certain[..., 1] = 1e4
    impossible = torch.full((2, 3, classes), -torch.inf)
    impossible[..., 1] = 0.0
    torch.testing.assert_close(coherence(uniform, mask), torch.zeros(2), rtol=0, atol=1e-6)
    assert coherence(certain, mask).tolist() == [1.0, 1.0]
    assert coherence(impossible, mask).tolist() == [1.0, 1.0]


def test_coherence_rises_with_certainty_and_is_the_mean_over_valid_steps():
    logits, mask, _ = random_logits()
    p = logits.double().softmax(-1)
    certainty = 1 + (p * p.log()).sum(-1) / np.log(3)
    expected = torch.stack([certainty[i][mask[i]].mean() for i in range(4)])
    torch.testing.assert_close(coherence(logits, mask).double(), expected, rtol=1e-5, atol=1e-6)
    assert (coherence(3 * logits, mask) > coherence(logits, mask)).all()


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan])
def test_coherence_ignores_invalid_steps(garbage):
    logits, mask, _ = random_logits()
    spoilt = logits.masked_fill(~mask[..., None], garbage)
    assert torch.equal(coherence(logits, mask), coherence(spoilt, mask))


def test_saliency_by_hand():
    trajectory = torch.tensor([[0.5, -0.5, 0.3], [1.0, 1.0, 1.0], [0.2, torch.nan, 9.0]])
    known = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
    found = saliency(trajectory, known, torch.tensor([0.4, 1.0, 0.0]), Valence())
    expected = [0.6 * 0.1 + 0.25 * -0.5 + 0.15 * 0.4, 1.0, 0.6 * 0.2 + 0.25 * 0.2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("key", ["mean", "min", "coherence"])
def test_each_coefficient_of_saliency_weighs_its_own_part(key):
    trajectory = torch.tensor([[0.5, -0.25, 0.35]])
    certainty = torch.tensor([0.8])
    only = Valence(**({"mean": 0.0, "min": 0.0, "coherence": 0.0} | {key: 2.0}))
    parts = {"mean": 0.2, "min": -0.25, "coherence": 0.8}
    found = saliency(trajectory, torch.ones(1, 3, dtype=torch.bool), certainty, only)
    assert found.item() == pytest.approx(2 * parts[key], rel=1e-6)


def test_a_row_without_a_known_step_has_no_saliency():
    known = torch.tensor([[False, False], [True, False]])
    found = saliency(torch.zeros(2, 2), known, torch.ones(2), Valence())
    assert found.isnan().tolist() == [True, False]
