"""`[precision]`: numbers that models compute in. At the defaults nothing changes; what cannot be is
refused at its key.

References are the same models in float32, and the types that layers are seen to compute in.
"""

from pathlib import Path

import by_hand
import pytest
import stored
import torch
from folders import home as write_home
from folders import load as load_home
from random_rows import rows_for
from torch import nn

from raykd.errors import RecipeError
from raykd.losses import TermValues, term
from raykd.losses.terms import TERMS
from raykd.models import build, form, transformers_lm
from raykd.models.adapter import Adapter
from raykd.models.build import build_frozen
from raykd.models.device import device_of
from raykd.models.form import CPU, Form, set_attention
from raykd.models.llama import Llama
from raykd.models.probe import ProbeRows, check_numbers
from raykd.models.series_encoder import SeriesEncoder
from raykd.recipe.precision import Precision
from raykd.recipe.recipe import Recipe
from raykd.recipe.tables import Optim, TermSpec
from raykd.signals import Batch, Signals
from raykd.stages.load import resolve
from raykd.teacher.head import teacher_head
from raykd.teacher.identity import teacher_identity
from raykd.training.arm import Arm
from raykd.training.loop import train

BF16 = {"precision": {"teacher": "bf16"}}
ROUNDING = 2**-8  # of bf16, to nearest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stored.write(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return write_home(tmp_path_factory.mktemp("text"))


def teacher_of(recipe: Recipe, shape: dict[str, int], **fields) -> nn.Module:
    assert recipe.teacher is not None
    return build_frozen(recipe.teacher, shape, Form(**fields), key="teacher")


@pytest.mark.parametrize("weights", ["wide", "narrow.safetensors"])
def test_a_teacher_that_is_read_without_a_copy_is_the_same_module(home, weights):
    recipe = load_home(home, f"teacher.weights={home / weights}")
    if weights != "wide":
        settings = {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "inner": 48}
        table = recipe.teacher.model_copy(update={"settings": settings})
        recipe = recipe.model_copy(update={"teacher": table})
    shape = by_hand.scorer_of(recipe)[1].shape
    plain = build.build_model(recipe.teacher, **shape, key="teacher").eval()
    direct = teacher_of(recipe, shape).eval()
    tokens = torch.arange(8)[None] % 20
    assert torch.equal(direct(tokens)["logits"], plain(tokens)["logits"])
    assert direct.lm_head.weight is direct.model.embed_tokens.weight
    assert [n for n, _ in direct.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any(p.requires_grad or p.is_meta for p in direct.parameters())
    half = teacher_of(recipe, shape, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.model.embed_tokens.weight
    cached = half(tokens, half.cache(1))["logits"]
    assert cached.dtype == torch.bfloat16


@pytest.mark.parametrize("numbers", ["bf16", "fp16"])
def test_a_store_of_a_teacher_in_fewer_digits_is_near_and_has_its_own_id(folder, numbers):
    full, full_store = stored.scored(folder, "fp16")
    half, half_store = stored.scored(folder, "fp16", precision={"teacher": numbers})
    assert full_store.manifest["identity"] != half_store.manifest["identity"]
    assert "precision" not in teacher_identity(full)
    assert teacher_identity(half)["precision"] == {"teacher": numbers}
    a = full_store.stored("test", []).logits().decode()
    b = half_store.stored("test", []).logits().decode()
    apart = float((a - b).abs().max() / a.abs().max())
    assert 0 < apart < 8 * ROUNDING


def test_hidden_states_of_a_teacher_in_bf16_meet_its_head_again(folder):
    recipe, store = stored.scored(folder, "hidden", **BF16)
    facts = by_hand.scorer_of(recipe)[1]
    head = teacher_head(recipe, store, facts)
    assert head is not None
    assert head[0].dtype == torch.float32
    other, _ = stored.scored(folder, "hidden", precision={"teacher": "fp16"})
    with pytest.raises(Exception, match="belong to the output head"):
        teacher_head(other, store, facts)


def test_a_student_in_bf16_keeps_its_weights_and_is_validated_in_float32():
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    losses = {}
    for numbers in ("fp32", "bf16"):
        torch.manual_seed(1)
        student = Adapter(SeriesEncoder(channels=3, classes=4, steps=16, width=16))

        def look(module: nn.Module, _inputs, output, numbers=numbers) -> None:
            if numbers == "bf16":
                seen[module.training].add(output.dtype)

        student.module.head.register_forward_hook(look)
        arm = Arm("student", 0, {"ce": TermSpec(), "kd": TermSpec()})
        rows = rows_for(arm)
        state = train(
            arm,
            Optim(steps=20, batch=16, evaluate_every=10),
            student,
            rows,
            lambda model, rows=rows: _evaluated(model, rows),
            precision=Precision(student=numbers),
        )
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        losses[numbers] = state.history[-1]["loss"]
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


def _evaluated(model: nn.Module, rows) -> dict[str, float]:
    """As validation does: in eval mode, without a gradient."""
    model.eval()
    with torch.inference_mode():
        model(rows.inputs[:4], rows.mask[:4])
    model.train()
    return {}


@pytest.mark.parametrize("kind", ["llama", "series"])
def test_attention_step_by_step_is_that_in_one_call(kind):
    torch.manual_seed(0)
    if kind == "llama":
        module: nn.Module = Llama(classes=20, steps=8)
        rows = torch.arange(8)[None]
    else:
        module = SeriesEncoder(channels=3, classes=4, steps=8)
        rows = torch.randn(2, 8, 3)
    once = module(rows)["logits"]
    set_attention(module, "eager")
    by_steps = module(rows)["logits"]
    torch.testing.assert_close(by_steps, once, rtol=1e-5, atol=1e-6)
    parts = [part for part in module.modules() if isinstance(part, form.MayBeEager)]
    assert parts
    assert all(part.is_eager and part.attention is None for part in parts)  # no map is kept


@pytest.mark.parametrize(
    ("numbers", "layers", "wanted"),
    [
        ("fp32", (), "eager"),
        ("bf16", (), "sdpa"),
        ("bf16", ("hidden.a",), "sdpa"),
        ("fp16", ("scores.a",), "eager"),
        ("bf16", ("attention.a",), "eager"),
    ],
)
def test_the_attention_of_a_teacher_of_transformers(numbers, layers, wanted):
    assert Form.of_teacher(Precision(teacher=numbers), CPU, layers).implementation == wanted
    assert Form.of_teacher(Precision(attention="sdpa"), CPU).implementation == "sdpa"


def test_a_model_of_transformers_is_read_in_its_numbers(home):
    pytest.importorskip("transformers")
    full = transformers_lm.read(home / "wide")
    half = transformers_lm.read(home / "wide", Form(torch.bfloat16))
    assert full.model.config._attn_implementation == "eager"
    assert half.model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    tokens = torch.arange(8)[None] % 20
    with torch.no_grad():
        a = full(tokens)["logits"]
        b = half(tokens)["logits"]
    assert b.dtype == torch.bfloat16
    assert 0 < (a - b).abs().max() / a.abs().max() < 8 * ROUNDING


def exact(student: Signals, batch: Batch) -> TermValues:
    """A term that needs its digits."""
    assert student.logits.dtype == torch.float64
    assert batch.teacher is not None
    assert batch.teacher.logits.dtype == torch.float64
    return TermValues((student.logits - batch.teacher.logits).square().mean(-1), student.mask)


@pytest.fixture
def asks_float64():
    term("logits", dtype="float64")(exact)
    yield
    del TERMS["exact"]


def test_a_term_is_given_the_digits_that_it_asks_for(asks_float64):
    arm = Arm("student", 0, {"exact": TermSpec()})
    student = Adapter(SeriesEncoder(channels=3, classes=4, steps=16))
    optim = Optim(steps=2, batch=4, evaluate_every=2)
    state = train(arm, optim, student, rows_for(arm), lambda _: {})
    assert state.history[-1]["terms"]["exact"] > 0


SCORES = {"attention": {"mode": "scores", "pairs": [["blocks.0.attention", "blocks.0.attention"]]}}


@pytest.mark.parametrize(
    ("precision", "terms", "key", "words"),
    [
        ({"student": "bf16"}, {"exact": {}}, "precision.student", "asks for float64"),
        ({"teacher": "fp16"}, {"exact": {}}, "precision.teacher", "asks for float64"),
        ({"attention": "sdpa"}, SCORES, "precision.attention", "terms.attention reads one"),
        ({"student": "fp16"}, {"kd": {}}, "precision.student", "'fp32' or 'bf16'"),
        ({"matmull": "high"}, {"kd": {}}, "precision.matmull", "Did you mean matmul"),
    ],
)
def test_numbers_that_cannot_be_are_refused_at_their_key(
    precision, terms, key, words, tmp_path, asks_float64
):
    teacher = by_hand.teacher(tmp_path / "teacher.safetensors")
    raw = {"teacher": teacher, "precision": precision, "terms": terms}
    with pytest.raises(RecipeError) as caught:
        resolve(raw | {"technique": "none"})
    problem = next(p for p in caught.value.problems if p.key == key)
    assert words in problem.message


def test_numbers_of_no_teacher_are_refused():
    with pytest.raises(RecipeError, match=r"precision\.teacher: .*there is no teacher"):
        resolve({"technique": "none", "precision": {"teacher": "bf16"}})


def test_a_device_without_bf16_is_refused_at_the_key(monkeypatch):
    monkeypatch.setattr(form, "has_bf16", lambda device: False)
    recipe = resolve({"technique": "none", "precision": {"student": "bf16"}})
    with pytest.raises(RecipeError, match=r'precision\.student: "bf16", which .* not have; write'):
        device_of(recipe)
    assert device_of(resolve({"technique": "none"})) == CPU


class OnlyFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(inputs.mean(1).float()) + torch.zeros(4)


def test_a_module_that_fails_in_its_numbers_is_refused_at_their_key():
    rows = ProbeRows(torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), 4)
    check_numbers(OnlyFloat32(), "student", rows, Precision(student="bf16"))
    check_numbers(OnlyFloat32(), "teacher", rows, Precision())
    with pytest.raises(RecipeError, match=r"precision\.teacher: .*cannot answer.*RuntimeError"):
        check_numbers(OnlyFloat32(), "teacher", rows, Precision(teacher="bf16"))


def test_matrix_products_are_as_the_recipe_says(folder):
    recipe, _ = stored.scored(folder, "fp16", precision={"matmul": "high"})
    assert torch.get_float32_matmul_precision() == "high"
    assert teacher_identity(recipe)["precision"] == {"matmul": "high"}
    stored.scored(folder, "int8")
    assert torch.get_float32_matmul_precision() == "highest"
