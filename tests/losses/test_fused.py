"""The fused losses against plain PyTorch: log_softmax and kl_div over whole matrices of logits, and
autograd.
"""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raykd.data.vocabulary import check_digest, shared_tokens, table_digest
from raykd.errors import DataError, RecipeError
from raykd.losses.fused import Head, dense_kl, shared_vocab, sparse_kl
from raykd.targets import SparseTargets

P = 23
D = 7
V = 50
NAMES = ("hidden", "weight", "bias")


def leaves(dtype: torch.dtype = torch.float32, width: int = V) -> list[Tensor]:
    """hidden (P, D), weight (width, D), bias (width,), as leaves that take gradients."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=g, dtype=dtype).requires_grad_()
        for s in ((P, D), (width, D), (width,))
    ]


def sparse(tail: bool = False, dtype: torch.dtype = torch.float32) -> SparseTargets:
    """1 to 6 classes a place, with weights that do not sum to 1 without a tail, as those of a
    temperature grid.
    """
    g = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 7, (P,), generator=g)
    ids = torch.cat([torch.randperm(V, generator=g)[:n].sort().values for n in counts.tolist()])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    weight = torch.rand(len(ids), generator=g, dtype=dtype) / counts.repeat_interleave(counts)
    rest = 1 - torch.zeros(P, dtype=dtype).index_add_(
        0, torch.arange(P).repeat_interleave(counts), weight
    )
    entropy = torch.rand(P, generator=g, dtype=dtype)
    return SparseTargets(ids, start, weight, V, entropy, rest if tail else None)


def naive_sparse(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, t: SparseTargets, temperature: float
) -> Tensor:
    log_q = (F.linear(hidden, weight, bias)[:, : t.vocab] / temperature).log_softmax(1)
    w = t.dense().to(log_q.dtype)
    assert t.entropy is not None
    value = -(w * log_q).sum(1) - t.entropy
    if t.tail is not None:
        listed = t.dense() > 0
        value = value - t.tail * log_q.masked_fill(listed, -torch.inf).logsumexp(1)
    return value


def naive_dense(
    z: Tensor, y: Tensor, temperature: float, divergence: str, beta: float = 0.5
) -> Tensor:
    log_q = (z / temperature).log_softmax(1)
    log_p = (y / temperature).log_softmax(1)
    if divergence == "forward":
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    if divergence == "reverse":
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * naive_kl(log_p, log_m) + (1 - beta) * naive_kl(log_q, log_m)


def naive_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(1)


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(NAMES, ours, theirs, strict=False):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("tail", [False, True])
def test_sparse_values_and_gradients_equal_the_naive_ones(tail, temperature):
    inputs = leaves()
    t = sparse(tail)
    ours = sparse_kl(*inputs, t, temperature=temperature)
    theirs = naive_sparse(*inputs, t, temperature)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert_same(gradients(ours.mean(), inputs), gradients(theirs.mean(), inputs))


@pytest.mark.parametrize("upstream", ["mask", "rows", "any"])
def test_any_upstream_gradient_is_exact_whether_told_before_or_not(upstream):
    inputs = leaves()
    t = sparse()
    g = torch.Generator().manual_seed(2)
    w = {"mask": (torch.arange(P) % 3 > 0).float(), "rows": torch.rand(P, generator=g)}.get(
        upstream
    )
    ours = sparse_kl(*inputs, t, place_weight=w)
    theirs = naive_sparse(*inputs, t, 1.0)
    if w is not None:
        expected = gradients((w * naive_sparse(*inputs, t, 1.0)).sum() / 7, inputs)
        for _ in range(2):  # the graph may be kept and walked again
            assert_same(
                list(torch.autograd.grad((w * ours).sum() / 7, inputs, retain_graph=True)), expected
            )
    assert_same(
        gradients(ours.square().sum(), inputs), gradients(theirs.square().sum(), inputs), 3e-5
    )


def test_places_of_weight_zero_have_no_gradient():
    inputs = leaves()
    t = sparse()
    mask = torch.arange(P) % 2 == 0
    value = sparse_kl(*inputs, t, place_weight=mask.float())
    ours = gradients((value * mask).sum() / mask.sum(), inputs)
    assert ours[0][~mask].abs().max() == 0
    chosen = sparse_kl(inputs[0][mask], inputs[1], inputs[2], t.take(mask))
    assert torch.equal(chosen, value[mask])
    assert_same(ours, gradients(chosen.mean(), inputs), 1e-6)


@pytest.mark.parametrize("form", ["sparse", "tail", "forward", "reverse", "js"])
def test_gradients_pass_gradcheck_in_float64(form):
    torch.manual_seed(0)
    hidden, weight, bias = leaves(torch.float64)
    inputs = [x.detach().requires_grad_() for x in (hidden[:4], weight, bias)]
    if form in ("sparse", "tail"):
        t = sparse(form == "tail", torch.float64).take(torch.arange(4))
        assert torch.autograd.gradcheck(
            lambda *x: sparse_kl(*x, t, temperature=1.5, chunk=3), inputs, fast_mode=True
        )
    else:
        y = 2 * torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        loss = lambda *x: dense_kl(*x, y, temperature=1.5, divergence=form, beta=0.3, chunk=3)  # noqa: E731
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("chunk", [1, 7, P, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    inputs = leaves()
    for t in (sparse(), sparse(tail=True)):
        whole = sparse_kl(*inputs, t)
        parts = sparse_kl(*inputs, t, chunk=chunk)
        assert torch.allclose(whole, parts, atol=1e-6)
        assert_same(gradients(parts.sum(), inputs), gradients(whole.sum(), inputs), 1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("live", [False, True])
def test_dense_values_and_gradients_equal_the_naive_ones(divergence, live):
    inputs = leaves()
    g = torch.Generator().manual_seed(4)
    head = Head(
        torch.randn(P, 5, generator=g), torch.randn(V, 5, generator=g), torch.randn(V, generator=g)
    )
    y = F.linear(*head)
    ours = dense_kl(*inputs, head if live else y, temperature=2.0, divergence=divergence, beta=0.3)
    theirs = naive_dense(F.linear(*inputs), y, 2.0, divergence, 0.3)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert_same(gradients(ours.mean(), inputs), gradients(theirs.mean(), inputs))


def test_the_ends_of_js_are_forward_and_reverse():
    inputs = leaves()
    y = torch.randn(P, V, generator=torch.Generator().manual_seed(5))
    for beta, name in ((0, "forward"), (1, "reverse")):
        assert torch.equal(
            dense_kl(*inputs, y, divergence="js", beta=beta), dense_kl(*inputs, y, divergence=name)
        )


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence):
    inputs = leaves()
    y = F.linear(*inputs).detach() + 3.0
    value = dense_kl(*inputs, y, temperature=2.0, divergence=divergence)
    assert value.abs().max() < 1e-5
    assert max(g.abs().max() for g in gradients(value.sum(), inputs)) < 1e-5


def test_all_classes_as_a_sparse_target_are_the_dense_loss_and_t_squared_keeps_its_gradient():
    """T^2 KL_T has the gradient T (q - p) with respect to the logits."""
    inputs = leaves()
    y = torch.randn(P, V, generator=torch.Generator().manual_seed(6))
    temperature = 3.0
    p = (y / temperature).softmax(1)
    ids = torch.arange(V).repeat(P)
    start = torch.arange(P + 1) * V
    every = SparseTargets(ids, start, p.flatten(), V, -(p * p.log()).sum(1))
    dense = dense_kl(*inputs, y, temperature=temperature)
    assert torch.allclose(sparse_kl(*inputs, every, temperature=temperature), dense, atol=1e-5)
    z = F.linear(*inputs)
    logit_gradient = temperature * ((z / temperature).softmax(1) - p).detach()
    ours = gradients(temperature**2 * dense.sum(), inputs)
    assert_same(
        ours,
        [logit_gradient @ inputs[1], logit_gradient.T @ inputs[0], logit_gradient.sum(0)],
        1e-4,
    )


def test_padded_columns_are_outside_the_softmax_and_have_no_gradient():
    padded = leaves(width=V + 6)
    t = sparse()
    real = [padded[0], padded[1][:V], padded[2][:V]]
    y = torch.randn(P, V + 3, generator=torch.Generator().manual_seed(7))
    for ours, theirs in (
        (sparse_kl(*padded, t), sparse_kl(*real, t)),
        (dense_kl(*padded, y, vocab=V), dense_kl(*real, y[:, :V])),
    ):
        assert torch.equal(ours, theirs)
        _, weight, bias = gradients(ours.sum(), padded)
        assert weight[V:].abs().max() == bias[V:].abs().max() == 0
        assert weight[:V].abs().max() > 0


def test_widths_that_differ_are_refused_until_the_vocabulary_is_told():
    with pytest.raises(RecipeError, match=r"151936 columns and the student's 152064.*give vocab ="):
        shared_vocab(151_936, 152_064, None)
    assert shared_vocab(151_936, 152_064, 151_643) == 151_643
    with pytest.raises(RecipeError, match="give 1 to 151936"):
        shared_vocab(151_936, 152_064, 152_000)
    narrow = leaves(width=V - 1)
    with pytest.raises(RecipeError, match="50 classes, the student's head has 49"):
        sparse_kl(*narrow, sparse())


def test_without_entropy_the_value_is_a_cross_entropy_and_frozen_inputs_take_no_gradient():
    hidden, weight, _ = leaves()
    t = sparse()
    bare = SparseTargets(t.ids, t.start, t.weight, V)
    value = sparse_kl(hidden, weight.detach(), None, bare)
    assert t.entropy is not None
    assert torch.allclose(value - t.entropy, sparse_kl(hidden, weight, None, t), atol=1e-6)
    value.sum().backward()
    assert hidden.grad is not None


def test_half_precision_inputs_meet_fp32_arithmetic():
    inputs = [x.detach().bfloat16().requires_grad_() for x in leaves()]
    t = sparse()
    value = sparse_kl(*inputs, t)
    assert value.dtype == torch.float32
    exact = [x.detach().float().requires_grad_() for x in inputs]
    reference = sparse_kl(*exact, t)
    assert (value - reference).abs().max() < 0.1  # the logits themselves are products of bf16
    for ours, theirs in zip(
        gradients(value.mean(), inputs), gradients(reference.mean(), exact), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).abs().max() < 0.02


def test_extreme_logits_stay_finite():
    inputs = [100 * x.detach() for x in leaves()]
    inputs = [x.requires_grad_() for x in inputs]
    for t in (sparse(), sparse(tail=True)):
        value = sparse_kl(*inputs, t)
        assert torch.isfinite(value).all()
        assert all(torch.isfinite(g).all() for g in gradients(value.sum(), inputs))


def test_taken_places_keep_their_entries_in_any_order():
    t = sparse(tail=True)
    places = torch.tensor([5, 0, 5, 22])
    assert torch.equal(t.take(places).dense(), t.dense()[places])
    assert t.tail is not None
    assert torch.equal(t.take(places).tail, t.tail[places])
    assert len(t.take(torch.zeros(P, dtype=torch.bool))) == 0
    inputs = leaves()
    assert sparse_kl(inputs[0][:0], inputs[1], inputs[2], t.take(torch.arange(0))).sum() == 0


GROWTH = """
import json, resource, sys, torch
sys.path.insert(0, "tests")
from raykd.losses.fused import sparse_kl
from raykd.targets import SparseTargets
torch.set_num_threads(1)
D, V, n = 16, 20_000, 4
def step(places):
    h, w = torch.randn(places, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    ids = torch.arange(n).repeat(places)
    t = SparseTargets(ids, torch.arange(places + 1) * n, torch.full((places * n,), 1 / n), V)
    sparse_kl(h, w, None, t).mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([step(256), step(256), step(4096)]))
"""


def test_memory_does_not_grow_with_the_number_of_places():
    """16 times the places would be 310 MiB more of logits; here it is the inputs of the places."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    _, few, many = json.loads(done.stdout)
    assert many - few < 16


def test_tokenisers_agree_by_content_and_not_by_size():
    teacher = {f"t{i}": i for i in range(100)}
    padded = [*teacher, *(f"<pad{i}>" for i in range(28))]
    assert (
        shared_tokens(teacher, teacher)
        == shared_tokens(teacher, padded)
        == shared_tokens(padded, teacher)
        == 100
    )
    permuted = list(teacher)
    permuted[17], permuted[40] = permuted[40], permuted[17]
    with pytest.raises(
        DataError, match="id 17 is 't17' to the teacher and 't40' to the student; id 40"
    ):
        shared_tokens(teacher, permuted)
    assert table_digest(teacher) == table_digest(list(teacher)) != table_digest(permuted)
    assert check_digest(table_digest(teacher), 100, padded) == 100
    with pytest.raises(DataError, match="different in meaning"):
        check_digest(table_digest(teacher), 100, permuted)
    with pytest.raises(DataError, match="has 128 tokens, the student's 100"):
        check_digest(table_digest(padded), 128, teacher)
    with pytest.raises(DataError, match="token id 0 stands for"):
        table_digest({"a": 0, "b": 0})
