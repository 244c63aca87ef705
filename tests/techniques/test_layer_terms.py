"""Terms that read inner layers: known numbers against float64 formulas, what must be zero, and who
gets a gradient.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykd.errors import RecipeError
from raykd.losses.objective import Objective
from raykd.models.adapter import Adapter
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.tables import Optim, TermSpec
from raykd.signals import Batch, Signals, resampled, same_length
from raykd.techniques.attention import attention
from raykd.techniques.fitnets import hint
from raykd.techniques.infonce import infonce
from raykd.training.arm import Arm
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train

B = 8
T = 6
PAIRS = [["a", "b"]]


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(T) < torch.tensor([6, 4, 2, 3, 5, 2, 1, 6])[:, None]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(kind: str, mine: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Signals, Batch]:
    """A student whose layer `a` is `mine` and a teacher whose layer `b` is `theirs`."""
    logits = torch.zeros(len(mask), mask.shape[1], 3)
    teacher = Signals(logits, mask, None, {f"{kind}.b": theirs})
    rows = torch.arange(len(mask))
    return Signals(logits, mask, None, {f"{kind}.a": mine}), Batch(
        rows, logits, mask, rows % 3, None, teacher
    )


# hints


def test_a_hint_is_half_of_nothing_where_the_map_is_right(mask):
    theirs = draw(B, T, 4)
    student, batch = pair("hidden", theirs.clone(), theirs, mask)
    term = hint(student, batch, pairs=PAIRS, normalise=False)
    with torch.no_grad():
        term.maps[0].weight.copy_(torch.eye(4))
        term.maps[0].bias.zero_()
    value, _ = term(student, batch)
    assert (value == 0).all()


@pytest.mark.parametrize("normalise", [True, False])
def test_a_hint_is_the_mean_squared_difference(mask, normalise):
    student, batch = pair("hidden", draw(B, T, 3), 2 + 5 * draw(B, T, 4, seed=1), mask)
    term = hint(student, batch, pairs=PAIRS, normalise=normalise)
    value, where = term(student, batch)
    w, b = (x.detach().numpy().astype(np.float64) for x in (term.maps[0].weight, term.maps[0].bias))
    h_s = student.layers["hidden.a"].numpy().astype(np.float64)
    h_t = batch.teacher.layers["hidden.b"].numpy().astype(np.float64)
    if normalise:
        h_t = (h_t - h_t.mean(-1, keepdims=True)) / np.sqrt(h_t.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        value.detach().numpy(), ((h_s @ w.T + b - h_t) ** 2).mean(-1), rtol=1e-4
    )
    assert torch.equal(where, mask)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 9])
def test_layers_of_other_lengths_are_averaged_down_and_never_cropped(mask, steps):
    student, batch = pair("hidden", draw(B, T, 3), draw(B, steps, 4, seed=1), mask)
    term = hint(student, batch, pairs=PAIRS)
    value, where = term(student, batch)
    assert torch.equal(where, mask if steps == T else mask.any(1))
    assert torch.isfinite(value).all()


def test_resampling_keeps_means_and_leaves_an_equal_length_alone(mask):
    values = draw(B, T, 3)
    n = mask.sum(1)
    for steps in (1, 2, 3, 4, 7):
        means = resampled(values, mask, steps).mean(1)
        expected = (values * mask[..., None]).sum(1) / n[:, None]
        torch.testing.assert_close(means, expected)
    whole = torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(resampled(values, whole, T), values)
    left = mask.flip(1)
    moved = torch.zeros_like(values)
    moved[left] = values[mask]
    torch.testing.assert_close(resampled(moved, left, 3), resampled(values, mask, 3))
    pooled = F.adaptive_avg_pool1d(values.mT, 3).mT
    torch.testing.assert_close(resampled(values, whole, 3), pooled)
    assert same_length(values, values, mask) == (values, values)


def rows(steps: int = 8) -> DeviceRows:
    """Sixty rows and a three-layer teacher's signals."""
    torch.manual_seed(0)
    teacher = Adapter(
        SeriesEncoder(channels=3, classes=4, steps=steps, width=12, layers=3),
        want=frozenset({"hidden.blocks.1", "embedding.norm"}),
    ).eval()
    label = torch.arange(60) % 4
    inputs = draw(60, steps, 3)
    inputs[:, :, 0] += label[:, None]
    mask = torch.ones(60, steps, dtype=torch.bool)
    with torch.no_grad():
        said = teacher(inputs, mask)
    return DeviceRows(
        torch.arange(60), inputs, mask, label, None, {"logits": said.logits} | said.layers, mask
    )


def encoder() -> SeriesEncoder:
    torch.manual_seed(1)
    return SeriesEncoder(channels=3, classes=4, steps=8, width=8, layers=2)


def test_the_first_stage_moves_nothing_above_the_guided_layer():
    module = encoder()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    terms = {
        "hint": TermSpec(pairs=[["blocks.0", "blocks.1"]], until=0.5),  # type: ignore[call-arg]
        "ce": TermSpec(since=0.5),
    }
    seen = []

    def evaluate(student: nn.Module) -> dict[str, float]:
        moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
        seen.append(moved)
        return {}

    optim = Optim(steps=12, batch=16, evaluate_every=6)
    state = train(
        Arm("student", 0, terms),
        optim,
        Adapter(module, want=frozenset({"hidden.blocks.0"})),
        rows(),
        evaluate,
    )
    assert seen[0], "the guided layers move"
    assert all(name.startswith(("conv", "positions", "blocks.0")) for name in seen[0])
    assert {"head.weight", "blocks.1.mlp.0.weight", "norm.weight"} <= seen[1]
    assert state.history[0]["terms"]["ce"] == 0
    assert state.history[1]["terms"]["hint"] == 0
    assert state.history[1]["terms"]["ce"] > 0


def test_the_map_is_trained_and_is_no_part_of_the_student():
    module = encoder()
    names = set(module.state_dict())
    terms = {"hint": TermSpec(pairs=[["blocks.0", "blocks.1"]])}  # type: ignore[call-arg]
    maps = []
    for steps in (1, 40):
        optim = Optim(steps=steps, batch=16, evaluate_every=steps, learning_rate=1e-2)
        state = train(
            Arm("student", 0, terms),
            optim,
            Adapter(encoder(), want=frozenset({"hidden.blocks.0"})),
            rows(),
            lambda _: {},
        )
        maps.append(state.learner.objective.modules_by_term["hint"].maps[0].weight.detach())
        assert set(state.learner.student.module.state_dict()) == names
    assert not torch.allclose(*maps, atol=1e-2)


# attention


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_relation_is_the_divergence_of_rows_of_cut_projections(mask):
    """Row by row in float64, over the valid keys alone: teacher 3 parts of 4 in 2 heads, student 3
    parts of 2 in 2.
    """
    student, batch = pair("hidden", draw(B, T, 6), 2 * draw(B, T, 12, seed=1), mask)
    value, where = attention(student, batch, pairs=PAIRS, parts=3, heads=2)
    assert torch.equal(where, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        total = np.zeros(n)
        for head in range(6):
            x, y = (
                layer[i, :n].numpy().astype(np.float64).reshape(n, 6, -1)[:, head]
                for layer in (student.layers["hidden.a"], batch.teacher.layers["hidden.b"])
            )
            q = softmax(x @ x.T / math.sqrt(x.shape[1]))
            p = softmax(y @ y.T / math.sqrt(y.shape[1]))
            total += (p * np.log(p / q)).sum(-1) / 6
        np.testing.assert_allclose(value[i, :n].numpy(), total, rtol=1e-4, atol=1e-6)


def test_the_size_of_relation_does_not_vanish_with_length_but_that_of_mean_maps_does():
    """From 16 to 256 steps the mean squared difference of maps falls 100-fold or more, relation by
    less than half.
    """
    sizes = {}
    for steps in (16, 256):
        whole = torch.ones(4, steps, dtype=torch.bool)
        x = 2 * draw(4, steps, 8)
        y = 2 * draw(4, steps, 8, seed=1)
        relation, _ = attention(*pair("hidden", x, y, whole), pairs=PAIRS)
        maps = [(z @ z.mT / 8**0.5).softmax(-1) for z in (x, y)]
        sizes[steps] = relation.mean().item(), (maps[0] - maps[1]).square().mean().item()
    assert sizes[256][0] > sizes[16][0] / 2
    assert sizes[256][1] < sizes[16][1] / 8


def test_scores_are_summed_over_valid_keys_and_averaged_over_heads(mask):
    x = draw(B, T, 2, T)
    y = draw(B, T, 2, T, seed=1)
    value, where = attention(*pair("scores", x, y, mask), pairs=PAIRS, mode="scores")
    assert torch.equal(where, mask)
    i = 1
    n = 4
    expected = ((x - y)[i, :n, :, :n].numpy().astype(np.float64) ** 2).sum(-1).mean(-1)
    np.testing.assert_allclose(value[i, :n].numpy(), expected, rtol=1e-5)


def test_permuting_heads_in_both_changes_nothing(mask):
    x = draw(B, T, 2, T)
    y = draw(B, T, 2, T, seed=1)
    value, _ = attention(*pair("scores", x, y, mask), pairs=PAIRS, mode="scores")
    swapped, _ = attention(*pair("scores", x.flip(2), y.flip(2), mask), pairs=PAIRS, mode="scores")
    torch.testing.assert_close(swapped, value)


def test_activation_ignores_the_scale_of_a_layer_and_its_width(mask):
    x = draw(B, T, 3) * mask[..., None]
    y = draw(B, T, 7, seed=1) * mask[..., None]
    value, where = attention(*pair("hidden", x, y, mask), pairs=PAIRS, mode="activation")
    scaled, _ = attention(*pair("hidden", 30 * x, 0.1 * y, mask), pairs=PAIRS, mode="activation")
    torch.testing.assert_close(scaled, value)
    assert torch.equal(where, mask.any(1))
    q, p = ((v[0].numpy().astype(np.float64) ** 2).mean(-1) for v in (x, y))
    expected = ((q / np.linalg.norm(q) - p / np.linalg.norm(p)) ** 2).sum()
    assert value[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "kind", "shape"),
    [
        ("relation", "hidden", (B, T, 6)),
        ("scores", "scores", (B, T, 2, T)),
        ("activation", "hidden", (B, T, 6)),
    ],
)
def test_attention_is_still_when_student_is_teacher(mask, mode, kind, shape):
    x = draw(*shape)
    student, batch = pair(kind, x.clone().requires_grad_(), x, mask)
    value, where = attention(student, batch, pairs=PAIRS, mode=mode)
    value[where].sum().backward()
    gradient = student.layers[f"{kind}.a"].grad
    assert value[where].abs().max() < 1e-6
    assert gradient is not None
    assert gradient.abs().max() < 1e-5


def test_what_attention_can_not_compare_is_named(mask):
    with pytest.raises(RecipeError, match="a is 5 wide, not a multiple of 1 parts x 2 heads"):
        attention(*pair("hidden", draw(B, T, 5), draw(B, T, 6), mask), pairs=PAIRS, heads=2)
    with pytest.raises(
        RecipeError, match=r"scores need equal head counts, found 2 and 3; use mode = \"relation\""
    ):
        attention(
            *pair("scores", draw(B, T, 2, T), draw(B, T, 3, T), mask), pairs=PAIRS, mode="scores"
        )
    with pytest.raises(RecipeError, match=r'a has 6 steps, b 3; use mode = "activation"'):
        attention(*pair("hidden", draw(B, T, 4), draw(B, 3, 4), mask), pairs=PAIRS)
    with pytest.raises(RecipeError, match=r"a GRU shows no scores; .*weight = 0"):
        Adapter(nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 2)), want=frozenset({"scores.0"}))


# contrast


def contrast(
    mine: Tensor, theirs: Tensor, rows: Batch | None = None, **keywords
) -> tuple[infonce, Signals, Batch]:
    """The term with identity maps, for embeddings (N, D)."""
    whole = torch.ones(len(mine), 1, dtype=torch.bool)
    student, batch = pair("embedding", mine[:, None], theirs[:, None], whole)
    term = infonce(student, batch, pairs=PAIRS, width=mine.shape[1], **keywords)
    with torch.no_grad():
        for one in (term.mine[0], term.theirs[0]):
            one.weight.copy_(torch.eye(mine.shape[1]))
            one.bias.zero_()
    return term, student, batch


def test_equal_similarities_cost_the_log_of_the_candidates():
    term, student, batch = contrast(torch.ones(16, 4), torch.ones(16, 4), alike="row")
    value, _ = term(student, batch)
    torch.testing.assert_close(value, torch.full((16,), math.log(16)))


def test_perfect_pairs_cost_nothing_as_temperature_falls():
    x = torch.eye(16)
    costs = [
        contrast(x, x, alike="row", temperature=t)[0](*contrast(x, x)[1:])[0].max().item()
        for t in (1, 0.1, 0.01)
    ]
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] < 1e-6


def test_both_directions_equal_the_formula():
    x = draw(10, 5)
    y = draw(10, 5, seed=1)
    term, student, batch = contrast(x, y, alike="row", temperature=0.2)
    value, _ = term(student, batch)
    a, b = (
        z.numpy().astype(np.float64) / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
        for z in (x, y)
    )
    s = a @ b.T / 0.2
    log_rows = s - np.logaddexp.reduce(s, axis=1, keepdims=True)
    log_columns = s - np.logaddexp.reduce(s, axis=0, keepdims=True)
    np.testing.assert_allclose(
        value.detach().numpy(), -(np.diag(log_rows) + np.diag(log_columns)) / 2, rtol=1e-4
    )


def test_the_gradient_with_respect_to_similarities_is_softmax_less_one_hot():
    """Through identity maps and unit vectors: the student's gradient is the tangent part of
    (softmax - 1) y / tau.
    """
    x = F.normalize(draw(6, 4), dim=1)
    y = F.normalize(draw(6, 4, seed=1), dim=1)
    term, student, batch = contrast(x.clone().requires_grad_(), y, alike="row", temperature=0.5)
    leaf = student.layers["embedding.a"]
    leaf.retain_grad()
    term(student, batch)[0].sum().backward()
    s = x @ y.T / 0.5
    residual = (s.softmax(1) - torch.eye(6) + s.softmax(0) - torch.eye(6)) / 2
    outer = residual @ y / 0.5
    expected = outer - (outer * x).sum(1, keepdim=True) * x
    torch.testing.assert_close(leaf.grad[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_misaligned_student_scores_below_an_aligned_one():
    x = draw(64, 16)
    aligned_cost = contrast(x, x + 0.1 * draw(64, 16, seed=1), alike="row")
    shifted = contrast(x, x.roll(1, 0), alike="row")
    collapsed = contrast(torch.ones(64, 16), x, alike="row")
    costs = [
        term(student, batch)[0].mean().item()
        for term, student, batch in (aligned_cost, shifted, collapsed)
    ]
    assert costs[0] < 0.5 < math.log(64) * 0.9 < costs[2] < costs[1]


def test_rows_that_are_alike_are_no_negatives():
    x = draw(9, 4)
    y = draw(9, 4, seed=1)
    term, student, batch = contrast(x, y, alike="label")  # labels are row % 3
    value, _ = term(student, batch)
    for i in range(9):
        kept = [j for j in range(9) if j == i or j % 3 != i % 3]
        alone, some, rows = contrast(x[kept], y[kept], alike="row")
        expected = alone(some, rows)[0][kept.index(i)]
        # the others of the small batch still see each other, so only this row's two sums are
        # compared
        torch.testing.assert_close(value[i], expected)
    answered, _, _ = contrast(x, y, alike="answer")
    by_answer, _ = answered(student, replace(batch, answer=batch.label))
    torch.testing.assert_close(by_answer, value)


def test_one_row_twice_in_a_batch_is_no_negative_of_itself():
    x = draw(5, 4)
    y = draw(5, 4, seed=1)
    term, student, batch = contrast(x[[0, 1, 2, 3, 4, 4]], y[[0, 1, 2, 3, 4, 4]], alike="row")
    value, _ = term(student, replace(batch, row_id=torch.tensor([0, 1, 2, 3, 4, 4])))
    alone, some, rows = contrast(x, y, alike="row")
    torch.testing.assert_close(value[4], alone(some, rows)[0][4])
    torch.testing.assert_close(value[5], value[4])


def test_hard_negatives_count_as_often_as_said():
    x = draw(4, 3)
    y = draw(4, 3, seed=1)
    term, student, batch = contrast(x, y, alike="row", hard=3.0)
    value, _ = term(student, replace(batch, saliency=torch.tensor([1.0, 1.0, 1.0, -9.0])))
    a = F.normalize(x, dim=1)
    b = F.normalize(y, dim=1)
    s = (a @ b.T / 0.1).double()
    weight = torch.ones(4, 4).double()
    weight[:3, 3] = 3
    costs = [-s[0, 0] + (weight[0] * m[0].exp()).sum().log() for m in (s, s.T)]
    assert value[0].item() == pytest.approx(sum(costs).item() / 2, rel=1e-4)


def test_more_negatives_are_drawn_from_the_store_alike_for_all_workers():
    """The row direction gains the drawn candidates that are not alike; the column direction is as
    it was.
    """
    split = rows()
    terms = {"infonce": TermSpec(pairs=[["norm", "norm"]], negatives=7, alike="row")}  # type: ignore[call-arg]
    student = Adapter(encoder(), want=frozenset({"embedding.norm"}))
    batch = split.batch(torch.arange(6))
    said = student(batch.inputs, batch.mask)
    term = Objective(terms, (said, batch)).modules_by_term["infonce"]
    drawn, bias = term._drawn(batch)
    assert torch.equal(drawn, term._drawn(batch)[0])
    assert not torch.equal(drawn, term._drawn(split.batch(torch.arange(1, 7)))[0])
    assert torch.equal(torch.isneginf(bias), batch.row_id[:, None] == split.row_id[drawn])
    value, _ = term(said, batch)
    x = F.normalize(term.mine[0](said.layers["embedding.norm"][:, 0]), dim=1)
    every = F.normalize(term.theirs[0](split.teacher["embedding.norm"][:, 0]), dim=1)
    s = x @ every[:6].T / 0.1
    kept = [[j for j in drawn.tolist() if j != i] for i in range(6)]
    row_costs = [
        torch.cat([s[i], x[i] @ every[kept[i]].T / 0.1]).logsumexp(0) - s[i, i] for i in range(6)
    ]
    column_costs = s.logsumexp(0) - s.diag()
    torch.testing.assert_close(value, (torch.stack(row_costs) + column_costs) / 2)


def test_the_objective_builds_terms_that_learn_from_an_example():
    with pytest.raises(AssertionError, match="hint learn, and need an example"):
        Objective({"hint": TermSpec(pairs=PAIRS)})  # type: ignore[call-arg]
