"""A student with a large head: losses and figures without its logits, equal to those with them.

The reference is the same student whose head is multiplied out. Sums over the vocabulary are taken
in another order, so float32 bounds the difference.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raykd import techniques
from raykd.generation.sampling import FrozenTeacher
from raykd.losses import fused
from raykd.losses.objective import Objective
from raykd.models import adapter
from raykd.models.adapter import Adapter
from raykd.models.form import computing
from raykd.models.llama import Llama
from raykd.quant import swap
from raykd.recipe.precision import FP32, Precision
from raykd.recipe.quant import Quant
from raykd.recipe.tables import Optim, TermSpec
from raykd.signals import Batch, Headed, Rollout, Signals
from raykd.store.codecs.hidden import Hidden
from raykd.store.logits import StoredLogits
from raykd.targets import UNLABELLED, SparseTargets
from raykd.training import predictions, throughput
from raykd.training.arm import Arm
from raykd.training.device_rows import DeviceRows
from raykd.training.loop import train

techniques.load_terms()
VOCAB = 64
B = 4
T = 12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small heads are large here, and chunks have eight places."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(adapter, "MANY", VOCAB - 1)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)
    monkeypatch.setattr(fused, "CHUNK_ROWS", 8)
    yield
    torch.set_num_threads(before)


def student(want: frozenset[str] = frozenset(), *, found: bool) -> Adapter:
    torch.manual_seed(0)
    module = Llama(classes=VOCAB, steps=T, width=16, layers=1, heads=2, kv_heads=1, inner=24)
    with torch.no_grad():
        module.lm_head.weight.mul_(40)
    made = Adapter(module, want=want)
    if found:
        data = batch()
        made.find_head(data.inputs[:1], data.mask[:1])
    return made


def sparse(places: int, temperature: float) -> SparseTargets:
    draw = torch.Generator().manual_seed(int(10 * temperature))
    ids = torch.stack([torch.randperm(VOCAB, generator=draw)[:5] for _ in range(places)])
    weight = torch.rand(places, 5, generator=draw)
    weight = weight / weight.sum(1, keepdim=True)
    start = torch.arange(places + 1) * 5
    return SparseTargets(ids.flatten(), start, weight.flatten(), VOCAB)


def batch(kind: str = "dense", weight: Tensor | None = None) -> Batch:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (B, T), generator=draw)
    inputs = torch.stack([tokens, torch.arange(T).expand(B, T)], -1).int()
    mask = torch.arange(T) < torch.tensor([12, 9, 5, 2])[:, None]
    label = torch.randint(VOCAB, (B, T), generator=draw)
    label[0, 3] = UNLABELLED
    teacher = Signals(2 * torch.randn(B, T, VOCAB, generator=draw), mask)
    made = Batch(torch.arange(B), inputs, mask, label, teacher=teacher, weight=weight)
    if kind == "sparse":
        empty = Signals(torch.zeros(B, T, 0), mask)
        places = int(mask.sum())
        return replace(made, teacher=empty, targets=lambda t: sparse(places, t))
    if kind == "own":
        drawn = Rollout(torch.full((B, T), -3.0), torch.full((B, T), 0.9), 0, temperature=1.3)
        return replace(made, label=label.clamp(min=0), rollout=drawn)
    return made


def learnt(
    made: Adapter, terms: dict[str, Any], data: Batch, precision: Precision = FP32
) -> tuple[Tensor, list[Tensor], Signals]:
    with computing(precision, data.inputs.device):
        said = made(data.inputs, data.mask)
    objective = Objective({name: TermSpec(**s) for name, s in terms.items()})
    loss = objective.total(*objective(said, data))
    loss.backward()
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    return loss.detach(), gradients, said


CASES = [
    ("dense", {"ce": {}}),
    ("dense", {"kd": {"temperature": 2.0}}),
    ("dense", {"ce": {"weight": 0.3}, "kd": {"temperature": 1.0, "t_squared": False}}),
    ("sparse", {"kd": {"temperature": 1.0}}),
    ("sparse", {"ce": {}, "kd": {"temperature": 2.0}}),
    ("own", {"gkd": {"beta": 0.0}}),
    ("own", {"gkd": {"beta": 0.5}}),
    ("own", {"distilspec": {"divergence": "reverse"}}),
    ("own", {"distilspec": {"divergence": "lk"}}),
    ("own", {"minillm": {}}),
    ("own", {"minillm": {"weights": "prefix"}}),
]


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0, 0.1])], ids=["", "weighted"])
@pytest.mark.parametrize(("kind", "terms"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_logits(kind, terms, weight):
    data = batch(kind, weight)
    loss, gradients, said = learnt(student(found=False), terms, data)
    other, others, headed = learnt(student(found=True), terms, data)
    assert said.headed is None
    assert headed.headed is not None
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(others) > 0
    for mine, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert "logits" not in vars(headed)


def test_in_bf16_the_product_is_in_bf16_and_the_loss_is_near():
    terms = {"ce": {}, "kd": {"temperature": 2.0}}
    loss, gradients, _ = learnt(student(found=True), terms, batch())
    other, others, said = learnt(student(found=True), terms, batch(), Precision(student="bf16"))
    assert said.headed is not None
    assert said.headed.hidden.dtype == torch.bfloat16
    assert other.dtype == torch.float32
    assert {g.dtype for g in others} == {torch.float32}
    torch.testing.assert_close(other, loss, rtol=0.02, atol=0)
    whole = torch.cat([g.flatten() for g in gradients])
    near = torch.cat([g.flatten() for g in others])
    assert torch.nn.functional.cosine_similarity(whole, near, dim=0) > 0.99


def test_micro_batches_and_padding_keep_the_head():
    made = student(found=True)
    data = batch()
    said = made(data.inputs, data.mask)
    part = said.rows(slice(1, 3)).valid(data.mask[1:3])
    assert part.headed is not None
    assert "logits" not in vars(part)
    whole = student(found=False)(data.inputs, data.mask).valid(data.mask)
    torch.testing.assert_close(part.logits, whole.logits[1:3])
    assert (part.logits[~part.mask] == 0).all()


class Scaled(Llama):
    def forward(self, tokens: Tensor, cache: Any = None) -> dict[str, Tensor]:
        return {"logits": 2 * super().forward(tokens, cache)["logits"]}


def test_a_head_whose_answer_is_changed_read_or_rounded_is_multiplied_out():
    data = batch()
    changed = Adapter(Scaled(classes=VOCAB, steps=T))
    changed.find_head(data.inputs[:1], data.mask[:1])
    assert changed.head is None
    assert not student(frozenset({"hidden.lm_head"}), found=True).heads()
    rounded = student(found=False)
    quant = Quant(skip=[])
    swap.prepare(rounded.module, quant)
    rounded.find_head(data.inputs[:1], data.mask[:1])
    assert rounded.head == "lm_head"
    assert rounded(data.inputs, data.mask).headed is not None
    for _, layer in swap.roundable(rounded.module):
        layer.set(quant)
    assert rounded(data.inputs, data.mask).headed is None


def test_a_small_head_is_as_before(monkeypatch):
    monkeypatch.setattr(adapter, "MANY", VOCAB)
    made = student(found=True)
    assert not made.heads()
    assert made.head is None


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        sizes = [value.numel() for value in made if isinstance(value, Tensor)]
        self.size = max([self.size, *sizes])
        return out


def text_rows() -> DeviceRows:
    data = batch("dense")
    return DeviceRows(data.row_id, data.inputs, data.mask, data.label, None, {}, None)


@pytest.mark.parametrize("found", [True, False])
def test_no_logits_of_a_whole_batch_are_made_in_training_or_evaluation(found, monkeypatch):
    if not found:
        monkeypatch.setattr(adapter, "MANY", VOCAB)
    monkeypatch.setattr(predictions, "LOGITS", 8 * VOCAB)
    monkeypatch.setitem(throughput.SIDE, "cpu", 4)  # of what is multiplied to tell the peak
    made = student(found=False)
    rows = text_rows()
    told: list[dict[str, Any]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            told.append(predictions._of_text_batch(model, rows, torch.arange(B)))
        return {}

    optim = Optim(steps=2, batch=B, evaluate_every=2)
    with Largest() as largest:
        train(Arm("student", 0, {"ce": TermSpec()}), optim, made, rows, evaluate)
    places = int(rows.mask.sum())
    assert (largest.size < places * VOCAB) == found
    assert (made.head == "lm_head") == found
    assert told[-1]["answer"].shape == told[-1]["log_q"].shape == (places,)


def test_what_is_told_of_a_split_is_what_the_logits_say():
    rows = replace(text_rows(), teacher={"logits": batch().teacher.logits})
    rows = replace(rows, teacher_mask=rows.mask)
    with torch.inference_mode():
        plain, few = (
            predictions._of_text_batch(student(found=found), rows, torch.arange(B))
            for found in (False, True)
        )
    assert torch.equal(plain["answer"], few["answer"])
    for name in ("log_q", "kl"):
        torch.testing.assert_close(few[name], plain[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def headed_teacher(data: Batch, columns: int = VOCAB) -> Signals:
    """A teacher of a head and its hidden states, which says what `data`'s teacher does not."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, 16, generator=draw)
    weight = torch.randn(columns, 16, generator=draw)
    bias = torch.randn(columns, generator=draw)
    return Signals.of_head(Headed(hidden, weight, bias), data.mask)


@pytest.mark.parametrize(
    ("kind", "terms"), [case for case in CASES if case[0] != "sparse"], ids=str
)
def test_a_teachers_head_is_walked_beside_the_students(kind, terms):
    data = batch(kind)
    said = headed_teacher(data)
    whole = replace(data, teacher=Signals(headed_teacher(data).logits, data.mask))
    loss, gradients, _ = learnt(student(found=False), terms, whole)
    walked = student(found=True)
    with Largest() as largest:
        other, others, _ = learnt(walked, terms, replace(data, teacher=said))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    if "lk" not in str(terms):  # which needs both distributions
        assert largest.size < int(data.mask.sum()) * VOCAB


def test_a_padded_head_is_cut_to_its_first_columns_and_no_logits_are_made():
    data = batch()
    padded = headed_teacher(data, VOCAB + 3)
    cut = padded.first_columns(VOCAB)
    assert (padded.columns, cut.columns) == (VOCAB + 3, VOCAB)
    assert "logits" not in vars(padded)
    assert "logits" not in vars(cut)
    assert torch.equal(cut.logits, padded.logits[..., :VOCAB])
    assert torch.equal(padded.first_columns(VOCAB).logits, cut.logits)
    assert cut.first_columns(VOCAB) is cut


def test_a_teacher_in_this_process_leaves_its_large_head_to_the_losses():
    torch.manual_seed(4)
    module = Llama(classes=VOCAB, steps=T, width=16, layers=1, heads=2, kv_heads=1, inner=24)
    module.model.layers[0].eval()
    modes = [part.training for part in module.modules()]
    inputs = batch().inputs
    plain = module.eval()(inputs)["logits"]
    for part, training in zip(module.modules(), modes, strict=True):
        part.training = training
    teacher = FrozenTeacher(module)
    for _ in range(2):
        said = teacher.ask(inputs)()
        assert said.headed is not None
        assert "logits" not in vars(said)
        assert not said.headed.weight.requires_grad
        assert [part.training for part in module.modules()] == modes
        torch.testing.assert_close(said.logits, plain)
    other = FrozenTeacher(Scaled(classes=VOCAB, steps=T)).ask(inputs)()
    assert other.headed is None
    assert other.logits.dtype == torch.float32


def test_stored_hidden_states_keep_their_head():
    data = batch()
    torch.manual_seed(5)
    states = torch.randn(B, T, 8)
    weight = torch.randn(VOCAB, 8)
    bias = torch.randn(VOCAB)
    codec = Hidden(width=8, head="")
    column = pa.chunked_array([codec.encode(states, data.mask, data.row_id.numpy(), key=0)])
    steps = data.mask.sum(1).int().numpy()
    rows = DeviceRows(
        row_id=data.row_id,
        inputs=data.inputs,
        mask=data.mask,
        label=data.label,
        valence=None,
        teacher={},
        teacher_mask=data.mask,
        stored=StoredLogits(column, steps, codec, "plain"),
        head=(weight, bias),
    )
    said = rows.batch(torch.tensor([2, 0])).teacher
    assert said is not None
    assert "logits" not in vars(said)
    mask = data.mask[[2, 0]]
    expected = states[[2, 0]].half().float() @ weight.T + bias
    torch.testing.assert_close(said.logits, torch.where(mask[..., None], expected, 0.0))
